"""RMSNorm on GPUs; the kernels are in `_norm.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from ..ops import rms_norm as op
from ._launch import falls_back, require, rows
from ._norm import run_backward, run_forward


@falls_back(op._fwd_fallback)
def forward(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    op._check(x, weight, residual)
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x.new_empty(0 if residual is None else x.shape)
    weight = None if weight is None else weight.contiguous()
    fused = (None, None) if residual is None else (rows(residual), total)
    run_forward(rows(x), weight, None, y, fused[0], fused[1], None, rstd, eps, offset)
    return y, rstd, total


def infer(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    return forward(x, weight, None, eps, offset)[0]


@falls_back(op._bwd_fallback)
def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, grad_total: Tensor | None, offset: float
) -> tuple[Tensor, Tensor]:
    require("rms_norm_bwd", grad.shape == x.shape and rstd.shape == x.shape[:-1], "grad and rstd must fit x")
    require("rms_norm_bwd", grad_total is None or grad_total.shape == x.shape, "grad_total must fit x")
    op._check(x, weight, None)
    dx = x.new_empty(x.shape)
    dweight, _ = run_backward(
        rows(grad),
        rows(x),
        None if weight is None else weight.contiguous(),
        None,
        rstd.contiguous(),
        None if grad_total is None else rows(grad_total),
        dx,
        offset,
        dweight=weight is not None,
        dbias=False,
    )
    return dx, x.new_empty(0) if weight is None else cast(Tensor, dweight).to(weight.dtype)


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: the ends of each kernel's range, and unaligned rows."""
    for size, fused in ((128, False), (5120, False), (4095, True), (8192, True), (16384, True), (65536, True)):
        x = torch.empty(4096, size, dtype=dtype, device="meta")
        rstd, weight = x.new_empty(4096, dtype=torch.float32), x.new_empty(size)
        yield forward, (x, weight, x if fused else None, 1e-6, 0.0)
        yield backward, (x, x, weight, rstd, x if fused else None, 0.0)
