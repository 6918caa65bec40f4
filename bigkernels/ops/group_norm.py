"""GroupNorm (Wu and He 2018, https://arxiv.org/abs/1803.08494), and the activation behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._derivatives import gradients, is_observed
from .images import (
    NAMES,
    NUMBERS,
    activate,
    arranged,
    check_images,
    empty,
    gradients_of_sums,
    has_rows,
    per_channel,
)
from .registry import REFUSED, Operator, compute_dtype, define, needs_grad


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    """Normalise groups of channels of each image to mean 0 and variance 1, scale and shift channels, and activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias)``, computed in float32 and rounded once; the variance
    is the biased one, as in `torch.nn.functional.group_norm`. Backward keeps `x`, and neither the normalised tensor nor
    what the activation gave.

    Args:
        x: (N, C, ...), floating, contiguous or channels-last (others are copied).
        groups: into how many groups of neighbours the channels are cut; divides C.
        weight, bias: (C,), any floating dtype, or None.
        eps: added to the variance.
        activation: "silu", "gelu", "gelu_tanh", "relu" or None.

    Returns:
        A tensor of the shape, dtype and memory format of `x`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit, or the activation is unknown.
    """
    try:
        if OPERATOR.uses_kernel(x, weight, bias) and x.dim() > 1:
            number = NUMBERS[activation]
            if needs_grad(x, weight, bias):
                return _GroupNorm.apply(x, weight, bias, groups, eps, number)
            rows = has_rows(x)
            return _fwd(arranged(x, rows), weight, bias, groups, eps, number, rows)[0]
    except REFUSED:
        _check(x, groups, weight, bias, activation)
        raise
    _check(x, groups, weight, bias, activation)
    return _reference(x, weight, bias, groups, eps, activation)


def _check(x, groups, weight, bias, activation):
    check_images("functional.group_norm", x, weight, bias, activation, 2)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"bigkernels.functional.group_norm: groups must be an int, got {type(groups).__name__}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(
            f"bigkernels.functional.group_norm: {x.shape[1]} channels do not make {groups} groups of one size"
        )


def _reference(x, weight, bias, groups, eps, activation):
    # Not by `F.group_norm`, whose backward some transforms do not know.
    wide = x.to(compute_dtype(x.dtype))
    if x.numel():
        grouped = wide.reshape(x.shape[0], groups, -1)
        var, mean = torch.var_mean(grouped, -1, correction=0, keepdim=True)
        wide = ((grouped - mean) * torch.rsqrt(var + eps)).reshape(x.shape)
    y = wide if weight is None else wide * per_channel(weight.to(wide.dtype), x)
    y = y if bias is None else y + per_channel(bias.to(wide.dtype), x)
    return activate(y, activation).to(x.dtype)


def _moments(x, groups, eps):
    """mean and rstd (N, groups), float32."""
    if x.numel() == 0:
        return (x.new_zeros(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    wide = x.to(compute_dtype(x.dtype)).reshape(x.shape[0], groups, -1)
    var, mean = torch.var_mean(wide, -1, correction=0)
    return mean.float(), torch.rsqrt(var + eps).float()


def _fwd_fallback(x, weight, bias, groups, eps, activation, rows):
    y = _reference(x, weight, bias, groups, eps, NAMES[activation])
    return empty(x, rows).copy_(y), *_moments(x, groups, eps)


def _fwd_fake(x, weight, bias, groups, eps, activation, rows):
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return empty(x, rows), mean, rstd


def _bwd_fallback(grad, x, weight, bias, mean, rstd, activation, rows):
    wide = compute_dtype(x.dtype)
    groups = mean.shape[1]
    size = x.shape[1] // groups
    means, rstds = (t.to(wide).repeat_interleave(size, 1) for t in (mean, rstd))
    g, xhat, dweight, dbias = gradients_of_sums(grad.to(wide), x.to(wide), means, rstds, weight, bias, activation, None)
    if x.numel() == 0:
        return empty(x, rows), dweight, dbias
    if weight is not None:
        g = g * per_channel(weight.to(wide), x)

    def mean_of(t):  # over the group, for each channel
        means = t.reshape(x.shape[0], groups, -1).mean(-1)
        return per_channel(means.repeat_interleave(size, 1), x)

    dx = per_channel(rstds, x) * (g - mean_of(g) - xhat * mean_of(g * xhat))
    return empty(x, rows).copy_(dx), dweight, dbias


def _bwd_fake(grad, x, weight, bias, mean, rstd, activation, rows):
    dweight, dbias = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    return empty(x, rows), dweight, dbias


OPERATOR = Operator("group_norm")
_fwd = define(
    # x is contiguous, or with rows has its channels innermost; so are the results.
    "group_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, int activation, bool rows)"
    " -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_fallback,
)
_bwd = define(
    "group_norm_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, int activation,"
    " bool rows) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_fallback,
)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, activation):
        rows = has_rows(x)
        y, mean, rstd = _fwd(arranged(x, rows), weight, bias, groups, eps, activation, rows)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options = groups, eps, activation
        return y

    @staticmethod
    def again(ctx):
        x, weight, bias, *_ = ctx.saved_tensors
        rows = has_rows(x)
        return _fwd(arranged(x, rows), weight, bias, *ctx.options, rows)[0]

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        groups, eps, activation = ctx.options
        if is_observed(grad):
            name = NAMES[activation]
            grads = gradients(lambda x, w, b: _reference(x, w, b, groups, eps, name), (x, weight, bias), (grad,))
            return *grads, None, None, None
        rows = has_rows(x)
        dx, dweight, dbias = _bwd(arranged(grad, rows), arranged(x, rows), weight, bias, mean, rstd, activation, rows)
        return (dx, dweight if weight is not None else None, dbias if bias is not None else None, None, None, None)
