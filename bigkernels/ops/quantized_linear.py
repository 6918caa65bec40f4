"""Linear layers whose weight is quantized: forward and the gradient of the input, from the codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._torch_private import scaled_mm
from . import _few_tokens, routes
from ._derivatives import is_observed, no_autocast
from .arguments import autocast_dtype, check_same_device, check_tensor
from .codes import FP8, INT8, CodedWeight, Operands, kernels_read
from .linear import sum_rows
from .registry import (
    REFUSED,
    Operator,
    compute_dtype,
    cpu_kernel,
    define,
    needs_grad,
    sees_plain_alone,
    triton_kernel,
)

if TYPE_CHECKING:
    from ..quantization import QuantizedWeight

_CHUNK = 2**22  # elements of the weight that the reference dequantizes at once
_MOST_EXACT = 2**17  # products of 8-bit integers whose sum 32 bits hold


def quantized_linear(x: Tensor, qweight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ qweight.dequantize().T + bias``, without the dequantized weight.

    A few tokens are multiplied with the codes as they are stored; for many, blocks of the weight are decoded into the
    operands of the matrix units, forward and backward. Products are accumulated in float32 (float64 for float64).

    Args:
        x: (..., K), floating, any strides.
        qweight: (N, K), from `quantize_weight`; frozen: it gets no gradient.
        bias: (N,) or None.

    Returns:
        (..., N), contiguous, in the dtype of `x`. Gradients reach `x` and `bias`. Inside autocast `x` is cast first.

    With `Int8Dynamic` weights each token of `x` is rounded to 8-bit integers, ``max|x| / 127`` apart, and the products
    are of integers; with `FP8Dynamic` to floats of 8 bits. The gradient is that of the weight alone, as if `x` had not
    been rounded (straight-through).

    Raises:
        TypeError: `x` or `bias` is not a floating tensor, or `qweight` not a `QuantizedWeight`.
        ValueError: shapes or devices do not fit.
    """
    try:
        dynamic = qweight.format.dynamic
        operands = qweight.operands()
        k = qweight.shape[1]
        lowered = autocast_dtype(x.device)
        if lowered is not None:
            x = x.to(lowered)
        x = qweight.entering(x)
        if uses_kernel(x, operands, bias) and not (dynamic and k > _MOST_EXACT):
            if needs_grad(x, bias):
                return _QuantizedLinear.apply(True, x, bias, *operands, k, dynamic, qweight.format.rounds_gradients)
            codes, scale, zero, row_scale, book, group, kind = operands
            run = _run(True, kind, dynamic)
            return run(x, codes, scale, zero, row_scale, book, bias, group, kind, k, dynamic)
    except REFUSED:
        _check(x, qweight, bias)
        raise
    _check(x, qweight, bias)
    return _reference(x, bias, operands, k, dynamic, qweight.format.rounds_gradients)


def wide_product(x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`quantized_linear` with a result as it was accumulated, in float32 (float64 for float64), and no gradient."""
    operands = qweight.operands()
    *tensors, group, kind = operands
    k, dynamic = qweight.shape[1], qweight.format.dynamic
    x = qweight.entering(x)
    kernel = uses_kernel(x, operands, bias) and not (dynamic and k > _MOST_EXACT)
    return _run(kernel, kind, dynamic)(x, *tensors, bias, group, kind, k, dynamic, True)


def uses_kernel(x: Tensor, operands: Operands, bias: Tensor | None = None) -> bool:
    """Whether the raw operators take a call."""
    codes, scale, zero, row_scale, book, _, kind = operands
    return kernels_read(kind, codes) and OPERATOR.uses_kernel(x, codes, scale, zero, row_scale, book, bias)


def _run(kernel, kind, dynamic):
    """What computes forward."""
    return _forward if not kernel else _fwd_fp8 if dynamic and kind == FP8.number else _fwd


def _fwd_fp8(x, codes, scale, zero, row_scale, book, bias, group, kind, k, dynamic, wide=False):
    """Tokens in floats of 8 bits: by the units that multiply these, else as numbers that 16 bits hold exactly."""
    if not wide and routes.takes_scaled_mm(x, codes):
        return _fwd(x, codes, scale, zero, row_scale, book, bias, group, kind, k, True)
    tokens, factor = round_tokens(x.to(compute_dtype(x.dtype)), True)
    out = _fwd(tokens.to(x.dtype), codes, scale, zero, row_scale, book, None, group, kind, k, False, True) * factor
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out if wide else out.to(x.dtype)


def _check(x, qweight, bias):
    check_tensor("functional.quantized_linear", "x", x)
    if not isinstance(qweight, CodedWeight):
        raise TypeError(
            f"bigkernels.functional.quantized_linear: qweight is {type(qweight).__name__}; accepted is QuantizedWeight"
        )
    rows, columns = qweight.shape
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"bigkernels.functional.quantized_linear: x has shape {tuple(x.shape)}, expected (..., {columns})"
        )
    if bias is not None:
        check_tensor("functional.quantized_linear", "bias", bias)
        if bias.shape != (rows,):
            raise ValueError(
                f"bigkernels.functional.quantized_linear: bias has shape {tuple(bias.shape)}, expected ({rows},)"
            )
    check_same_device("functional.quantized_linear", "x", x, qweight=qweight.operands().codes, bias=bias)


def _chunks(operands, k, dtype):
    """(rows, dequantized rows), a few at a time."""
    at_once = max(1, _CHUNK // max(k, 1))
    for begin in range(0, operands.codes.shape[0], at_once):
        rows = slice(begin, begin + at_once)
        yield rows, operands.rows(lambda t, rows=rows: t[rows]).decoded(k, dtype)


def round_tokens(x, fp8=False):
    """The tokens of x in integers (or with `fp8` floats, e4m3) of 8 bits, as floats, and their scale (..., 1)."""
    top = 448 if fp8 else 127
    scale = x.abs().amax(-1, keepdim=True) / top if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    safe = torch.where(scale > 0, scale, 1.0)
    if fp8:
        return (x / safe).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype), scale
    return (x / safe).round().clamp(-127, 127), scale


def _forward(x, codes, scale, zero, row_scale, book, bias, group, kind, k, dynamic, wide=False):
    tokens, factor = x.to(compute_dtype(x.dtype)), None
    like = tokens if wide else x
    if dynamic:
        tokens, factor = round_tokens(tokens, kind != INT8.number)
    return _multiply(like, tokens, factor, Operands(codes, scale, zero, row_scale, book, group, kind), bias, k)


def _multiply(x, tokens, factor, operands, bias, k):
    parts = [tokens @ w.T for _, w in _chunks(operands, k, tokens.dtype)]
    out = torch.cat(parts, -1) if parts else tokens.new_zeros(*x.shape[:-1], 0)
    if factor is not None:
        out = out * factor
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(x.dtype)


def _transparent(x, bias, operands, k, dynamic):
    """As `_forward`, with a gradient by plain PyTorch: transforms see through it."""
    tokens = x.to(compute_dtype(x.dtype))
    if dynamic:
        whole, factor = round_tokens(tokens, operands.kind != INT8.number)
        tokens = tokens + (whole * factor - tokens).detach()
    return _multiply(x, tokens, None, operands, bias, k)


def _backward(grad, codes, scale, zero, row_scale, book, group, kind, k):
    wide = compute_dtype(grad.dtype)
    out = grad.new_zeros(*grad.shape[:-1], k, dtype=wide)
    for rows, weight in _chunks(Operands(codes, scale, zero, row_scale, book, group, kind), k, wide):
        out += grad.narrow(-1, rows.start, weight.shape[0]).to(wide) @ weight
    return out.to(grad.dtype)


def _backward_fp8(grad, codes, scale):
    """The gradient of tokens, in floats of 8 bits: the scales of the weight's rows go to the gradient, whose tokens are
    then rounded.
    """
    wide = compute_dtype(grad.dtype)
    tokens, factor = round_tokens(grad.to(wide) * scale.to(wide), True)
    codes = codes.view(torch.float8_e4m3fn)
    if not routes.takes_scaled_mm(grad, codes.t()):
        return ((tokens @ codes.to(wide)) * factor).to(grad.dtype)
    rows = tokens.reshape(-1, tokens.shape[-1]).to(torch.float8_e4m3fn)
    ones = factor.new_ones(1, codes.shape[1])
    columns = codes.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn).t()  # which is how cuBLAS reads them
    product = scaled_mm(rows, columns, factor.reshape(-1, 1), ones, out_dtype=grad.dtype)
    return product.view(*grad.shape[:-1], -1)


def _reference(x, bias, operands, k, dynamic, coarse=False):
    if sees_plain_alone(x, bias):
        return _transparent(x, bias, operands, k, dynamic)
    if needs_grad(x, bias):
        return _QuantizedLinear.apply(False, x, bias, *operands, k, dynamic, coarse)
    *tensors, group, kind = operands
    given: tuple[Any, ...] = x, *tensors, bias, group, kind, k, dynamic
    return _forward(*given)


def _fwd_fake(x, codes, scale, zero, row_scale, book, bias, group, kind, k, dynamic, wide=False):
    return x.new_empty(*x.shape[:-1], codes.shape[0], dtype=compute_dtype(x.dtype) if wide else None)


OPERATOR = Operator(
    "quantized_linear", implementations=(cpu_kernel(), triton_kernel(), _few_tokens.kernel()), in_graphs=True
)
_WEIGHT = "Tensor codes, Tensor? scale, Tensor? zero, Tensor? row_scale, Tensor? book"
_fwd = define(
    # `wide` leaves the result as it was accumulated.
    f"quantized_linear_fwd(Tensor x, {_WEIGHT}, Tensor? bias, int group, int kind, SymInt k, bool dynamic,"
    " bool wide=False) -> Tensor",
    _fwd_fake,
    _forward,
    lambda x, codes, *_: 2 * x.numel() * codes.shape[0],
)
_bwd = define(
    f"quantized_linear_bwd(Tensor grad, {_WEIGHT}, int group, int kind, SymInt k) -> Tensor",
    lambda grad, codes, scale, zero, row_scale, book, group, kind, k: grad.new_empty(*grad.shape[:-1], k),
    _backward,
    lambda grad, codes, *rest: 2 * grad.numel() * rest[-1],
)


class _QuantizedLinear(torch.autograd.Function):
    """Backward reads the codes: forward keeps neither tokens nor a dequantized weight for it."""

    @staticmethod
    def forward(ctx, kernel, x, bias, codes, scale, zero, row_scale, book, group, kind, k, dynamic, coarse=False):
        ctx.save_for_backward(bias, codes, scale, zero, row_scale, book)
        ctx.options = group, kind, k
        ctx.kernel, ctx.coarse = kernel, coarse
        run = _run(kernel, kind, dynamic)
        return run(x, codes, scale, zero, row_scale, book, bias, group, kind, k, dynamic)

    @staticmethod
    def backward(ctx, grad):
        bias, *weight = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[1]:
            if is_observed():
                with no_autocast(grad.device):
                    dx = _backward(grad, *weight, *ctx.options)
            elif ctx.coarse:
                with no_autocast(grad.device):
                    dx = _backward_fp8(grad, *weight[:2])
            else:
                dx = (_bwd if ctx.kernel else _backward)(grad, *weight, *ctx.options)
        return None, dx, sum_rows(grad, bias.dtype) if ctx.needs_input_grad[2] else None, *[None] * 10
