"""Convolutions with the BatchNorm behind them, in inference."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bigkernels
from bigkernels.nn import _conv
from bigkernels.nn.linear import may_pay

pytestmark = [
    pytest.mark.skipif(not may_pay(), reason="the rule is for levels from AVX2 on"),
    pytest.mark.skipif(_conv.unavailable() is not None, reason="oneDNN's packed convolutions are not there"),
]
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16)
FOLDED: list[nn.Module] = []


def norm(channels: int = 6) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    with torch.no_grad():
        made.weight.uniform_(0.5, 1.5)
        made.bias.normal_()
        made.running_mean.normal_()
        made.running_var.uniform_(0.5, 2)
    return made


class Statements(nn.Module):
    def __init__(self, bias: bool = False):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(6, 6, 3, padding=1, bias=bias), norm(), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv(x)
        out = self.bn(out)
        out = self.relu(out)
        return out + x


class Nested(Statements):
    def forward(self, x):
        return F.silu(self.bn(self.conv(x))) + x


class Alone(Statements):
    def forward(self, x):
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)


class Both(Statements):
    def forward(self, x):
        out = self.conv(x)
        out = self.relu(self.bn(out))
        return out + x


class ReadTwice(Statements):
    """The norm's result goes into an activation and elsewhere."""

    def forward(self, x):
        out = self.bn(self.conv(x))
        return self.relu(out + 1) + out


class ThenAnother(Statements):
    def forward(self, x):
        out = self.conv(x)
        out = self.bn(out)
        return F.relu(out) + out


class KeepsTheInner(Statements):
    """The convolution's result is read by somebody else: nothing to fold."""

    def forward(self, x):
        inner = self.conv(x)
        out = self.bn(inner)
        return out + inner


def sequence(bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=bias), norm(), nn.Conv2d(6, 6, 1), norm(), nn.ReLU())


MODELS = {
    "statements": (Statements, 1),
    "nested": (Nested, 1),
    "alone": (Alone, 1),
    "both": (Both, 1),
    "read twice": (ReadTwice, 1),
    "then another": (ThenAnother, 1),
    "keeps the inner": (KeepsTheInner, 0),
    "sequence": (sequence, 2),
}


@pytest.fixture
def folds(monkeypatch) -> list[nn.Module]:
    """The convolutions that a norm was folded into, a call an entry."""
    made = FOLDED
    own = _conv.folded_conv2d

    def count(module, *args):
        y = own(module, *args)
        if y is not None:
            made.append(module)
        return y

    from bigkernels.patch.rules import conv_norm

    monkeypatch.setattr(conv_norm, "folded_conv2d", count)
    return made


def image(dtype=torch.float32, layout=torch.channels_last, count: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 6, 9, 7, generator=g).to(dtype).contiguous(memory_format=layout)


def pair(build, dtype=torch.float32, layout=torch.channels_last, **options):
    torch.manual_seed(0)
    theirs = build(**options).to(dtype).to(memory_format=layout).eval()
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours)
    assert bigkernels.pack(ours)
    FOLDED.clear()  # of the check
    return ours, theirs


def same(ours, theirs, x) -> None:
    """By distance to float64: at most twice as far as the model itself."""
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(x.double())
        found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    eps = torch.finfo(x.dtype).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= 2 * (expected.double() - exact).abs().max() + eps


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(folds, name, dtype, layout, bias):
    build, count = MODELS[name]
    ours, theirs = pair(build, dtype, layout, bias=bias)
    for x in (image(dtype, layout), image(dtype, layout, 3)):
        same(ours, theirs, x)
    assert len(folds) == 2 * count
    with torch.no_grad():  # what was made once is read again, and nothing is left on results
        assert torch.equal(ours(x), ours(x)) and not hasattr(ours(x), "_bigkernels_normed")
    bigkernels.unpatch(ours)
    folds.clear()
    same(ours, theirs, x)
    assert not folds


def test_the_report():
    report = bigkernels.patch(Statements())
    assert "conv2d + batch_norm (packed)" in [row.what for row in report.inference]
    alone = bigkernels.patch(nn.Sequential(nn.Conv2d(6, 6, 1), norm()))
    assert [row.what for row in alone.inference if not row.path] == ["conv2d + batch_norm (packed)"]
    assert not any("conv2d" in row.what for row in bigkernels.patch(KeepsTheInner()).patched)


EDITS = {
    "weight": lambda m: m.conv.weight.mul_(2),
    "bias": lambda m: m.conv.bias.add_(1),
    "scale": lambda m: m.bn.weight.mul_(-1),
    "shift": lambda m: m.bn.bias.add_(2),
    "mean": lambda m: m.bn.running_mean.add_(1),
    "variance": lambda m: m.bn.running_var.mul_(3),
    "eps": lambda m: setattr(m.bn, "eps", 0.5),
    "stride and padding": lambda m: (setattr(m.conv, "padding", (2, 2)), setattr(m.conv, "dilation", (2, 2))),
    "loaded": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "data": lambda m: setattr(m.bn, "running_mean", m.bn.running_mean + 3),
    "no scale": lambda m: (setattr(m.bn, "weight", None), setattr(m.bn, "bias", None)),
    "trained": lambda m: m.train(),
    "statistics of the batch": lambda m: setattr(m.bn, "training", True),
    "a hook on the convolution": lambda m: m.conv.register_forward_hook(lambda module, args, out: out * 2) and None,
    "a hook on the norm": lambda m: m.bn.register_forward_pre_hook(lambda module, args: (args[0] * 2,)) and None,
    "another norm": lambda m: setattr(m, "bn", nn.InstanceNorm2d(6)),
    "another convolution": lambda m: setattr(m, "conv", nn.Conv2d(6, 6, 1)),
    "a forward of its own": lambda m: setattr(m.bn, "forward", lambda x: x + 1),
    "in double": lambda m: m.double(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_are_followed(folds, edit):
    ours, theirs = pair(Statements, bias=True)
    same(ours, theirs, image())
    assert folds
    for model in (ours, theirs):
        torch.manual_seed(7)
        with torch.no_grad():
            edit(model)
    x = image().to(next(ours.parameters()).dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_training_is_the_modules(folds):
    ours, theirs = pair(Statements)
    x = image()
    for model in (ours, theirs):
        model.train()
        model(x).square().sum().backward()
    assert not folds
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    ours.eval(), theirs.eval()
    same(ours, theirs, x)


def test_gradients_of_the_input_alone(folds):
    ours, theirs = pair(Statements)
    grads = []
    for model in (ours.requires_grad_(False), theirs.requires_grad_(False)):
        x = image().requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert not folds


def test_copies_and_pickles(folds):
    ours, theirs = pair(Statements)
    same(ours, theirs, image())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        folds.clear()
        same(other, theirs, image())
        assert not folds  # not declared


def test_transforms_and_autocast(folds):
    ours, theirs = pair(Statements)
    x = image()
    with torch.no_grad():
        found = torch.vmap(ours)(x[:, None]), torch.func.jvp(ours, (x,), (x,))[1]
        expected = torch.vmap(theirs)(x[:, None]), torch.func.jvp(theirs, (x,), (x,))[1]
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(ours(x), theirs(x), rtol=0.05, atol=0.05)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [Statements, Nested, sequence])
def test_compiled_in_one_graph(folds, build):
    """Declared and not; a compiler packs by itself."""
    ours, theirs = pair(build)
    patched = copy.deepcopy(theirs)
    bigkernels.patch(patched)
    with torch.no_grad():
        for model in (ours, patched):
            found = torch.compile(model, fullgraph=True, backend="aot_eager")(image())
            torch.testing.assert_close(found, theirs(image()), rtol=1e-4, atol=1e-4)


def test_of_the_wrong_size():
    ours, _ = pair(Statements)
    with torch.no_grad():
        for wrong in (image()[:, :3], image().double(), image()[0, 0]):
            with pytest.raises(RuntimeError):
                ours(wrong)
        assert ours(image()[:0]).shape == (0, 6, 9, 7)
