"""GroupNorm on GPUs; the kernels are in `_channel_norm.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import group_norm as op
from ..ops.images import NAMES, NUMBERS, empty, lies
from ._channel_norm import Images, factors, joined, run_differentiate, run_moments, run_results, run_sums
from ._launch import falls_back, require


@falls_back(op._fwd_fallback)
def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, activation: int, rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    require("group_norm_fwd", lies(x, rows) and activation in NAMES, "x does not lie in planes, or in rows")
    images = Images(x, rows)
    require("group_norm_fwd", images.c % groups == 0, "groups must divide the channels")
    size = images.c // groups
    mean, square, count = run_moments(x, images)
    split = [t.unflatten(-1, (groups, size)) for t in (mean, square)]
    mean, variance = (t.flatten(1) for t in joined(split[0], split[1], count.unsqueeze(-1), (1, 3)))
    rstd = torch.rsqrt(variance + eps)
    wide_mean, wide_rstd = (t.repeat_interleave(size, 1) for t in (mean, rstd))
    y = empty(x, rows)
    run_results(x, None, wide_mean, *factors(wide_rstd, weight, bias), y, images, True, activation)
    return y, mean.contiguous(), rstd.contiguous()


@falls_back(op._bwd_fallback, empty=None)
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: int,
    rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    require("group_norm_bwd", lies(x, rows) and activation in NAMES, "x does not lie in planes, or in rows")
    require("group_norm_bwd", grad.shape == x.shape and lies(grad, rows), "grad must be like x")
    images, groups = Images(x, rows), mean.shape[1]
    size = images.c // groups
    mean, rstd = (t.repeat_interleave(size, 1) for t in (mean, rstd))
    scale, shift = factors(rstd, weight, bias)
    plain, product = run_sums(grad, x, None, mean, scale, shift, rstd, images, True, activation)
    dweight, dbias = (
        x.new_empty(0) if t is None else s.sum(0).to(t.dtype) for t, s in ((weight, product), (bias, plain))
    )
    if weight is not None:
        plain, product = plain * weight.float(), product * weight.float()
    of_group = [
        t.unflatten(-1, (groups, size)).sum(-1).repeat_interleave(size, 1) / (size * images.s) for t in (plain, product)
    ]
    dx = empty(x, rows)
    of_x, constant = -of_group[1] * rstd * rstd, -of_group[0] * rstd
    run_differentiate(grad, x, None, mean, scale, shift, scale, of_x, constant, dx, None, images, True, activation)
    return dx, dweight, dbias


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles."""
    for shape, rows in (((2, 320, 4096), False), ((2, 4096, 320), True), ((2, 1280, 64), False), ((3, 45, 33), True)):
        x = torch.empty(shape, dtype=dtype, device="meta")
        x = x.movedim(-1, 1) if rows else x
        channels = x.shape[1]
        groups = 32 if channels % 32 == 0 else 3
        weight, mean = x.new_empty(channels), x.new_empty(shape[0], groups, dtype=torch.float32)
        for activation in NAMES if shape[0] == 2 and not rows else (NUMBERS["silu"],):
            yield forward, (x, weight, weight, groups, 1e-5, activation, rows)
            yield backward, (x, x, weight, weight, mean, mean, activation, rows)
