"""The activation of an MLP on GPUs, forward and backward; the products beside it are PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import mlp as op
from ._activations import _value_and_slope
from ._launch import falls_back, launch, require

_ELEMENTS = 2048  # of a program of 128 threads: two 16-byte loads of a 16-bit operand each


@triton.jit
def activate_flat(X, Y, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < N, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(x, ACTIVATION)
    tl.store(Y + at, value.to(Y.dtype.element_ty), mask=at < N)


@triton.jit
def differentiate_flat(GRAD, X, DX, Y, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(GRAD + at, mask=at < N, other=0.0).to(tl.float32)
    x = tl.load(X + at, mask=at < N, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(x, ACTIVATION)
    tl.store(DX + at, (grad * slope).to(DX.dtype.element_ty), mask=at < N)
    if Y is not None:
        tl.store(Y + at, value.to(Y.dtype.element_ty), mask=at < N)


@falls_back(op._fwd_fallback)
def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int, keep: bool
) -> tuple[Tensor, Tensor]:
    require("mlp_fwd", 0 <= activation < len(op.ACTIVATIONS), f"no activation number {activation}")
    before = (x if weight is None else op._plain(x, weight, bias)).contiguous()
    y = before.new_empty(before.shape)
    if y.numel():
        launch(
            activate_flat,
            (triton.cdiv(y.numel(), _ELEMENTS),),
            before,
            y,
            y.numel(),
            ACTIVATION=activation,
            BLOCK=_ELEMENTS,
            num_warps=4,
        )
    return y, before if keep and weight is not None else x.new_empty(0)


@falls_back(op._bwd_fallback, empty=op._bwd_fake)
def backward(
    grad: Tensor, weight: Tensor | None, before: Tensor, activation: int, again: bool
) -> tuple[Tensor, Tensor]:
    require("mlp_bwd", 0 <= activation < len(op.ACTIVATIONS), f"no activation number {activation}")
    if weight is not None:
        grad = grad @ weight.to(grad.dtype)
    require("mlp_bwd", grad.shape == before.shape and grad.dtype == before.dtype, "grad does not fit the activation")
    grad, before = grad.contiguous(), before.contiguous()
    dx = before.new_empty(before.shape)
    value = before.new_empty(before.shape) if again else None
    if dx.numel():
        launch(
            differentiate_flat,
            (triton.cdiv(dx.numel(), _ELEMENTS),),
            grad,
            before,
            dx,
            value,
            dx.numel(),
            ACTIVATION=activation,
            BLOCK=_ELEMENTS,
            num_warps=4,
        )
    return dx, before.new_empty(0) if value is None else value


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: GELU, and the activations that `glu` does not have."""
    x = torch.empty(4096, 3072, dtype=dtype, device="meta")
    for activation in (1, *range(6, len(op.ACTIVATIONS))):
        yield forward, (x, None, None, activation, False)
        yield backward, (x, None, x, activation, activation % 2 == 0)
