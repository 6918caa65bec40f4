"""MLPs without a gate: found in models, right in training and inference, handed back where anything lies between."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bigkernels
from bigkernels.nn.linear import may_pay
from bigkernels.ops import mlp as op

pytestmark = pytest.mark.skipif(not may_pay(), reason="the linear kernels are not known to pay at this level")
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
TEXT = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
FAMILIES = {
    "Bert": ("BertModel", "BertConfig", TEXT, {"input_ids": IDS}, "linear + gelu"),
    "GPT-2": (
        "GPT2Model",
        "GPT2Config",
        dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
        {"input_ids": IDS},
        "linear + gelu_tanh",
    ),
    "ViT": ("ViTModel", "ViTConfig", VISION, {"pixel_values": IMAGES}, "linear + gelu"),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", VISION, {"pixel_values": IMAGES}, "linear + quick_gelu"),
    "T5": (
        "T5EncoderModel",
        "T5Config",
        dict(vocab_size=99, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4),
        {"input_ids": IDS},
        "linear + relu",
    ),
}


class Block(nn.Module):
    def __init__(self, act=None, p: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.act = nn.Linear(16, 48), nn.Linear(48, 16), act or nn.GELU()
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        h = self.fc1(x)
        h = self.act(h)
        return self.fc2(self.dropout(h))


class Nested(Block):
    def forward(self, x):
        return self.fc2(self.dropout(F.gelu(self.fc1(x), approximate="tanh")))


def run(model, **inputs):
    model.zero_grad()
    out = model(**inputs)[0]
    (out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def apart(a, b) -> float:
    scale = max(t.abs().max().item() for t in a[1:])
    grads = [(x - y).abs().max().item() / scale for x, y in zip(a[1:], b[1:], strict=True)]
    return max((a[0] - b[0]).abs().max().item(), *grads)


def what(report) -> list[str]:
    return [row.what for row in report.patched]


@pytest.mark.parametrize("name", FAMILIES)
def test_models(library, name):
    transformers = pytest.importorskip("transformers")
    cls, config, options, inputs, kernel = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    expected = run(model, **inputs)
    report = bigkernels.patch(model, norm=False, attention=False)
    assert what(report).count(kernel) == (0 if name == "GPT-2" else 2)  # its weights would be copied in each call
    assert apart(expected, run(model, **inputs)) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], expected[0], rtol=1e-4, atol=1e-5)
    bigkernels.unpatch(model)
    assert all(map(torch.equal, expected, run(model, **inputs)))


@pytest.fixture
def counted(monkeypatch):
    """How often each half was taken."""
    counts = {"first": 0, "second": 0}
    for name, cls in (("first", op._Hidden), ("second", op._LinearOfHidden)):

        def apply(*args, name=name, cls=cls):
            counts[name] += 1
            return super(cls, cls).apply(*args)

        monkeypatch.setattr(cls, "apply", apply)
    return counts


def patch(model, counts):
    """`bigkernels.patch`, whose probes do not count."""
    bigkernels.patch(model)
    counts.update(first=0, second=0)


@pytest.mark.parametrize("cls", [Block, Nested])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_halves_in_training(library, counted, cls, dtype):
    model, x = cls().to(dtype), torch.randn(5, 7, 16, dtype=dtype)
    expected = [model(x), *torch.autograd.grad(model(x).float().square().sum(), list(model.parameters()))]
    patch(model, counted)
    y = model(x)
    found = [y, *torch.autograd.grad(y.float().square().sum(), list(model.parameters()))]
    assert counted == {"first": 1, "second": 1}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a,
            b,
            rtol=0.05 if dtype == torch.bfloat16 else 1e-4,
            atol=(0.05 if dtype == torch.bfloat16 else 1e-5) * b.abs().max().item(),
        )


def test_dropout_between_is_handed_back(library, counted):
    model, x = Block(p=0.5), torch.randn(50, 16)
    patch(model, counted)
    torch.manual_seed(1)
    found = model(x)
    assert counted == {"first": 1, "second": 0}
    bigkernels.unpatch(model)
    torch.manual_seed(1)
    torch.testing.assert_close(found, model(x))
    model.eval()
    patch(model, counted)
    model(x)
    assert counted == {"first": 1, "second": 1}


def test_hooks_are_called_and_their_results_taken(library, counted):
    model, x = Block(), torch.randn(5, 16)
    patch(model, counted)
    for layer in (model.fc1, model.act):
        handle = layer.register_forward_hook(lambda module, args, out: out * 2)
        y = model(x)
        handle.remove()
        assert counted["first"] == 0
        h = model.fc1(x) * (2 if layer is model.fc1 else 1)
        torch.testing.assert_close(y, model.fc2(model.act(h) * (1 if layer is model.fc1 else 2)))
    handle = model.fc2.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    torch.testing.assert_close(model(x), F.linear(F.gelu(model.fc1(x)) * 2, model.fc2.weight, model.fc2.bias))
    handle.remove()


def test_layers_that_became_others(library):
    model, x = Block(), torch.randn(5, 16)
    bigkernels.patch(model)
    expected = model(x)
    model.fc1 = nn.Sequential(model.fc1)
    model.act = nn.Sequential(nn.GELU())
    torch.testing.assert_close(model(x), expected)
    quantized = Block()
    bigkernels.patch(quantized)
    bigkernels.quantize(quantized, "int8")
    y = quantized(x)
    bigkernels.unpatch(quantized)
    torch.testing.assert_close(y, quantized(x), rtol=1e-4, atol=1e-5)


def test_an_activation_of_another_kind_later(library):
    model, x = Block(), torch.randn(5, 16)
    bigkernels.patch(model)
    model.act = nn.ReLU()
    torch.testing.assert_close(model(x), model.fc2(F.relu(model.fc1(x))))
    model.fc1.weight.data = model.fc1.weight.data.double()
    with pytest.raises(RuntimeError):  # of the layer itself: the dtypes differ
        model(x)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.5 * x)


class Neighbours(nn.Module):
    def forward(self, x):
        return torch.softmax(x, -1)


@pytest.mark.parametrize("act", [Swish, Neighbours, lambda: nn.PReLU(), lambda: nn.Dropout(0.5), nn.Identity])
def test_what_is_none_of_the_activations_is_left_alone(library, act):
    model, x = Block(act()).eval(), torch.randn(5, 16)
    expected = model(x)
    assert not [w for w in what(bigkernels.patch(model)) if w.startswith("linear +")]
    torch.testing.assert_close(model(x), expected)


def test_a_gated_mlp_keeps_its_own_rule(library):
    class Gated(Block):
        def forward(self, x):
            h = self.act(self.fc1(x)) * self.fc1(x)
            return self.fc2(h)

    assert what(bigkernels.patch(Gated())) == ["glu (gelu)"]


def test_copies_pickles_compile_and_checkpointing(library):
    model, x = Block(), torch.randn(5, 16)
    expected = run_block(model, x)
    bigkernels.patch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for a, b in zip(expected, run_block(other, x), strict=True):
            torch.testing.assert_close(a, b)
    for reentrant in (False, True):
        inner = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, inner, use_reentrant=reentrant)
        model.zero_grad()
        y.square().sum().backward()
        torch.testing.assert_close(model.fc2.weight.grad, expected[1])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected[0])


def run_block(model, x):
    y = model(x)
    return [y, torch.autograd.grad(y.square().sum(), model.fc2.weight)[0]]


def test_autocast(library, counted):
    model, x = Block(), torch.randn(30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run_block(model, x)
        patch(model, counted)
        found = run_block(model, x)
    assert counted == {"first": 1, "second": 1}
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02 * b.abs().max().item())
