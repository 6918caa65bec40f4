"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) of queries and keys in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ._derivatives import is_observed
from .arguments import check_same_device, check_same_dtype, check_shape, check_tensor, is_dense, promote
from .registry import REFUSED, Operator, compute_dtype, define, needs_grad

MAX_ROTARY = 1024  # the CPU kernel keeps one position's cos and sin on the stack


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions' angles.

    The first R of D elements of each head become ``x * cos + rotate(x) * sin``; the others are copied. `rotate` maps
    the halves (a, b) to (-b, a), or, with `interleaved`, each pair (a, b) of neighbours to (-b, a). Computed in
    float32 and rounded once.

    Args:
        q: (B, Hq, S, D), floating, any strides.
        k: (B, Hk, S, D), the dtype of `q`. The head counts may differ.
        cos, sin: (B, S, R) or (1, S, R) with R <= D and R even, floating. Both halves (or both of each pair) are given,
            as Hugging Face models make them.
        interleaved: pair neighbours (GPT-J) and not halves (GPT-NeoX, Llama).

    Returns:
        The rotated (q, k): new tensors, strided as by `torch.empty_like`, contiguous where a head's values are not.

    Raises:
        TypeError: an argument is not a floating tensor, or `q` and `k` differ in dtype outside autocast.
        ValueError: shapes or devices do not fit.
    """
    try:
        if q.dtype != k.dtype:
            q, k = promote(q, k)
        if OPERATOR.uses_kernel(q, k, cos, sin) and not _needs_reference(cos, sin):
            if needs_grad(q, k):
                return _Rope.apply(q, k, cos, sin, interleaved)
            return _fwd(q, k, cos, sin, interleaved)
    except REFUSED:
        _check(q, k, cos, sin)
        raise
    _check(q, k, cos, sin)
    return _reference(q, k, cos, sin, interleaved)


def _needs_reference(cos, sin):
    """The kernels give no gradient for the angles, and hold at most MAX_ROTARY of them."""
    return (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)) or cos.shape[-1] > MAX_ROTARY


def _check(q, k, cos, sin):
    for name, value in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        check_tensor("functional.rope", name, value)
    for name, value, dims in (("q", q, "(B, H, S, D)"), ("k", k, "(B, H, S, D)"), ("cos", cos, "(B or 1, S, R)")):
        if value.dim() != dims.count(",") + 1:
            raise ValueError(f"bigkernels.functional.rope: {name} has shape {tuple(value.shape)}, expected {dims}")
    check_same_device("functional.rope", "q", q, k=k, cos=cos, sin=sin)
    check_same_dtype("functional.rope", "q", q, k=k)
    check_same_dtype("functional.rope", "cos", cos, sin=sin)
    batch, _, length, size = q.shape
    check_shape("functional.rope", "k", k, (batch, k.shape[1], length, size), "q with any number of heads")
    check_shape("functional.rope", "sin", sin, cos.shape, "the shape of cos")
    if cos.shape[0] not in (1, batch) or cos.shape[1] != length or cos.shape[2] > size or cos.shape[2] % 2:
        raise ValueError(
            f"bigkernels.functional.rope: cos has shape {tuple(cos.shape)}; expected ({batch} or 1, "
            f"{length}, R) with R even and at most {size}"
        )


def _rotate(x, interleaved):
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _apply(x, cos, sin, interleaved, inverse=False):
    rotary = cos.shape[-1]
    wide = compute_dtype(x.dtype)
    head = (x if rotary == x.shape[-1] else x[..., :rotary]).to(wide)
    cos, sin = cos.unsqueeze(1).to(wide), sin.unsqueeze(1).to(wide)
    if inverse:
        head = head * cos - _rotate(head * sin, interleaved)
    else:
        head = head * cos + _rotate(head, interleaved) * sin
    head = head.to(x.dtype)
    return head if rotary == x.shape[-1] else torch.cat((head, x[..., rotary:]), -1)


def _reference(q, k, cos, sin, interleaved):
    return _apply(q, cos, sin, interleaved), _apply(k, cos, sin, interleaved)


def _empty(x):
    """As the kernels allocate: the strides of `x`, or contiguous where it has gaps or its heads are not contiguous."""
    kept = is_dense(x) and (x.shape[-1] <= 1 or x.stride(-1) == 1)
    return torch.empty_like(x, memory_format=torch.preserve_format if kept else torch.contiguous_format)


def _like(x, out):
    return _empty(x).copy_(out)


def _fwd_fallback(q, k, cos, sin, interleaved):
    return _like(q, _apply(q, cos, sin, interleaved)), _like(k, _apply(k, cos, sin, interleaved))


def _bwd_fallback(grad_q, grad_k, cos, sin, interleaved):
    return (
        _like(grad_q, _apply(grad_q, cos, sin, interleaved, inverse=True)),
        _like(grad_k, _apply(grad_k, cos, sin, interleaved, inverse=True)),
    )


def _fake(q, k, cos, sin, interleaved):
    return _empty(q), _empty(k)


OPERATOR = Operator("rope")
_fwd = define(
    "rope_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)", _fake, _fwd_fallback
)
_bwd = define(
    "rope_bwd(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    _fake,
    _bwd_fallback,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _fwd(q, k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        cos, sin = ctx.saved_tensors
        if is_observed():  # linear in the gradients: the formula is its own derivative
            grads = (_apply(g, cos, sin, ctx.interleaved, inverse=True) for g in (grad_q, grad_k))
            return *grads, None, None, None
        return *_bwd(grad_q, grad_k, cos, sin, ctx.interleaved), None, None, None
