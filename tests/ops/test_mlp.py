"""MLPs beyond the recipe: what is kept, which gradients are asked for, autocast, and the halves that `patch` uses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bigkernels.functional as B
from bigkernels._compare import compare_all
from bigkernels.nn import MLP
from bigkernels.ops.mlp import (
    ACTIVATIONS,
    linear_activation,
    linear_of_activation,
    made_by_linear_activation,
)

NAMES = ("x", "weight1", "bias1", "weight2", "bias2")


def tensors(dtype: torch.dtype = torch.float32, tokens: int = 37) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((tokens, 24), (50, 24), (50,), (20, 50), (20,))
    return [(torch.randn(s, generator=g) * (1.0 if i in (0, 2, 4) else 0.2)).to(dtype) for i, s in enumerate(shapes)]


def plain(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def halves(x, weight1, bias1, weight2, bias2):
    a = linear_activation(x, weight1, bias1)
    assert made_by_linear_activation(a) == a.requires_grad
    return linear_of_activation(a, weight2, bias2) if a.requires_grad else F.linear(a, weight2, bias2)


def results(function, given, wanted):
    leaves = [t.detach().clone().requires_grad_(n in wanted) for n, t in zip(NAMES, given, strict=True)]
    out = function(*leaves)
    by = [t for t in leaves if t.requires_grad]
    grads = torch.autograd.grad((out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), by)
    return {"out": out.detach(), **dict(zip([n for n in NAMES if n in wanted], grads, strict=True))}


@pytest.mark.parametrize("function", [B.mlp, halves], ids=["mlp", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "wanted",
    [NAMES, ("x",), ("weight1", "weight2"), ("weight2",), ("bias1",), ("bias2",), ("x", "bias2")],
    ids=" ".join,
)
def test_the_gradients_that_are_wanted(library, function, dtype, wanted):
    if function is halves and set(wanted) <= {"weight2", "bias2"}:
        pytest.skip("nothing before the activation is trained: it is kept as it is")
    given = tensors(dtype)
    exact = results(plain, [t.double() for t in given], wanted)
    assert results(function, given, wanted).keys() == exact.keys()
    found = compare_all(
        results(function, given, wanted), results(plain, given, wanted), exact, roundings=2, scale="row"
    )
    wrong = {k: str(c) for k, c in found.items() if not c.ok}
    assert not wrong


@pytest.mark.parametrize("function", [B.mlp, halves], ids=["mlp", "halves"])
def test_a_third_less_is_kept(library, function):
    def kept(call):
        seen = {}

        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        given = [t.requires_grad_() for t in tensors(torch.bfloat16, 300)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = call(*given)
        for t in given:  # parameters and inputs are there anyway
            seen.pop(t.untyped_storage().data_ptr(), None)
        return sum(seen.values()), out

    if function is halves:  # hooks around it are why it would keep its input
        x, *rest = [t.requires_grad_() for t in tensors(torch.bfloat16, 300)]
        a = linear_activation(x, *rest[:2])
        node = linear_of_activation(a, *rest[2:]).grad_fn
        assert all(t is None or t.data_ptr() != a.data_ptr() for t in node.saved_tensors)
        return
    ours, _ = kept(function)
    theirs, _ = kept(plain)
    assert ours * 2 == theirs == 2 * 300 * 50 * 2


def test_written_activations_are_kept_as_they_are(library):
    x, weight1, bias1, *_ = (t.requires_grad_() for t in tensors())
    a = linear_activation(x, weight1, bias1)
    a += 1
    assert not made_by_linear_activation(a)
    assert not made_by_linear_activation(linear_activation(x, weight1, bias1) * 2)
    assert not made_by_linear_activation(x)
    with torch.no_grad():
        assert not made_by_linear_activation(linear_activation(x, weight1, bias1))


def test_second_derivatives_through_both_halves(library):
    given = [t.requires_grad_() for t in tensors(tokens=5)]

    def penalty(function):
        grads = torch.autograd.grad(function(*given).square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), given)

    for function in (halves, B.mlp):
        for found, expected in zip(penalty(function), penalty(plain), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-3 * expected.abs().max().item())


@pytest.mark.parametrize("lowered", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_as_linear_layers(library, lowered):
    given = tensors()
    with torch.autocast("cpu", lowered):
        ours, theirs = results(B.mlp, given, NAMES), results(plain, given, NAMES)
        also = results(halves, given, NAMES)
    exact = results(plain, [t.double() for t in given], NAMES)
    for found in (ours, also):
        assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in theirs.items()}
        rounded = {k: t.to(lowered) for k, t in found.items()}
        compared = compare_all(rounded, {k: t.to(lowered) for k, t in theirs.items()}, exact, roundings=4, scale="row")
        wrong = {k: str(c) for k, c in compared.items() if not c.ok}
        assert not wrong


def test_a_transposed_weight(library):
    """GPT-2's."""
    given = tensors()
    x, weight1, bias1, weight2, bias2 = (t.requires_grad_() for t in given)
    found = B.mlp(x, weight1.detach().t().contiguous().t().requires_grad_(), bias1, weight2, bias2)
    torch.testing.assert_close(found, plain(*given))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu"])
def test_a_module(library, activation):
    module = MLP(24, 50, activation)
    x = torch.randn(2, 7, 24)
    expected = module.fc2(ACTIVATIONS[activation](module.fc1(x)))
    torch.testing.assert_close(module(x), expected)
    calls = []
    handle = module.fc1.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(module(x), expected)
    handle.remove()
    module(x)
    assert calls == [1]
    module.fc2 = nn.Sequential(module.fc2, nn.Identity())  # as an adapter wraps it
    torch.testing.assert_close(module(x), expected)
    with pytest.raises(ValueError, match="activation is 'swish'; accepted are silu, gelu"):
        MLP(4, 8, "swish")


def test_errors_say_what_is_wrong(library):
    x, w1, b1, w2, b2 = tensors()
    cases = [
        (lambda: B.mlp(x, w1, b1, w2, b2, activation="swish"), ValueError, "mlp: activation is 'swish'; accepted are"),
        (lambda: B.mlp(x, w2, b1, w2, b2), ValueError, r"weight1 has shape \(20, 50\), expected \(N, 24\)"),
        (lambda: B.mlp(x, w1, b1, w1, b2), ValueError, r"weight2 has shape \(50, 24\), expected \(N, 50\)"),
        (lambda: B.mlp(x, w1, b2, w2, b2), ValueError, r"bias1 has shape \(20,\), expected \(50,\)"),
        (lambda: B.mlp(x, w1, b1, w2.half(), b2), TypeError, "weight2 is float16 and x is float32"),
        (lambda: B.mlp(x.long(), w1, b1, w2, b2), TypeError, "x is int64"),
        (lambda: B.mlp(x, w1, b1, None, b2), TypeError, "weight2 must be a tensor"),
        (lambda: B.mlp([1.0], w1, b1, w2, b2), TypeError, "x must be a tensor, got list"),
        (lambda: B.mlp(x, w1, b1, w2.to("meta"), b2), ValueError, "weight2 is on meta and x on cpu"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
