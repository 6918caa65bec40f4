"""Linear layers: forward, and the gradients of the input, the weight and the bias."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._derivatives import is_observed, no_autocast
from .arguments import autocast_dtype, check_same_device, check_same_dtype, check_tensor
from .registry import REFUSED, Implementation, Operator, compute_dtype, cpu_kernel, define, needs_grad


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as `torch.nn.functional.linear`.

    Products are accumulated in float32, those of the weight's gradient too (float64 for float64). Inside autocast `x`
    is cast; the weight is read as it is, and its gradient has its dtype.

    Args:
        x: (..., K), floating, any strides.
        weight: (N, K), of the dtype of `x`.
        bias: (N,), of the dtype of `x`, or None.

    Returns:
        (..., N), contiguous, in the dtype of `x`.

    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ outside of autocast.
        ValueError: shapes or devices do not fit.
    """
    return packed_linear(x, weight, bias, None)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None) -> Tensor:
    """`linear`; where nothing needs a gradient, `packed` (from `pack_weight`) is read in place of the weight."""
    try:
        lowered = autocast_dtype(x.device)
        if lowered is not None:
            x = x.to(lowered)
        if OPERATOR.uses_kernel(x, weight, bias) and (x.dtype == weight.dtype or _reads(x, weight, lowered)):
            if needs_grad(x, weight, bias):
                return _Linear.apply(x, weight, bias)
            return _fwd(x, weight, bias, packed)
    except REFUSED:
        _check(x, weight, bias, lowered)
        raise
    _check(x, weight, bias, lowered)
    return _reference(x, weight, bias)


def _reads(x, weight, lowered):
    """Whether the kernel reads a weight of another dtype than the tokens."""
    return lowered is not None and weight.dtype == torch.float32


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The weight in the order in which the kernel reads it for tokens of `dtype`: for this process alone, and not for a
    file. None where no kernel supports it.
    """
    probe = weight.new_empty(0, dtype=dtype)
    return _pack(weight, dtype) if weight.is_cpu and OPERATOR.uses_kernel(probe, weight) else None


def sum_rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a bias (N,) from that of the outputs (..., N)."""
    return _rows(grad).sum(0, dtype=compute_dtype(grad.dtype)).to(dtype)


def _rows(t):
    """(T, N) of (..., N). Not by `flatten`, which `is_grads_batched` does not know."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _check(x, weight, bias, lowered):
    check_tensor("functional.linear", "x", x)
    check_tensor("functional.linear", "weight", weight)
    check_tensor("functional.linear", "bias", bias, optional=True)
    if weight.dim() != 2:
        raise ValueError(f"bigkernels.functional.linear: weight has shape {tuple(weight.shape)}, expected (N, K)")
    rows, columns = weight.shape
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"bigkernels.functional.linear: x has shape {tuple(x.shape)}, expected (..., {columns})")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bigkernels.functional.linear: bias has shape {tuple(bias.shape)}, expected ({rows},)")
    if lowered is None:
        check_same_dtype("functional.linear", "x", x, weight=weight, bias=bias)
    check_same_device("functional.linear", "x", x, weight=weight, bias=bias)


def _reference(x, weight, bias):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with a result as it was accumulated, in float32 (float64 for float64); plain PyTorch."""
    wide = compute_dtype(x.dtype)
    rounded: Any = (t if t is None else t.to(x.dtype).to(wide) for t in (weight, bias))
    return F.linear(x.to(wide), *rounded)


def _fwd_fallback(x, weight, bias, packed, wide=False):
    return (wide_product if wide else _reference)(x, weight, bias).contiguous()


def _fwd_fake(x, weight, bias, packed, wide=False):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=compute_dtype(x.dtype) if wide else None)


def _bwd_fallback(grad, x, weight, input):
    dx, dw = grad.new_empty(0), weight.new_empty(0)
    if input:
        dx = (grad @ weight.to(grad.dtype)).contiguous()
    if x is not None:
        wide = compute_dtype(grad.dtype)
        dw = (_rows(grad).to(wide).T @ _rows(x).to(wide)).to(weight.dtype)
    return dx, dw


def _bwd_fake(grad, x, weight, input):
    dx = grad.new_empty(*grad.shape[:-1], weight.shape[1]) if input else grad.new_empty(0)
    return dx, weight.new_empty(weight.shape if x is not None else 0)


def _pack_fake(weight, dtype):
    raise NotImplementedError("what a weight is packed to is known to the kernels alone")


def _pack_fallback(weight, dtype):
    raise RuntimeError("bigkernels: no kernel is there that reads packed weights")


OPERATOR = Operator(
    "linear", implementations=(cpu_kernel(), Implementation("triton", "cuda", unavailable=lambda: "cuBLAS computes it"))
)
_fwd = define(
    # `wide` leaves the result as it was accumulated.
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? packed, bool wide=False) -> Tensor",
    _fwd_fake,
    _fwd_fallback,
    lambda x, weight, *_: 2 * x.numel() * weight.shape[0],
)
_bwd = define(
    "linear_bwd(Tensor grad, Tensor? x, Tensor weight, bool input) -> (Tensor, Tensor)",
    _bwd_fake,
    _bwd_fallback,
    lambda grad, x, weight, input: 2 * grad.numel() * weight.shape[1] * ((x is not None) + bool(input)),
)
_pack = define("linear_pack(Tensor weight, ScalarType dtype) -> Tensor", _pack_fake, _pack_fallback)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, bias)
        return _fwd(x, weight, bias, None)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = dw = None
        if of_x or of_weight:
            if is_observed():
                with no_autocast(grad.device):
                    dx, dw = _bwd_fallback(grad, x, weight, of_x)
            else:
                dx, dw = _bwd(grad, x, weight, of_x)
        return (dx if of_x else None, dw if of_weight else None, sum_rows(grad, bias.dtype) if of_bias else None)
