"""The kernels of group_norm and batch_norm, for planes and for rows of channels: a tile is some pixels of some
channels of one image.

Moments and sums go to partial results of the tiles' programs, in a fixed order; what is combined from them is small,
and left to PyTorch. Then one more pass writes the results.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activations import _value_and_slope
from ._launch import launch, power_of_2, processors

_TILE = 2048  # elements of a tile


@triton.jit
def _place(C, S, first, ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels, offsets and mask of the tile of pixels from `first` on; programs are (channels, parts, images)."""
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    pixel = first + tl.arange(0, PIXELS)[:, None]
    image = tl.program_id(0).to(tl.int64) * C * S
    if ROWS:
        offset = image + pixel.to(tl.int64) * C + channel
    else:
        offset = image + channel.to(tl.int64) * S + pixel
    return channel, offset, (channel < C) & (pixel < S)


@triton.jit
def moments(X, MEAN, SQUARE, C, S, part, ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """The mean, and the sum of squared deviations from it, of each channel in pixels [part * i, part * (i + 1))."""
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, S)
    mean = tl.zeros([CHANNELS], tl.float32)
    square = tl.zeros([CHANNELS], tl.float32)
    seen = 0.0
    for first in range(begin, end, PIXELS):
        channel, offset, mask = _place(C, S, first, ROWS, PIXELS, CHANNELS)
        mask = mask & ((first + tl.arange(0, PIXELS)[:, None]) < end)
        x = tl.load(X + offset, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(end - first, PIXELS).to(tl.float32)
        own = tl.sum(x, 0) / count
        # Of values far from zero the mean loses digits, which what is left over gives back.
        own += tl.sum(tl.where(mask, x - own[None, :], 0.0), 0) / count
        left = tl.where(mask, x - own[None, :], 0.0)
        # Two sets of values joined (Chan, Golub and LeVeque 1979).
        delta = own - mean
        total = seen + count
        square += tl.sum(left * left, 0) + delta * delta * (seen * count / total)
        mean += delta * (count / total)
        seen = total
    to = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * C
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(MEAN + to + channel, mean, mask=channel < C)
    tl.store(SQUARE + to + channel, square, mask=channel < C)


@triton.jit
def _behind(GRAD, X, RESULT, MEAN, SCALE, SHIFT, at, channel, C, offset, mask, ACTIVATION: tl.constexpr):
    """x - mean, and the gradient behind the activation."""
    inside = channel < C
    x = tl.load(X + offset, mask=mask, other=0.0).to(tl.float32) - tl.load(MEAN + at + channel, mask=inside, other=0.0)
    g = tl.load(GRAD + offset, mask=mask, other=0.0).to(tl.float32)
    if RESULT is not None:
        g = tl.where(tl.load(RESULT + offset, mask=mask, other=0.0).to(tl.float32) <= 0.0, 0.0, g)
    elif ACTIVATION != 6:
        z = x * tl.load(SCALE + at + channel, mask=inside, other=0.0)
        z += tl.load(SHIFT + at + channel, mask=inside, other=0.0)
        value, slope = _value_and_slope(z, ACTIVATION)
        g *= slope
    return tl.where(mask, x, 0.0), tl.where(mask, g, 0.0)


@triton.jit
def sums(
    GRAD,
    X,
    RESULT,
    MEAN,
    SCALE,
    SHIFT,
    RSTD,
    PLAIN,
    PRODUCT,
    C,
    S,
    part,
    images,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of g and of g * (x - mean) * rstd, for each channel."""
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, S)
    at = tl.program_id(0).to(tl.int64) * C * images
    plain = tl.zeros([CHANNELS], tl.float32)
    product = tl.zeros([CHANNELS], tl.float32)
    for first in range(begin, end, PIXELS):
        channel, offset, mask = _place(C, S, first, ROWS, PIXELS, CHANNELS)
        mask = mask & ((first + tl.arange(0, PIXELS)[:, None]) < end)
        x, g = _behind(GRAD, X, RESULT, MEAN, SCALE, SHIFT, at, channel, C, offset, mask, ACTIVATION)
        plain += tl.sum(g, 0)
        product += tl.sum(g * x, 0)
    to = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * C
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    product *= tl.load(RSTD + at + channel, mask=channel < C, other=0.0)
    tl.store(PLAIN + to + channel, plain, mask=channel < C)
    tl.store(PRODUCT + to + channel, product, mask=channel < C)


@triton.jit
def results(
    X,
    RESIDUAL,
    MEAN,
    SCALE,
    SHIFT,
    Y,
    C,
    S,
    images,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * C * images
    channel, offset, mask = _place(C, S, tl.program_id(1) * PIXELS, ROWS, PIXELS, CHANNELS)
    inside = channel < C
    x = tl.load(X + offset, mask=mask, other=0.0).to(tl.float32) - tl.load(MEAN + at + channel, mask=inside, other=0.0)
    z = x * tl.load(SCALE + at + channel, mask=inside, other=0.0)
    z += tl.load(SHIFT + at + channel, mask=inside, other=0.0)
    if RESIDUAL is not None:
        z += tl.load(RESIDUAL + offset, mask=mask, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(z, ACTIVATION)
    tl.store(Y + offset, value.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def differentiate(
    GRAD,
    X,
    RESULT,
    MEAN,
    SCALE,
    SHIFT,
    OF_GRAD,
    OF_X,
    CONSTANT,
    DX,
    DRESIDUAL,
    C,
    S,
    images,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * C * images
    channel, offset, mask = _place(C, S, tl.program_id(1) * PIXELS, ROWS, PIXELS, CHANNELS)
    inside = channel < C
    x, g = _behind(GRAD, X, RESULT, MEAN, SCALE, SHIFT, at, channel, C, offset, mask, ACTIVATION)
    dx = g * tl.load(OF_GRAD + at + channel, mask=inside, other=0.0)
    dx += x * tl.load(OF_X + at + channel, mask=inside, other=0.0)
    dx += tl.load(CONSTANT + at + channel, mask=inside, other=0.0)
    tl.store(DX + offset, dx.to(DX.dtype.element_ty), mask=mask)
    if DRESIDUAL is not None:
        tl.store(DRESIDUAL + offset, g.to(DRESIDUAL.dtype.element_ty), mask=mask)


class Images:
    """The sizes of a tensor, and the tiles and grids for it."""

    def __init__(self, x: Tensor, rows: bool) -> None:
        self.n, self.c, self.s = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        channels = min(64, power_of_2(self.c)) if rows else 1
        if not rows and self.s < _TILE // 2:
            channels = min(power_of_2(self.c), _TILE // power_of_2(self.s))
        self.tile = {"ROWS": rows, "PIXELS": min(_TILE // channels, power_of_2(self.s)), "CHANNELS": channels}
        across = triton.cdiv(self.c, channels)
        # Enough programs for the sums to fill the GPU.
        most = triton.cdiv(self.s, self.tile["PIXELS"])
        parts = max(1, min(most, triton.cdiv(8 * processors(x.device), max(1, across * self.n))))
        self.part = triton.cdiv(most, parts) * self.tile["PIXELS"]
        self.sums_grid = (self.n, triton.cdiv(self.s, self.part), across)
        self.grid = (self.n, most, across)  # the first may be of any size, the others up to 65,535

    def partial(self, x: Tensor) -> list[Tensor]:
        return [x.new_empty(self.n, self.sums_grid[1], self.c, dtype=torch.float32) for _ in range(2)]

    def counts(self, x: Tensor) -> Tensor:
        """Pixels of each part, (parts, 1)."""
        begin = torch.arange(self.sums_grid[1], dtype=torch.float32, device=x.device) * self.part
        return (self.s - begin).clamp(max=self.part).unsqueeze(-1)


def joined(mean: Tensor, square: Tensor, count: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance of sets of values from theirs: `square` are sums of squared deviations."""
    mean, square, count = mean.double(), square.double(), count.double().expand_as(mean)  # small, and exact
    total = count.sum(over, keepdim=True)
    all_mean = (mean * (count / total)).sum(over, keepdim=True)
    variance = ((square + count * (mean - all_mean).square()) / total).sum(over, keepdim=True)
    return all_mean.float(), variance.float()


def run_moments(x: Tensor, images: Images) -> tuple[Tensor, Tensor, Tensor]:
    """(N, parts, C) means and sums of squared deviations, and the counts that belong to them."""
    mean, square = images.partial(x)
    launch(
        moments,
        images.sums_grid,
        x,
        mean,
        square,
        images.c,
        images.s,
        images.part,
        num_warps=4,
        **cast(Any, images.tile),
    )
    return mean, square, images.counts(x)


def run_results(x, residual, mean, scale, shift, y, images, per_image, activation) -> None:
    launch(
        results,
        images.grid,
        x,
        residual,
        mean,
        scale,
        shift,
        y,
        images.c,
        images.s,
        int(per_image),
        ACTIVATION=activation,
        num_warps=4,
        **images.tile,
    )


def run_sums(grad, x, result, mean, scale, shift, rstd, images, per_image, activation) -> tuple[Tensor, Tensor]:
    """(N, C) each."""
    plain, product = images.partial(x)
    launch(
        sums,
        images.sums_grid,
        grad,
        x,
        result,
        mean,
        scale,
        shift,
        rstd,
        plain,
        product,
        images.c,
        images.s,
        images.part,
        int(per_image),
        ACTIVATION=activation,
        num_warps=4,
        **images.tile,
    )
    return plain.sum(1), product.sum(1)


def run_differentiate(
    grad, x, result, mean, scale, shift, of_grad, of_x, constant, dx, dresidual, images, per_image, activation
) -> None:
    launch(
        differentiate,
        images.grid,
        grad,
        x,
        result,
        mean,
        scale,
        shift,
        of_grad,
        of_x,
        constant,
        dx,
        dresidual,
        images.c,
        images.s,
        int(per_image),
        ACTIVATION=activation,
        num_warps=4,
        **images.tile,
    )


def factors(rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """scale and shift of channels, contiguous float32, in the shape of rstd: (C,) or (N, C)."""
    scale = rstd if weight is None else rstd * weight.float()
    shift = torch.zeros_like(rstd) if bias is None else bias.float().expand_as(rstd)
    return scale.contiguous(), shift.contiguous()
