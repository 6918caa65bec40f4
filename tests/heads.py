"""Hidden states and heads for the tests of losses over a vocabulary, and the criterion for results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernels._compare import compare_all

Results = Sequence[Tensor]
LOST = torch.finfo(torch.bfloat16).smallest_normal  # 1e-38: the units that multiply bfloat16 take less for zero
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def make(tokens: int, vocabulary: int, size: int, dtype=torch.float64, *, bias=True, strided=False, spread=1.0):
    """(hidden (T, H), weight (V, H), bias (V,) or None), of the dtype's values; strided ones are parts of others."""
    extra = 3 if strided else 0
    hidden = (spread * torch.randn(tokens, size + extra)).to(dtype)[:, :size]
    weight = (torch.randn(size + extra, vocabulary) / size**0.5).to(dtype)[:size].T
    weight = weight if strided else weight.contiguous()
    return hidden, weight, torch.randn(vocabulary).to(dtype) if bias else None


def logits(hidden, weight, bias, scale=1.0, softcap=None, temperature=1.0):
    """Of numbers of the dtype, everything in float32, or in float64: nothing is rounded to 16 bits between."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    z = F.linear(*(t if t is None else t.to(wide) for t in (hidden, weight, bias))) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def results(fn: Callable[..., Results], inputs: Sequence[Tensor | None], upstream: Results, frozen=()) -> dict:
    """The outputs of fn(*inputs) and the gradients of its inputs by number, those in `frozen` left out."""
    leaves = [
        t if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_(i not in frozen)
        for i, t in enumerate(inputs)
    ]
    # clone keeps the strides of dense tensors only; a view into something larger has to be passed as it is.
    leaves = [
        leaf if t is None or leaf.stride() == t.stride() else t.detach().requires_grad_(i not in frozen)
        for i, (leaf, t) in enumerate(zip(leaves, inputs, strict=True))
    ]
    out = fn(*leaves)
    found = {f"output {i}": o.detach() for i, o in enumerate(out)}
    wanted = {i: leaf for i, leaf in enumerate(leaves) if leaf is not None and leaf.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), [u.to(o.dtype) for u, o in zip(upstream, out, strict=True)])
    for (i, leaf), g in zip(wanted.items(), grads, strict=True):
        assert g.dtype == leaf.dtype
        found[f"gradient {i}"] = g
    return found


def check(
    ours: Callable[..., Results],
    formula: Callable[..., Results],
    inputs: Sequence[Tensor | None],
    upstream: Results,
    *,
    frozen=(),
    roundings: float = 2.0,
) -> None:
    """`ours` against the formula in float64, no further from it than the formula in the dtype of the inputs."""
    scale = "row"
    if all(t is None or t.dtype == torch.float64 for t in inputs):
        roundings, scale = 32.0, "tensor"  # plain and exact are then the same, roundings included
    found = results(ours, inputs, upstream, frozen)
    plain = results(formula, inputs, upstream, frozen)
    exact = results(formula, [t if t is None else t.double() for t in inputs], upstream, frozen)
    for name, comparison in compare_all(found, plain, exact, roundings=roundings, scale=scale).items():
        assert comparison.problem is None and comparison.error <= comparison.bound + LOST, f"{name}: {comparison}"
