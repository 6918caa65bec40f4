"""Training steps whose loss needs no logits: what is fused, what is left alone, and what users see of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels.bench.memory import extra_peak
from bigkernels.patch._logits import Logits

transformers = pytest.importorskip("transformers")
KERNEL = "linear_cross_entropy"
DECODER = dict(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "gemma2 (softcap)": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
    ),
    "cohere (scale)": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.37}),
    "granite (scaling)": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 4.0}),
    "phi (bias)": ("PhiForCausalLM", "PhiConfig", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "recurrent_gemma (cap in one line)": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {"logits_soft_cap": 0.7, "lru_width": 64, "num_hidden_layers": 3},
    ),
    "bart (a loss of its own)": (
        "BartForCausalLM",
        "BartConfig",
        {
            "d_model": 64,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "dropout": 0.0,
            "decoder_ffn_dim": 96,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        },
    ),
    "gpt2 (tied)": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 64,
            "n_layer": 1,
            "n_head": 4,
            "n_positions": 64,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
    ),
}


def build(name: str, **options) -> nn.Module:
    model, config, own = MODELS[name]
    torch.manual_seed(0)
    common = {"vocab_size": 199} if "gpt2" in name or "bart" in name else DECODER
    model = getattr(transformers, model)(getattr(transformers, config)(**common | own | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.train()


def batch(**more):
    ids = torch.randint(3, 199, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 3] = labels[1, :2] = -100
    return {"input_ids": ids, "labels": labels} | more


def step(model, inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs, rtol=2e-5):
    (out, found), (expected, grads) = ours, theirs
    assert out.loss.dtype == expected.loss.dtype and out.loss.item() == pytest.approx(expected.loss.item(), rel=rtol)
    assert found.keys() == grads.keys()
    largest = max(g.abs().max() for g in grads.values())
    for name, g in grads.items():
        assert (found[name] - g).abs().max() <= rtol * max(g.abs().max(), 1e-3 * largest), name


def kernels(report):
    return [row.what for row in report.patched]


def lazy(out) -> bool:
    return isinstance(out.logits, Logits) and out.logits.made is None


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_same_without_logits(name):
    model = build(name)
    before = step(model, batch())
    report = bigkernels.patch(model)
    assert kernels(report).count(KERNEL) == 1
    after = step(model, batch())
    assert lazy(after[0]) and after[0].logits.shape == before[0].logits.shape
    same(after, before)
    assert after[0].logits.dtype == before[0].logits.dtype
    torch.testing.assert_close(after[0].logits.detach(), before[0].logits, rtol=0, atol=2e-6)
    bigkernels.unpatch(model)
    assert type(model(**batch()).logits) is torch.Tensor


@pytest.mark.parametrize("name", ["llama", "gemma2 (softcap)", "phi (bias)"])
def test_in_16_bits_the_loss_is_more_exact(name):
    model = build(name)
    exact = step(copy.deepcopy(model).double(), batch())
    model.bfloat16()
    before = step(model, batch())
    bigkernels.patch(model)
    after = step(model, batch())
    assert lazy(after[0]) and after[0].loss.dtype == before[0].loss.dtype
    for n, e in exact[1].items():
        mine, theirs = ((g[1][n].double() - e).square().mean().sqrt() for g in (after, before))
        assert mine <= 1.5 * theirs + 2**-8 * e.square().mean().sqrt(), n


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(weights):
    model = build("llama").to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(**batch())
    bigkernels.patch(model, attention=False, norm=False, rope=False, mlp=False)
    with torch.autocast("cpu", torch.bfloat16):
        after = model(**batch())
    assert lazy(after) and after.logits.dtype == before.logits.dtype == torch.bfloat16
    assert after.loss.dtype == before.loss.dtype and after.loss.item() == pytest.approx(before.loss.item(), rel=1e-3)
    assert torch.equal(after.logits, before.logits)  # as in the forward, though it is over


@pytest.mark.parametrize("where", ["eval", "no_grad", "no labels"])
def test_logits_are_there_where_they_are_read(where):
    model = build("gemma2 (softcap)")
    model.train(where != "eval")
    inputs = batch()
    if where == "no labels":
        del inputs["labels"]
    with torch.set_grad_enabled(where != "no_grad"):
        before = model(**inputs)
        bigkernels.patch(model, attention=False, norm=False, rope=False, mlp=False)
        after = model(**inputs)
    assert torch.equal(after.logits, before.logits)
    if where != "no labels":
        torch.testing.assert_close(after.loss, before.loss)


@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": 31},
        {"num_items_in_batch": torch.tensor(31)},
        {"ignore_index": 5},
        {"logits_to_keep": 12},
        {"shift_labels": batch()["labels"].roll(-1, 1)},
        {"shift_labels": batch()["labels"].roll(-1, 1), "num_items_in_batch": torch.tensor(7)},
    ],
    ids=lambda m: "+".join(m),
)
def test_loss_arguments(more):
    model, inputs = build("llama"), batch(**more)
    if "ignore_index" in more:
        inputs["labels"] = inputs["labels"].clamp_min(0)
    before = step(model, inputs)
    bigkernels.patch(model)
    after = step(model, inputs)
    assert lazy(after[0])
    same(after, before)


def test_gradient_accumulation():
    """Two halves, over the number of tokens of both, add up to the whole."""
    model = build("llama")
    inputs = batch()
    count = (inputs["labels"][:, 1:] != -100).sum()
    whole = step(model, inputs)[1]
    bigkernels.patch(model)
    model.zero_grad()
    for half in range(2):
        part = {k: v[half : half + 1] for k, v in inputs.items()}
        model(**part, num_items_in_batch=count).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_logits_can_be_used_like_a_tensor():
    model = build("gemma2 (softcap)")
    before = model(**batch()).logits
    bigkernels.patch(model, attention=False, norm=False, rope=False, mlp=False)

    def fresh():
        return model(**batch()).logits

    assert "not computed" in repr(fresh()) and fresh().dim() == 3 and fresh().size(-1) == 199 and len(fresh()) == 2
    for use in (
        lambda z: z.argmax(-1),
        lambda z: torch.softmax(z, -1),
        lambda z: z[..., :-1, :],
        lambda z: z + 1,
        lambda z: 1 - z,
        lambda z: -z,
        lambda z: z > 0,
        lambda z: z.view(-1, 199) * 2.0,
        lambda z: z.float(),
        lambda z: torch.cat([z, z]),
        lambda z: z / torch.tensor(2.0),
        lambda z: z @ torch.ones(199, 1),
        lambda z: z.tanh(),
        lambda z: 2 * z / 3,
        lambda z: nn.functional.cross_entropy(z[0], torch.arange(12)),
        lambda z: torch.stack(list(z)),
        lambda z: z.reshape(24, 199).cpu(),
        copy.copy,
    ):
        assert torch.equal(use(fresh()), use(before))
    assert torch.equal(pickle.loads(pickle.dumps(fresh().detach())), before.detach())


def test_logits_after_the_weights_changed_are_an_error():
    model = build("llama")
    bigkernels.patch(model)
    out = model(**batch())
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match=r"read `logits` before they change"):
        out.logits.argmax(-1)


@pytest.mark.filterwarnings("ignore:bigkernels.unpatch")
@pytest.mark.parametrize("before", [False, True], ids=["after patch", "before patch"])
@pytest.mark.parametrize("how", ["hook", "subclass", "forward", "lora", "loss", "dtype"])
def test_heads_and_losses_that_are_not_plain(how, before):
    """Whatever was done to the head is done, patched before or after."""
    model, seen = build("llama"), []
    if not before:
        bigkernels.patch(model)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class LoRA(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(64, 2, False), nn.Linear(2, 199, False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    if how == "hook":
        model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out) or 2 * out)
    elif how == "subclass":
        model.lm_head.__class__ = Doubled
    elif how == "forward":
        head = model.lm_head
        head.forward = lambda x: 2 * nn.Linear.forward(head, x)
    elif how == "lora":
        model.lm_head = LoRA(model.lm_head)
    elif how == "loss":
        model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().square().mean()
    else:
        model.lm_head.double()
        model.lm_head.register_forward_pre_hook(lambda m, args: (args[0].double(),))
    if before:
        bigkernels.patch(model)
    after = step(model, batch())
    bigkernels.unpatch(model)
    if how == "loss" and not before:
        model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().square().mean()
    same(after, step(model, batch()))
    assert how == "loss" or type(after[0].logits) is torch.Tensor
    assert how != "hook" or seen


@pytest.mark.parametrize("first", ["patch", "peft"])
def test_lora_on_the_head(first):
    peft = pytest.importorskip("peft")
    model = build("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.0, init_lora_weights=False)
    if first == "patch":
        assert KERNEL in kernels(bigkernels.patch(model))
    model = peft.get_peft_model(model, config).train()
    if first == "peft":
        report = bigkernels.patch(model)
        assert KERNEL not in kernels(report)
        assert any("the logits come from lm_head, a peft." in row.what for row in report.skipped)
    after = step(model, batch())
    assert any("lm_head.lora_A" in name for name in after[1])
    bigkernels.unpatch(model)
    same(after, step(model, batch()))


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_a_quantized_head(name):
    model = build("llama")
    model.lm_head = bigkernels.nn.QuantizedLinear.from_linear(model.lm_head, name)
    model.lm_head.train()
    before = step(model, batch())
    assert KERNEL in kernels(bigkernels.patch(model))
    after = step(model, batch())
    assert lazy(after[0])
    same(after, before, 1e-4)


def test_a_frozen_body_and_a_frozen_head():
    for frozen in ("model", "lm_head"):
        model = build("llama")
        getattr(model, frozen).requires_grad_(False)
        before = step(model, batch())
        bigkernels.patch(model)
        after = step(model, batch())
        assert lazy(after[0])
        same(after, before)


class Tiny(nn.Module):
    """A model like those of Hugging Face; the classes below differ from it between the head and the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.lm_head, self.scale = nn.Embedding(50, 16), nn.Linear(16, 50), 0.5

    def forward(self, input_ids, labels=None):
        hidden_states = self.embedding(input_ids)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.view(-1, 50), labels.view(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Scaled(Tiny):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.embedding(input_ids)).float() / 3
        logits = 5.0 * torch.tanh(logits * self.scale)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.view(-1, 50), labels.view(-1), reduction="sum")
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class ZLoss(Tiny):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.embedding(input_ids))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.view(-1, 50), labels.view(-1))
            loss = loss + 0.1 * logits.logsumexp(-1).square().mean()
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Shifted(Tiny):
    """Adds to the logits, which no cross entropy of ours does."""

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.embedding(input_ids))
        logits = logits + torch.arange(50) / 50
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.view(-1, 50), labels.view(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class WrittenTo(Tiny):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.embedding(input_ids))
        logits[..., 7] = -1e4
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.view(-1, 50), labels.view(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class OtherLoss(Tiny):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.embedding(input_ids))
        loss = None
        if labels is not None:
            loss = nn.functional.multi_margin_loss(logits.view(-1, 50), labels.view(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize(
    "cls, reason",
    [
        (Tiny, None),
        (Scaled, None),
        *((c, "used for more than the loss") for c in (ZLoss, Shifted, WrittenTo, OtherLoss)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_between_the_head_and_the_loss(cls, reason):
    model = cls().train()
    inputs = {"input_ids": torch.arange(12).view(2, 6) + 10, "labels": torch.arange(12).view(2, 6) * 3 + 9}
    before = step(model, inputs)
    report = bigkernels.patch(model)
    assert (KERNEL in kernels(report)) == (reason is None)
    assert reason is None or any(reason in row.what for row in report.skipped)
    after = step(model, inputs)
    assert lazy(after[0]) == (reason is None)
    same(after, before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(how):
    model = build("llama")
    before = step(model, batch())
    bigkernels.patch(model)
    twin = how(model)
    after = step(twin, batch())
    assert lazy(after[0]) and after[0].logits.note.weight.data_ptr() == twin.lm_head.weight.data_ptr()
    same(after, before)


def test_flag_and_compiler():
    model = build("llama")
    assert KERNEL not in kernels(bigkernels.patch(model, loss=False))
    assert type(model(**batch()).logits) is torch.Tensor
    bigkernels.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert type(compiled(**batch(), use_cache=False).logits) is torch.Tensor  # traced as the model has it


def test_memory_of_a_step():
    """A training step needs less by more than the logits are large."""
    config = dict(vocab_size=8000, tie_word_embeddings=True)
    inputs = {"input_ids": torch.randint(3, 8000, (4, 256))}
    inputs["labels"] = inputs["input_ids"]
    model = build("llama", **config, max_position_embeddings=512)
    logits = 4 * 256 * 8000 * 4

    def used():
        model.zero_grad()
        return extra_peak(lambda: model(**inputs).loss.backward(), "cpu")

    bigkernels.patch(model, loss=False)
    before = used()
    bigkernels.patch(model)
    assert used() < before - 0.9 * 2 * logits  # they and their gradient
