"""TRL's trainers with this package's head and losses: the losses, gradients and logs of TRL's own."""

from __future__ import annotations

import copy

import pytest
import torch

from bigkernels import losses

trl = pytest.importorskip("trl", minversion="1.16")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")

from integrations import trained  # noqa: E402

from bigkernels.integrations.transformers import TrainerCallback  # noqa: E402
from bigkernels.integrations.trl import _head, fuse  # noqa: E402
from bigkernels.integrations.trl import _losses as in_trainers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
UNLIKE = ("time", "runtime", "per_second", "peak_memory_gib", "total_flos")


def pairs():
    made = {"prompt": [], "chosen": [], "rejected": []}
    for i in range(8):
        made["prompt"].append(trained.text(i, 3 + i % 2))
        made["chosen"].append(" " + trained.text(i + 4, 2 + i % 4))
        made["rejected"].append(" " + trained.text(3 * i + 1, 3))
    return datasets.Dataset.from_dict(made)


def unpaired():
    made = {"prompt": [], "completion": [], "label": []}
    for i in range(8):
        made["prompt"].append(trained.text(i, 3))
        made["completion"].append(" " + trained.text(i + 4, 2 + i % 4))
        made["label"].append(i % 3 != 0)
    return datasets.Dataset.from_dict(made)


def _reward(completions, **_):
    return [float(len(set(c.split()))) + 0.1 * i for i, c in enumerate(completions)]


def make(kind, folder, model=None, adapters=False, **options):
    """A trainer; the same one each time."""
    torch.manual_seed(3)
    if model is None:
        model = trained.llama()
        torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    if kind == "GRPO" and not adapters:  # its trainer reads the reference from there
        model.save_pretrained(folder / "model")
        model.config._name_or_path = str(folder / "model")
    reference = None if adapters else copy.deepcopy(model)
    if reference is not None:
        torch.nn.init.normal_(model.model.norm.weight, 1, 0.1)
    common = {"train_dataset": unpaired() if kind == "KTO" else pairs(), "processing_class": trained.tokenizer()}
    if "eval_steps" in options:
        common["eval_dataset"] = pairs()
    if adapters:
        common["peft_config"] = peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    options = {"optim": "adamw_torch", "max_steps": 3, "seed": 5, "per_device_train_batch_size": 4} | options
    if kind in ("CPO", "ORPO"):
        module = pytest.importorskip(f"trl.experimental.{kind.lower()}")
        args = getattr(module, f"{kind}Config")(**_arguments(folder, max_length=32, **options))
        return getattr(module, f"{kind}Trainer")(model, args=args, **common)
    if kind == "GRPO":
        common["train_dataset"] = datasets.Dataset.from_dict({"prompt": [trained.text(i, 3) for i in range(8)]})
        common["reward_funcs"] = _reward
        options = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1} | options
        return trl.GRPOTrainer(model, args=trl.GRPOConfig(**_arguments(folder, **options)), **common)
    args = getattr(trl, f"{kind}Config")(**_arguments(folder, max_length=32, **options))
    return getattr(trl, f"{kind}Trainer")(model, reference, args=args, **common)


def _arguments(folder, **options):
    usual = {
        "output_dir": str(folder),
        "learning_rate": 0.01,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "bf16": False,
    }
    return usual | options


def found(trainer, inputs=None):
    """(loss, gradients, metrics) of one batch."""
    trainer.model.zero_grad()
    if inputs is None:
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    logged = getattr(trainer, "_metrics", None) or trainer._stored_metrics
    logged = {key: value[-1] for key, value in logged["train"].items() if key != "num_tokens"}
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, logged


def same(theirs, ours, close=2e-5):
    torch.testing.assert_close(ours[0], theirs[0], rtol=close, atol=close)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    scale = max(g.norm() for g in theirs[1].values())
    for name, g in theirs[1].items():
        assert (ours[1][name] - g).norm() <= 1e-4 * g.norm() + 1e-5 * scale, name
    assert ours[2].keys() == theirs[2].keys()
    for name, value in theirs[2].items():
        assert ours[2][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def same_history(theirs, ours):
    """What two trainers logged, but for times and memory."""
    assert len(theirs) == len(ours) > 3
    for expected, got in zip(theirs, ours, strict=True):
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            if isinstance(value, float) and not name.endswith(UNLIKE):
                assert got[name] == pytest.approx(value, rel=3e-3, abs=3e-4), (expected["step"], name)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("DPO", {}),
        ("DPO", {"adapters": True}),
        ("DPO", {"precompute_ref_log_probs": True}),
        ("DPO", {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}),
        ("KTO", {}),
        ("KTO", {"adapters": True, "loss_type": "apo_zero_unpaired"}),
        ("KTO", {"precompute_ref_log_probs": True}),
        ("GRPO", {"num_iterations": 2}),
        ("GRPO", {"adapters": True, "loss_type": "dapo"}),
        ("CPO", {}),
        ("CPO", {"adapters": True, "loss_type": "simpo"}),
        ("ORPO", {}),
    ],
    ids=str,
)
def test_training_is_the_same(kind, options, tmp_path):
    histories = []
    for ours in (False, True):
        trainer = make(kind, tmp_path, **options)
        if ours:
            done = fuse(trainer)
            assert done.loss == f"{kind.lower()}_loss"
            assert done.heads == (1 if options.get("adapters") or kind in ("CPO", "ORPO") else 2)
        trainer.train()
        histories.append(trainer.state.log_history)
    same_history(*histories)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    trainer = make("DPO", tmp_path_factory.mktemp("dpo"), use_weighting=True)
    trainer.use_weighting = False
    return trainer


NAMES = [name for name in losses._pairs.LOSSES]


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_types": [name]} for name in NAMES),
        {"loss_types": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.8, 0.2, 1.5]},
        {"ld_alpha": 0.4},
        {"use_weighting": True},
        {"use_weighting": True, "loss_types": ["ipo"], "ld_alpha": 0.0},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence", "loss_types": ["hinge"]},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"beta": 0.5},
    ],
    ids=str,
)
def test_dpo_options(dpo, options, monkeypatch):
    options = {"loss_types": ["sigmoid"]} | options
    options = {"loss_weights": [1.0] * len(options["loss_types"])} | options
    if set(options["loss_types"]) & set(in_trainers._SMOOTHED):
        options["label_smoothing"] = 0.2
    for name, value in options.items():
        monkeypatch.setattr(dpo, name, value)
    dpo.__dict__.pop("_compute_loss", None)
    theirs = found(dpo)
    assert fuse(dpo).loss == "dpo_loss"
    same(theirs, found(dpo))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_options(loss_type, tmp_path):
    trainer = make("KTO", tmp_path, loss_type=loss_type, desirable_weight=1.3, undesirable_weight=0.7, beta=0.3)
    theirs = found(trainer)
    fuse(trainer)
    same(theirs, found(trainer))


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    trainer = make("GRPO", tmp_path_factory.mktemp("grpo"), loss_type="grpo")
    trainer.current_gradient_accumulation_steps = 2
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs["completion_mask"][1, 3:] = 0
    inputs["advantages"] = torch.tensor([1.0, -0.5, 0.7, -1.2])
    now = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        inputs["completion_ids"].shape[1],
    )[0].detach()
    inputs["old_per_token_logps"] = now + 0.3 * torch.randn_like(now)
    inputs["sampling_per_token_logps"] = now + 0.5 * torch.randn_like(now)
    return trainer, inputs


CLIPPED = [name for name, row in losses._policy.LOSSES.items() if row.losses is losses._policy._clip]


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": name} for name in losses._policy.LOSSES if name != "luspo"),
        {"importance_sampling_level": "sequence"},
        {"importance_sampling_level": "sequence", "loss_type": "luspo"},
        {"top_entropy_quantile": 0.5, "loss_type": "vespo"},
        {"off_policy_mask_threshold": 0.05, "loss_type": "sapo"},
        {"use_vllm": True, "loss_type": "dapo"},
        {"use_vllm": True, "sequence": True, "loss_type": "vespo"},
        {"entropy_coef": 0.3, "_entropy_bonus_enabled": True, "top_entropy_quantile": 0.6},
        {"entropy_coef": 0.3, "_entropy_bonus_enabled": True, "use_adaptive_entropy": True, "_last_world_entropy": 0.1},
        {"beta": 0.0, "args.delta": 1.05},
        {"args.use_bias_correction_kl": True, "loss_type": "bnpo"},
    ],
    ids=str,
)
def test_grpo_options(grpo, options, monkeypatch):
    trainer, inputs = grpo
    inputs, options = dict(inputs), dict(options)
    if options.get("use_vllm"):
        ratio = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]).exp().clamp(max=1.2)
        inputs["importance_sampling_ratio"] = ratio[:, :1] if options.pop("sequence", False) else ratio
    if options.get("loss_type") == "cispo":
        options["epsilon_high"] = 1.1
    if options.get("use_adaptive_entropy"):
        options["args.entropy_target"] = 0.5
    for name, value in options.items():
        on = trainer.args if name.startswith("args.") else trainer
        monkeypatch.setattr(on, name.removeprefix("args."), value)
    trainer.__dict__.pop("_compute_loss", None)
    kept = trainer.entropy_coef
    theirs = found(trainer, inputs)
    trainer.entropy_coef = kept
    if "_last_world_entropy" in options:
        trainer._last_world_entropy = options["_last_world_entropy"]
    assert fuse(trainer).loss == "grpo_loss"
    same(theirs, found(trainer, inputs))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.2},
        {"label_smoothing": 0.2, "cpo_alpha": 0.5},
        {"loss_type": "alphapo", "alpha": 0.3},
    ],
    ids=str,
)
def test_cpo_options(options, tmp_path):
    trainer = make("CPO", tmp_path, **options)
    theirs = found(trainer)
    fuse(trainer)
    same(theirs, found(trainer))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_orpo_makes_no_logits(softcap, tmp_path):
    model = None
    if softcap is not None:
        sizes = trained.SIZES | {"head_dim": 16, "final_logit_softcapping": softcap, "pad_token_id": 0}
        torch.manual_seed(0)
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, attn_implementation="eager"))
    trainer = make("ORPO", tmp_path, model)
    theirs = found(trainer)
    fuse(trainer)
    trainer.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the output layer was called"))
    same(theirs, found(trainer))


def test_a_quantized_model_and_adapters(tmp_path):
    import bigkernels

    model = trained.llama()
    bigkernels.quantize(model, "nf4", skip=())
    results = []
    for ours in (False, True):
        trainer = make("CPO", tmp_path, copy.deepcopy(model), adapters=True)
        if ours:
            fuse(trainer)
        results.append(found(trainer))
    same(*results, close=1e-4)


def test_shift_and_smoothing_that_trl_has_not(tmp_path):
    trainer = make("DPO", tmp_path, loss_type=["bco_pair"], beta=0.5)
    shift = losses.RewardShift()
    assert fuse(trainer, bco_shift=shift).loss == "dpo_loss"
    loss, _, logged = found(trainer)
    rewards = logged["rewards/chosen"], logged["rewards/rejected"]
    assert float(shift.value) == pytest.approx(sum(rewards) / 2, rel=1e-5)
    trainer.__dict__.pop("_compute_loss")
    assert abs(float(found(trainer)[0] - loss)) > 1e-3
    trainer.loss_types = ["sigmoid"]
    plain = found(trainer)[0]
    fuse(trainer, label_smoothing=0.25)
    smoothed = found(trainer)[0]
    trainer.beta = -trainer.beta
    trainer.__dict__.pop("_compute_loss")
    torch.testing.assert_close(smoothed, 0.75 * plain + 0.25 * found(trainer)[0])


class Own(trl.DPOTrainer):
    def _compute_loss(self, model, inputs, return_outputs):
        return super()._compute_loss(model, inputs, return_outputs)


def test_refused(dpo, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="expected a trainer of TRL"):
        fuse(trained.llama())
    monkeypatch.setattr(dpo, "__class__", Own)
    with pytest.raises(ValueError, match="Own has its own _compute_loss; give loss=False"):
        fuse(dpo)
    dpo.__dict__.pop("_compute_loss", None)
    assert fuse(dpo, loss=False) == (2, None)
    monkeypatch.undo()
    for options, message in (
        ({"bco_shift": 0.3}, "no loss_type is 'bco_pair'"),
        ({"loss": False, "label_smoothing": 0.1}, "label_smoothing is given, which means nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse(dpo, **options)
    monkeypatch.setattr(dpo, "label_smoothing", 0.1)
    with pytest.raises(ValueError, match="label_smoothing is 0.1, which TRL ignores where loss_type is"):
        fuse(dpo)
    monkeypatch.setattr(dpo, "label_smoothing", 0.0)
    monkeypatch.setattr(dpo, "f_divergence_type", "forward_kl")
    monkeypatch.setattr(dpo, "loss_types", ["nca_pair"])
    with pytest.raises(ValueError, match="f_divergence_type"):
        fuse(dpo)
    monkeypatch.undo()
    fuse(dpo)
    dpo.beta = 0.2  # an argument that has changed behind its back
    with pytest.raises(RuntimeError, match="beta of the trainer changed after fuse"):
        found(dpo)
    dpo.model.train()
    dpo.beta = 0.1


def test_an_adapter_on_the_output_layer_is_refused(tmp_path):
    model = peft.get_peft_model(trained.llama(), peft.LoraConfig(target_modules=["lm_head", "q_proj"]))
    trl.trainer.utils.add_fused_lm_head(model.get_base_model())
    with pytest.raises(ValueError, match="the output layer has an adapter"):
        _head.use_head(model)


def test_with_the_callback(tmp_path):
    model = trained.llama()
    args = trl.DPOConfig(**_arguments(tmp_path, max_length=32, max_steps=2))
    callback = TrainerCallback(optim="bigkernels_adamw")
    trainer = trl.DPOTrainer(
        model,
        trained.llama(),
        args=args,
        train_dataset=pairs(),
        processing_class=trained.tokenizer(),
        callbacks=[callback],
    )
    assert fuse(trainer) == fuse(trainer) == (2, "dpo_loss")
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(entry["tokens_per_second"] > 0 for entry in logged)


@pytest.mark.parametrize("kind", ["SFT", "RLOO"])
def test_trainers_that_keep_their_loss(kind, tmp_path):
    common = {"processing_class": trained.tokenizer()}
    if kind == "SFT":
        data = datasets.Dataset.from_dict({"text": [trained.text(i) for i in range(4)]})
        trainer = trl.SFTTrainer(trained.llama(), trl.SFTConfig(**_arguments(tmp_path)), train_dataset=data, **common)
    else:
        data = datasets.Dataset.from_dict({"prompt": [trained.text(i, 3) for i in range(4)]})
        args = trl.RLOOConfig(**_arguments(tmp_path, per_device_train_batch_size=4, num_generations=2))
        model = trained.llama()
        model.save_pretrained(tmp_path / "model")
        model.config._name_or_path = str(tmp_path / "model")
        trainer = trl.RLOOTrainer(model, _reward, args=args, train_dataset=data, **common)
    assert fuse(trainer).loss is None and "_compute_loss" not in trainer.__dict__
    assert trainer.model.forward.__func__.__globals__[_head._THEIRS] is _head._Head


def test_compiled_models(tmp_path):
    """Compiled code is kept by the code of a function, of which the model, its reference and TRL have one each."""
    histories = []
    for compiled in (False, True):
        torch._dynamo.reset()
        options = {"torch_compile_backend": "eager"} if compiled else {}
        trainer = make("KTO", tmp_path, max_steps=1, torch_compile=compiled, **options)
        assert fuse(trainer).heads == 2
        trainer.train()
        histories.append(trainer.state.log_history)
    torch._dynamo.reset()
    for plain, compiled in zip(*histories, strict=True):
        for name in {"loss", "grad_norm"} & plain.keys():
            assert compiled[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-4), (plain["step"], name)
