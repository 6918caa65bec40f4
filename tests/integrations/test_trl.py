"""TRL's trainers on patched models, with this package's head and losses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import bigkernels

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers", minversion="5")
utils = pytest.importorskip("trl.trainer.utils")
if not hasattr(utils, "add_fused_lm_head"):
    pytest.skip("this version of TRL has no fused head", allow_module_level=True)

from integrations import trained  # noqa: E402

from bigkernels._load import cpu_library  # noqa: E402
from bigkernels.integrations.transformers import TrainerCallback  # noqa: E402
from bigkernels.integrations.trl import _head as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
EVERY = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def fused(model, outputs=EVERY, **options):
    utils.add_fused_lm_head(model, outputs=outputs, **options)
    assert ours.use_head(model)
    return model


def exact(model, ids, labels, temperature=1.0):
    """What the head says, of float64 logits (B, S, V)."""
    logits = model(input_ids=ids).logits[:, :-1] / temperature
    labels = labels[:, 1:]
    kept = labels != -100
    log_p = logits.log_softmax(-1)
    found = {
        "log_probs": log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": (logits.argmax(-1) == labels).double(),
    }
    return {name: torch.where(kept, t, 0) for name, t in found.items()}


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"scale": 3.0}, {"tie": True}, {"temperature": 0.7}, {"bias": True}], ids=str
)
def test_the_head_computes_what_trls_does(options):
    config = {"tie_word_embeddings": "tie" in options}
    if "softcap" in options:
        torch.manual_seed(0)
        sizes = trained.SIZES | {"head_dim": 16, "final_logit_softcapping": 2.0}
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, attn_implementation="eager"))
    elif "scale" in options:
        torch.manual_seed(0)
        model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**trained.SIZES, logits_scaling=3.0))
    else:
        model = trained.llama(**config)
    if "bias" in options:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(99))
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    temperature = options.get("temperature", 1.0)
    ids = trained.IDS
    labels = ids.clone()
    labels[0, :5] = labels[1, 9] = -100
    wide = copy.deepcopy(model).double()
    theirs = copy.deepcopy(model)
    utils.add_fused_lm_head(theirs, outputs=EVERY, temperature=temperature)
    fused(model, temperature=temperature)
    weights = torch.rand(2, 2, 11)
    results, grads = {}, {}
    for name, m in (("ours", model), ("theirs", theirs)):
        out = m(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.log_probs * weights[0] + out.entropy * weights[1]).sum().backward()
        results[name], grads[name] = out, {key: p.grad for key, p in m.named_parameters()}
    expected = exact(wide, ids, labels, temperature)
    (expected["log_probs"] * weights[0] + expected["entropy"] * weights[1]).sum().backward()
    for name in EVERY:
        got = results["ours"][name]
        assert got.dtype == results["theirs"][name].dtype and got.requires_grad == results["theirs"][name].requires_grad
        torch.testing.assert_close(got.double(), expected[name], rtol=2e-5, atol=2e-5)
    for key, p in wide.named_parameters():
        if p.grad is not None:
            assert (grads["ours"][key] - p.grad).norm() <= 1e-4 * p.grad.norm(), key


def test_a_quantized_head_is_read_in_its_codes():
    model = trained.llama()
    bigkernels.quantize(model, "nf4", skip=())
    expected = exact(copy.deepcopy(model), trained.IDS, trained.IDS)
    fused(model)
    model.lm_head.dequantize = None  # nobody asks for the weight
    out = model(input_ids=trained.IDS, labels=trained.IDS, fused_lm_head=True)
    for name in EVERY:
        torch.testing.assert_close(out[name].float(), expected[name].float(), rtol=1e-4, atol=1e-4)
    assert model(input_ids=trained.IDS).logits.shape == (2, 12, 99)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_autocast_and_a_wide_head(dtype):
    model = trained.llama()
    expected = exact(copy.deepcopy(model).double(), trained.IDS, trained.IDS)["log_probs"]
    low = copy.deepcopy(model).to(dtype)
    cast = copy.deepcopy(low)
    for m, options in ((fused(model), {}), (fused(low), {}), (fused(cast, cast_lm_head_to_fp32=True), {})):
        with torch.autocast("cpu", torch.bfloat16, enabled=m is model):
            out = m(input_ids=trained.IDS, labels=trained.IDS, fused_lm_head=True, **options)
        assert out.log_probs.dtype == torch.float32
        torch.testing.assert_close(out.log_probs.double(), expected, rtol=0.02, atol=0.05)
        out.log_probs.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())


def test_other_models_stay():
    model = trained.llama()
    assert not ours.use_head(model) and "forward" not in model.__dict__
    utils.add_fused_lm_head(model)
    before = copy.copy(model.forward)
    assert ours.use_head(model) and ours.use_head(model), "twice is once"
    assert model.forward.__func__ is not before.__func__
    other = trained.llama()
    utils.add_fused_lm_head(other)
    assert other.forward.__func__.__globals__[ours._THEIRS] is not ours._Head
    labels = torch.full_like(trained.IDS, -100)
    out = model(input_ids=trained.IDS, labels=labels, fused_lm_head=True)
    assert not out.log_probs.any() and out.loss == 0
    out.loss.backward()


def test_generation_keeps_its_program_and_unpatch_finds_the_forward():
    model = trained.llama().eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(trained.IDS, **options)
    report = bigkernels.patch(model)
    fused(model)
    model.enable_input_require_grads()  # as trainers do for adapters under gradient checkpointing
    assert torch.equal(model.generate(trained.IDS, **options), expected)
    if cpu_library().reason is None:
        assert "decode program: 2 layers" in str(report), report
    head = model.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bigkernels.unpatch(model)
    assert model.forward is not None and model.forward.__func__ is head.__func__
    cells = dict(zip(head.__func__.__code__.co_freevars, head.__func__.__closure__, strict=True))
    assert cells["original_forward"].cell_contents.func is type(model).forward
    assert torch.equal(model.generate(trained.IDS, **options), expected)
    out = model(input_ids=trained.IDS, labels=trained.IDS, fused_lm_head=True)
    wide = exact(trained.llama().double(), trained.IDS, trained.IDS)["log_probs"]
    torch.testing.assert_close(out.log_probs.double(), wide, rtol=2e-5, atol=2e-5)


def test_patching_after_the_trainer_was_made_keeps_the_head():
    model = trained.llama()
    utils.add_fused_lm_head(model, outputs=EVERY)
    expected = model(input_ids=trained.IDS, labels=trained.IDS, fused_lm_head=True).log_probs
    bigkernels.patch(model)
    assert ours.use_head(model)
    torch.testing.assert_close(model(input_ids=trained.IDS, labels=trained.IDS, fused_lm_head=True).log_probs, expected)
    torch.testing.assert_close(model(input_ids=trained.IDS, labels=trained.IDS).loss, -expected.mean())


def data(kind: str):
    if kind == "sft":
        return datasets.Dataset.from_dict({"text": [trained.text(i, 8 + i % 5) for i in range(8)]})
    made = {"prompt": [], "chosen": [], "rejected": []}
    for i in range(8):
        made["prompt"].append(trained.text(i, 4))
        made["chosen"].append(" " + trained.text(i + 4, 4))
        made["rejected"].append(" " + trained.text(3 * i + 1, 3))
    return datasets.Dataset.from_dict(made)


def run(kind: str, model, folder, callbacks, **options):
    if kind == "sft":
        args = trained.arguments(folder, "SFTConfig", max_length=32, **options)
        trainer = trl.SFTTrainer(
            model, args, train_dataset=data("sft"), processing_class=trained.tokenizer(), callbacks=callbacks
        )
    else:
        args = trained.arguments(folder, "DPOConfig", max_length=32, **options)
        trainer = trl.DPOTrainer(
            model,
            copy.deepcopy(model),
            args=args,
            train_dataset=data("dpo"),
            processing_class=trained.tokenizer(),
            callbacks=callbacks,
        )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trainers(kind: str, tmp_path):
    plain = run(kind, trained.llama(), tmp_path, [], optim="adamw_torch")
    callback = TrainerCallback(optim="bigkernels_adamw")
    found = run(kind, trained.llama(), tmp_path, [callback], optim="sgd")
    assert found.model.forward.__func__.__globals__[ours._THEIRS] is ours._Head
    assert isinstance(found.optimizer.optimizer, bigkernels.optim.AdamW)
    assert callback.report is not None and "attention" in str(callback.report)
    a, b = (torch.tensor(trained.losses(t)) for t in (plain, found))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    logged = [entry for entry in found.state.log_history if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and entry["peak_memory_gib"] > 0 for entry in logged)
    assert logged[-1]["num_tokens"] and "num_input_tokens_seen" not in logged[-1]
    first = {entry["step"]: entry for entry in plain.state.log_history if "loss" in entry}
    for entry in logged:
        for name in ("entropy", "mean_token_accuracy"):
            assert entry[name] == pytest.approx(first[entry["step"]][name], abs=2e-3), name
