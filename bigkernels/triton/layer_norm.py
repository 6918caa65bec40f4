"""LayerNorm on GPUs; the kernels are in `_norm.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from ..ops import layer_norm as op
from ._launch import falls_back, require, rows
from ._norm import run_backward, run_forward


@falls_back(op._fwd_fallback)
def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op._check(x, weight, bias, residual)
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    total = x.new_empty(0 if residual is None else x.shape)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    fused = (None, None) if residual is None else (rows(residual), total)
    run_forward(rows(x), weight, bias, y, fused[0], fused[1], mean, rstd, eps, 0.0)
    return y, mean, rstd, total


def infer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return forward(x, weight, bias, None, eps)[0]


@falls_back(op._bwd_fallback)
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    require(
        "layer_norm_bwd",
        grad.shape == x.shape and rstd.shape == mean.shape == x.shape[:-1],
        "grad, mean and rstd must fit x",
    )
    require("layer_norm_bwd", grad_total is None or grad_total.shape == x.shape, "grad_total must fit x")
    op._check(x, weight, bias, None)
    dx = x.new_empty(x.shape)
    sums = run_backward(
        rows(grad),
        rows(x),
        None if weight is None else weight.contiguous(),
        mean.contiguous(),
        rstd.contiguous(),
        None if grad_total is None else rows(grad_total),
        dx,
        0.0,
        dweight=weight is not None,
        dbias=bias is not None,
    )
    dweight, dbias = (
        x.new_empty(0) if p is None else cast(Tensor, s).to(p.dtype) for p, s in zip((weight, bias), sums, strict=True)
    )
    return dx, dweight, dbias


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: the ends of each kernel's range, and unaligned rows."""
    for size, fused in ((128, False), (5120, False), (4095, True), (8192, True), (16384, True), (65536, True)):
        x = torch.empty(4096, size, dtype=dtype, device="meta")
        mean, weight = x.new_empty(4096, dtype=torch.float32), x.new_empty(size)
        yield forward, (x, weight, weight, x if fused else None, 1e-5)
        yield backward, (x, x, weight, weight, mean, mean, x if fused else None)
