"""Products of tokens, in the order of their experts, with each expert's weight: one launch on GPUs, where nobody reads
how many tokens an expert has.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import quantized_linear as _quantized
from ._derivatives import is_observed, no_autocast
from .arguments import autocast_dtype, check_same_device, check_tensor
from .codes import FP8, NUMBERS, Operands, kernels_read
from .registry import Operator, compute_dtype, define, needs_grad, triton_kernel

if TYPE_CHECKING:
    from ..quantization import QuantizedWeight


def grouped_linear(x: Tensor, weight: Tensor | QuantizedWeight, ends: Tensor) -> Tensor:
    """``x[begin:end] @ weight[i].T`` for the tokens of each expert i, which end at ``ends[i]``.

    Args:
        x: (T, K), floating: the tokens of expert 0, then those of expert 1, and so on.
        weight: (E, N, K), or the quantized weights of E experts one below the other, (E * N, K).
        ends: (E,), int32 or int64, growing. On a GPU nobody waits for what is in it.

    Returns:
        (T, N) in the dtype of `x`; zeros for tokens after the last end. Gradients reach `x`, and a `weight` that is a
        tensor. Inside autocast `x` is cast first, and such a weight.

    Raises:
        TypeError: `x` is not floating, or `ends` holds no integers.
        ValueError: shapes or devices do not fit.
    """
    lowered = autocast_dtype(x.device) if isinstance(x, Tensor) else None
    if lowered is not None:
        x = x.to(lowered)
        weight = weight.to(lowered) if isinstance(weight, Tensor) else weight
    experts, rows = _check(x, weight, ends)
    if isinstance(weight, Tensor):
        dynamic, operands = False, Operands.plain(weight.reshape(experts * rows, -1))
    else:
        dynamic, operands = weight.format.dynamic, weight.operands()
        x = weight.entering(x)
    *tensors, group, kind = operands
    # The kernels round tokens to integers, and to no floats of 8 bits.
    unread = not kernels_read(kind, tensors[0]) or (dynamic and kind == FP8.number)
    if unread or not OPERATOR.uses_kernel(x, ends, *tensors) or (dynamic and x.shape[1] > _quantized._MOST_EXACT):
        return _one_by_one(x, weight, ends, rows)
    if needs_grad(x, tensors[0]):
        return _GroupedLinear.apply(x, ends, *operands, dynamic)
    return _fwd(x, ends, *operands, dynamic)


def _check(x: Tensor, weight: Tensor | QuantizedWeight, ends: Tensor) -> tuple[int, int]:
    """(experts, rows of each)"""
    check_tensor("ops.grouped_linear", "x", x)
    if not isinstance(ends, Tensor) or ends.dim() != 1 or ends.dtype not in (torch.int32, torch.int64):
        raise TypeError("bigkernels.ops.grouped_linear: ends must be a vector of int32 or int64")
    experts, shape = ends.shape[0], tuple(weight.shape)
    if isinstance(weight, Tensor):
        check_tensor("ops.grouped_linear", "weight", weight)
        fits = weight.dim() == 3 and shape[0] == experts and weight.dtype == x.dtype
    else:
        fits = experts > 0 and shape[0] % experts == 0
    if x.dim() != 2 or not fits or shape[-1] != x.shape[1]:
        kind = "" if isinstance(weight, Tensor) else "quantized "
        raise ValueError(
            f"bigkernels.ops.grouped_linear: x {tuple(x.shape)} of {x.dtype}, {kind}weight {shape} of "
            f"{weight.dtype} and {experts} ends do not fit"
        )
    held = weight if isinstance(weight, Tensor) else weight.operands().codes
    check_same_device("ops.grouped_linear", "x", x, weight=held, ends=ends)
    return experts, shape[1] if isinstance(weight, Tensor) else shape[0] // experts


def _spans(ends: Tensor, tokens: int) -> Iterator[tuple[int, int, int]]:
    """(expert, first token, end) of the experts that have tokens."""
    begin = 0
    for i, end in enumerate(min(max(int(e), 0), tokens) for e in ends.tolist()):
        if end > begin:
            yield i, begin, end
            begin = end


def _one_by_one(x: Tensor, weight: Tensor | QuantizedWeight, ends: Tensor, rows: int) -> Tensor:
    parts, done = [], 0
    for i, begin, end in _spans(ends, x.shape[0]):
        mine = x[begin:end]
        if isinstance(weight, Tensor):
            parts.append(torch.nn.functional.linear(mine, weight[i]))
        else:
            parts.append(_quantized.quantized_linear(mine, weight.rows(i * rows, (i + 1) * rows)))
        done = end
    return torch.cat([*parts, x.new_zeros(x.shape[0] - done, rows)])


def _rows_of(tensors: tuple, i: int, rows: int) -> list[Tensor | None]:
    """What belongs to expert i of codes, scale, zero and row_scale."""
    return [t if t is None else t[i * rows : (i + 1) * rows] for t in tensors]


def _forward(x, ends, codes, scale, zero, row_scale, book, group, kind, dynamic):
    rows = codes.shape[0] // ends.shape[0]
    out = x.new_zeros(x.shape[0], rows)
    for i, begin, end in _spans(ends, x.shape[0]):
        mine = _rows_of((codes, scale, zero, row_scale), i, rows)
        if kind == NUMBERS:
            out[begin:end] = x[begin:end] @ mine[0].T
        else:
            out[begin:end] = _quantized._forward(x[begin:end], *mine, book, None, group, kind, x.shape[1], dynamic)
    return out


def _backward(grad, ends, codes, scale, zero, row_scale, book, group, kind, k):
    rows = codes.shape[0] // ends.shape[0]
    parts, done = [], 0
    for i, begin, end in _spans(ends, grad.shape[0]):
        mine = _rows_of((codes, scale, zero, row_scale), i, rows)
        if kind == NUMBERS:
            parts.append(grad[begin:end] @ mine[0])
        else:
            parts.append(_quantized._backward(grad[begin:end], *mine, book, group, kind, k))
        done = end
    return torch.cat([*parts, grad.new_zeros(grad.shape[0] - done, k)])


def _weight_backward(grad, x, ends):
    grad_weight = x.new_zeros(ends.shape[0], grad.shape[1], x.shape[1])
    wide = compute_dtype(x.dtype)
    parts = {i: grad[begin:end].T.to(wide) @ x[begin:end].to(wide) for i, begin, end in _spans(ends, x.shape[0])}
    return (
        torch.stack([parts[i].to(x.dtype) if i in parts else none for i, none in enumerate(grad_weight)])
        if parts
        else grad_weight
    )


def _flops(x, ends, codes, *_):
    return 2 * x.numel() * (codes.shape[0] // max(ends.shape[0], 1))


# Elsewhere than on GPUs each expert's product is one of its own.
OPERATOR = Operator("grouped_linear", implementations=(triton_kernel(),), listed=False)
_WEIGHT = "Tensor ends, Tensor codes, Tensor? scale, Tensor? zero, Tensor? row_scale, Tensor? book"
_fwd = define(
    f"grouped_linear_fwd(Tensor x, {_WEIGHT}, int group, int kind, bool dynamic) -> Tensor",
    lambda x, ends, codes, *_: x.new_empty(x.shape[0], codes.shape[0] // ends.shape[0]),
    _forward,
    _flops,
)
_bwd = define(
    f"grouped_linear_bwd(Tensor grad, {_WEIGHT}, int group, int kind, SymInt k) -> Tensor",
    lambda grad, ends, codes, scale, zero, row_scale, book, group, kind, k: grad.new_empty(grad.shape[0], k),
    _backward,
    lambda grad, ends, codes, *rest: 2 * grad.numel() * rest[-1],
)
_weight_bwd = define(
    "grouped_linear_weight_bwd(Tensor grad, Tensor x, Tensor ends) -> Tensor",
    lambda grad, x, ends: x.new_empty(ends.shape[0], grad.shape[1], x.shape[1]),
    _weight_backward,
    lambda grad, x, ends: 2 * x.numel() * grad.shape[1],
)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ends, codes, scale, zero, row_scale, book, group, kind, dynamic):
        kept = x if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, ends, codes, scale, zero, row_scale, book)
        ctx.options = group, kind, x.shape[1]
        return _fwd(x, ends, codes, scale, zero, row_scale, book, group, kind, dynamic)

    @staticmethod
    def backward(ctx, grad):
        x, ends, *weight = ctx.saved_tensors
        dx = dw = None
        back, weight_back = (_backward, _weight_backward) if is_observed() else (_bwd, _weight_bwd)
        with no_autocast(grad.device):
            if ctx.needs_input_grad[0]:
                dx = back(grad, ends, *weight, *ctx.options)
            if ctx.needs_input_grad[2]:
                dw = weight_back(grad, x, ends).flatten(0, 1)
        return dx, None, dw, *[None] * 7
