"""Gated linear units on GPUs: each element is read once and written once, so memory is the only limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import glu as op
from ._activations import _value_and_slope
from ._launch import falls_back, launch, power_of_2, require, rows


@triton.jit
def _position(rows, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row, column and mask of a program's tile."""
    across = tl.cdiv(N, BLOCK)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (program % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, col, (row < rows) & (col < N)


@triton.jit
def activate(
    GATE, UP, Y, rows, N, stride_gate, stride_up, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, col, mask = _position(rows, N, ROWS, BLOCK)
    gate = tl.load(GATE + row * stride_gate + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_up + col, mask=mask, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, ACTIVATION)
    tl.store(Y + row * N + col, (value * up).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def differentiate(
    GRAD,
    GATE,
    UP,
    D_GATE,
    D_UP,
    rows,
    N,
    stride_grad,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, col, mask = _position(rows, N, ROWS, BLOCK)
    grad = tl.load(GRAD + row * stride_grad + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * stride_gate + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_up + col, mask=mask, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(gate, ACTIVATION)
    tl.store(D_GATE + row * N + col, (grad * up * slope).to(D_GATE.dtype.element_ty), mask=mask)
    tl.store(D_UP + row * N + col, (grad * value).to(D_UP.dtype.element_ty), mask=mask)


def _tiles(*tensors: Tensor) -> tuple[list[Tensor], dict[str, int], tuple[int]]:
    """The tensors as rows (one long row where all are contiguous), the tile, and the grid that covers them."""
    if all(t.is_contiguous() for t in tensors):
        views = [t.reshape(1, -1) for t in tensors]
    else:
        views = [rows(t) for t in tensors]
    count, size = views[0].shape
    # 2048 elements for 128 threads: two 16-byte loads of a 16-bit operand each.
    block = min(2048, power_of_2(size))
    tile = {"ROWS": 2048 // block if count > 1 else 1, "BLOCK": block}
    return views, tile, (triton.cdiv(count, tile["ROWS"]) * triton.cdiv(size, block),)


@falls_back(op._fwd_fallback)
def forward(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    op._check(gate, up, op._NAMES[activation])
    y = gate.new_empty(gate.shape)
    (gate, up), tile, grid = _tiles(gate, up)
    launch(
        activate,
        grid,
        gate,
        up,
        y,
        *gate.shape,
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        num_warps=4,
        **cast(Any, tile),
    )
    return y


@falls_back(op._bwd_fallback, empty=op._bwd_fake)
def backward(grad: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    require("glu_bwd", grad.shape == gate.shape, "grad must have the shape of gate")
    op._check(gate, up, op._NAMES[activation])
    d_gate, d_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    (grad, gate, up), tile, grid = _tiles(grad, gate, up)
    launch(
        differentiate,
        grid,
        grad,
        gate,
        up,
        d_gate,
        d_up,
        *gate.shape,
        grad.stride(0),
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        num_warps=4,
        **cast(Any, tile),
    )
    return d_gate, d_up


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: every activation on halves of a projection, and flat."""
    gate, up = torch.empty(4096, 2 * 11008, dtype=dtype, device="meta").chunk(2, -1)
    for activation in range(len(op.ACTIVATIONS)):
        yield forward, (gate, up, activation)
        yield backward, (up, gate, up, activation)
    flat = gate.contiguous()
    yield forward, (flat, flat, 0)
    yield backward, (flat, flat, flat, 0)
