"""BatchNorm on GPUs; the kernels are in `_channel_norm.py`."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import batch_norm as op
from ..ops.images import NAMES, NUMBERS, empty, lies
from ._channel_norm import Images, factors, joined, run_differentiate, run_moments, run_results, run_sums
from ._launch import falls_back, require


@falls_back(op._fwd_fallback)
def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
    rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    require("batch_norm_fwd", lies(x, rows) and activation in NAMES, "x does not lie in planes, or in rows")
    require(
        "batch_norm_fwd",
        residual is None or (residual.shape == x.shape and lies(residual, rows)),
        "residual must be like x",
    )
    images = Images(x, rows)
    made = x.new_empty(0), x.new_empty(0)
    if mean is None:
        mean, var = (t.flatten() for t in joined(*run_moments(x, images), (0, 1)))
        made = mean, var
    rstd = torch.rsqrt(var.float() + eps)
    y = empty(x, rows)
    run_results(x, residual, mean.float().contiguous(), *factors(rstd, weight, bias), y, images, False, activation)
    return y, *made


@falls_back(op._bwd_fallback, empty=None)
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    result: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: int,
    rows: bool,
    training: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require("batch_norm_bwd", lies(x, rows) and activation in NAMES, "x does not lie in planes, or in rows")
    require("batch_norm_bwd", grad.shape == x.shape and lies(grad, rows), "grad must be like x")
    require(
        "batch_norm_bwd", result is None or (result.shape == x.shape and lies(result, rows)), "result must be like x"
    )
    images = Images(x, rows)
    mean, rstd = mean.float().contiguous(), torch.rsqrt(var.float() + eps)
    result = result if activation == NUMBERS["relu"] else None
    scale, shift = factors(rstd, weight, bias)
    sums = run_sums(grad, x, result, mean, scale, shift, rstd, images, False, activation)
    plain, product = (t.sum(0) for t in sums)
    dweight, dbias = (x.new_empty(0) if t is None else s.to(t.dtype) for t, s in ((weight, product), (bias, plain)))
    share = (scale if training else torch.zeros_like(scale)) / (images.n * images.s)
    dx = empty(x, rows)
    dresidual = empty(x, rows) if residual else None
    of_x, constant = -product * share * rstd, -plain * share
    run_differentiate(
        grad, x, result, mean, scale, shift, scale, of_x, constant, dx, dresidual, images, False, activation
    )
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles."""
    for shape, rows in (((8, 256, 3136), False), ((8, 3136, 256), True), ((8, 512, 49), False), ((3, 45, 33), True)):
        x = torch.empty(shape, dtype=dtype, device="meta")
        x = x.movedim(-1, 1) if rows else x
        weight = x.new_empty(x.shape[1], dtype=torch.float32)
        for activation in NAMES if shape[2] == 3136 else (NUMBERS["relu"],):
            result = x if activation == NUMBERS["relu"] else None
            yield forward, (x, weight, weight, result, None, None, 1e-5, activation, rows)
            yield backward, (x, x, weight, weight, result, weight, weight, 1e-5, activation, rows, True, True)
