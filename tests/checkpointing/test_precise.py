"""Gradients in 8 bits where backward divides by what was saved, or compares it: finite and near where eager's are."""

from __future__ import annotations

import pytest
import torch
from segments import gradients, relative
from torch import Tensor, nn
from torch.nn import functional as F

from bigkernels import checkpoint, saved_activations
from bigkernels.checkpointing import _precise, _saver
from bigkernels.memory import peak

N = 64, 128
target = torch.rand(N, generator=torch.Generator().manual_seed(1))

# Functions of values of many magnitudes, N(0, 4).
DIVIDES = {
    "log(sigmoid)": lambda x: -(target * torch.sigmoid(x).log() + (1 - target) * torch.log(1 - torch.sigmoid(x))),
    "entropy": lambda x: -(x.softmax(-1) * x.softmax(-1).log()),
    "gaussian": lambda x: (target - x.tanh()).square() / torch.exp(2 * x) + 2 * x,
    "deviation": lambda x: ((target + x.sin()) / F.softplus(x)).square(),
    "x / exp(x)": lambda x: x.sin() / x.exp(),
    "sqrt": lambda x: torch.sqrt(torch.exp(3 * x)),
    "sqrt of squares": lambda x: torch.sqrt(x * x + 1e-6),
    "rsqrt": lambda x: torch.rsqrt(torch.exp(2 * x)),
    "reciprocal": lambda x: 1 / torch.exp(2 * x),
    "powers": lambda x: x.exp().pow(0.5) + x.exp().pow(-1.5) + x.exp() ** target,
    "exponents": lambda x: (2.0**x) ** 0.3 + target.add(0.1) ** x,
    "logs": lambda x: x.exp().log10() + x.exp().log2() + x.exp().log1p() + (x.square() + 1e-3).log(),
    "prod": lambda x: torch.sigmoid(x.view(-1, 4)).mul(2).prod(-1),
    "cumprod": lambda x: torch.sigmoid(x.view(-1, 4)).mul(2).cumprod(-1),
    "logcumsumexp": lambda x: x.mul(1).logcumsumexp(-1),
    "atan2": lambda x: torch.atan2(x.exp(), x.exp() * 0.5 + x.sin()),
    "hypot": lambda x: torch.hypot(x.sin() * x.exp(), x.cos() * x.exp()),
    "norms": lambda x: (x * x.exp()).view(-1, 2).norm(dim=-1) + (x * x.exp()).view(-1, 2).norm(3, dim=-1),
    "normalize": lambda x: F.normalize((x * x.exp()).view(-1, 2), dim=-1),
    "cosine": lambda x: F.cosine_similarity((x * x.exp()).view(-1, 4), target.view(-1, 4), dim=-1),
    "std": lambda x: (x * x.exp()).view(-1, 4).std(-1),
    "cdist": lambda x: torch.cdist(x.mul(2).view(-1, 4, 4), target.view(-1, 4, 4), p=1.5),
    "acos": lambda x: x.tanh().mul(0.999).acos() + x.tanh().mul(0.999).asin() + x.tanh().mul(0.999).atanh(),
    "acosh": lambda x: torch.acosh(1.001 + x.exp()) + x.asinh() + x.atan(),
    "erfinv": lambda x: x.tanh().mul(0.99).erfinv() + x.erf(),
    "logit": lambda x: x.sigmoid().logit() + torch.special.entr(x.sigmoid()),
    "xlogy": lambda x: torch.xlogy(target, x.exp()) + torch.special.xlog1py(target, x.exp()),
    "gamma": lambda x: x.exp().add(1e-3).lgamma() + x.exp().add(1e-3).digamma().tanh(),
    "sinc": lambda x: x.mul(1).sinc() + x.mul(0.3).tan().tanh(),
    "bce": lambda x: F.binary_cross_entropy(x.mul(0.5).sigmoid(), target, reduction="none"),
    "in place": lambda x: (x.exp() * 2).log_().mul_(3.0),
    "addcdiv": lambda x: torch.addcdiv(x, x.sin(), x.exp()),
    "foreach": lambda x: torch._foreach_div([x.sin()], [x.exp()])[0] + torch._foreach_sqrt([x.exp()])[0],
    "inverse": lambda x: torch.linalg.inv(x.view(-1, 4, 4) * 0.1 + 2 * torch.eye(4)),
    "determinant": lambda x: (x.view(-1, 4, 4) * 0.1 + 2 * torch.eye(4)).logdet(),
    "weight norm": lambda x: torch._weight_norm(x * x.exp(), target[:, :1].add(1)),
}
# Where one of a few neighbouring numbers gets the whole gradient: as eager's, bit for bit.
COMPARES = {
    "amax": lambda x: x.mul(1).view(-1, 4).amax(-1) + x.mul(1).view(-1, 4).amin(-1),
    "max": lambda x: x.mul(1).max() + x.mul(1).min() + x.mul(1).median(),
    "aminmax": lambda x: sum(x.mul(1).view(-1, 4).aminmax(dim=-1)),
    "maximum": lambda x: torch.maximum(x * 1, target * 4) + torch.fmin(x * 1, target),
    "relu": lambda x: torch.relu(x + target) + torch.relu(x * 1e-3) + F.leaky_relu(x * 1, 0.3) + (x * 1).abs(),
    "clamp": lambda x: (x * 1).clamp(-1, 1) + (x * 1).clamp_min(0.5) + F.hardtanh(x * 1) + F.relu6(x * 1),
    "shrink": lambda x: F.hardshrink(x * 1) + F.softshrink(x * 1) + F.threshold(x * 1, 0.3, 0.0),
    "scatter": lambda x: torch.zeros(8).scatter_reduce(0, torch.arange(x.numel()) % 8, x.flatten() * 1, "amax"),
    "max pool": lambda x: F.max_pool2d(x[None, None] * 1, 2),
}
codes = pytest.mark.parametrize("code", ["int8", "fp8"])


def both(fn, code: str, dtype=torch.float32, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Gradients in 8 bits, and as they are."""
    x = (torch.randn(N) * scale).to(dtype).requires_grad_()
    (expected,) = gradients(fn(x), [x])
    assert expected.isfinite().all()
    with saved_activations(code):
        out = fn(x)
    return gradients(out, [x])[0], expected


@codes
@pytest.mark.parametrize("name", DIVIDES)
def test_quotients(name: str, code: str) -> None:
    found, expected = both(DIVIDES[name], code)
    assert found.isfinite().all()
    assert relative(found, expected) < 0.15


@codes
@pytest.mark.parametrize("name", COMPARES)
def test_comparisons(name: str, code: str) -> None:
    found, expected = both(COMPARES[name], code)
    assert torch.equal(found, expected)


@codes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(code: str, dtype) -> None:
    fn = lambda x: (target.to(dtype) - x.tanh()).square() / torch.exp(x) + (1 - x.sigmoid()).log()  # noqa: E731
    found, expected = both(fn, code, dtype, 1.0)
    assert found.isfinite().all() and relative(found, expected) < 0.05


@codes
def test_segments_and_functions_of_ones_own(code: str) -> None:
    """In a function of autograd's nobody sees what backward will do: its values keep their signs and are not zero."""

    class Quotient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.abs().log()

        @staticmethod
        def backward(ctx, grad):
            return grad / ctx.saved_tensors[0]

    x = (torch.randn(N).pow(7)).requires_grad_()
    (expected,) = gradients(Quotient.apply(x * 1), [x])
    (found,) = gradients(checkpoint(lambda x: Quotient.apply(x * 1), x, policy=code), [x])
    assert found.isfinite().all() and torch.equal(found.sign(), expected.sign())


@pytest.mark.parametrize("policy", ["int8", "fp8", "int8+offload", "fp8+offload"])
@pytest.mark.parametrize("marked", [False, True])
def test_divided_by_after_it_went_into_codes(policy: str, marked: bool) -> None:
    """For a product that came long before; `marked`: as what a logarithm is made of, too late."""
    x = (torch.rand(N) * -12).requires_grad_()

    def fn(x):
        small = x.exp()
        result = small * x
        y = x
        for _ in range(8):
            y = y.cos()
        if marked:
            result = result + (small * 2).log()
        return result + y.detach() / small

    (expected,) = gradients(fn(x), [x])
    (found,) = gradients(checkpoint(fn, x, policy=policy), [x])
    assert ((found - expected) / expected).abs().max() < 0.02


def test_what_is_written_to_meanwhile() -> None:
    """Values are put into codes before an operator overwrites them."""
    x = torch.randn(N, requires_grad=True)

    def fn(x):
        y = x * 1
        z = y.sin()
        y.mul_(100)
        return z + y

    with saved_activations("int8"):
        out = fn(x)
    (expected,) = gradients(x.sin() + x * 100, [x])
    assert relative(*gradients(out, [x]), expected) < 0.02
    with saved_activations("int8"):
        y = x.exp()
        z = y.log()
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as eager says
        gradients(z, [x])


def test_memory_of_ordinary_layers_stays() -> None:
    """A block with norms, attention and gates written out has no quotient of its own size."""
    w = [nn.Parameter(torch.randn(128, 128) / 11) for _ in range(5)]

    def block(x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        q, k, v = (y @ w[i] for i in range(3))
        p = (q @ k.T / 11.3).softmax(-1)
        return x + (F.silu(p @ v @ w[3]) * (y / y.std(-1, keepdim=True))) @ w[4]

    x = torch.randn(512, 128, requires_grad=True)
    ends = []
    for code in (None, "int8"):
        with peak() as p:
            out = block(x * 1) if code is None else checkpoint(block, x * 1, policy=code)
        ends.append(p.end)
        del out
    assert ends[1] < 0.45 * ends[0]


def test_nothing_is_held_after_a_segment() -> None:
    x = torch.randn(N, requires_grad=True)
    kept = []

    class Noting(_saver.Saver):
        def _keep(self, t):
            found = super()._keep(t)
            kept.append(found[0])
            return found

    saver = Noting(_saver.Policy(code=_saver.Code("int8")))
    with torch.autograd.graph.saved_tensors_hooks(saver.pack, saver.unpack), saver.watching():
        y = (x * 1).exp().sin() @ torch.randn(128, 128, requires_grad=True)
        z = y.sigmoid().log()
    assert {k.exact for k in kept} == {True, False}
    assert all((k.flat is not None) == k.exact for k in kept)
    assert gradients(z, [x])[0].isfinite().all()


def test_kinds() -> None:
    aten = torch.ops.aten
    kinds = {
        aten.log_.default: "DIVIDES",
        aten._foreach_sqrt.default: "DIVIDES",
        aten.linalg_inv_ex.default: "DIVIDES",
        aten.clamp_.default: "COMPARES",
        aten.mul.Tensor: "PLAIN",
        aten.relu.default: "PLAIN",
    }
    assert {op: _precise.kind_of(op).name for op in kinds} == kinds
