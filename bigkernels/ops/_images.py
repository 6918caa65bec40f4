"""What GroupNorm and BatchNorm share: tensors (N, C, ...) as planes or rows of channels, and their activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import check_same_device, check_shape, check_tensor
from .mlp import _NUMBERS, ACTIVATIONS

# By name, the number by which kernels know them; None is no activation.
NUMBERS = {None: _NUMBERS["identity"]} | {name: _NUMBERS[name] for name in ("silu", "gelu", "gelu_tanh", "relu")}
NAMES = {number: name for name, number in NUMBERS.items()}


def activate(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else ACTIVATIONS[activation](x)


def has_rows(x: Tensor) -> bool:
    """Whether the channels of a pixel are neighbours in memory, and the pixels of a channel are not."""
    if x.dim() == 2:
        return True
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def arranged(x: Tensor, rows: bool) -> Tensor:
    """(N, S, C) with rows, else (N, C, S); contiguous, a view where x lies so."""
    # Sizes in full: of a tensor without elements -1 would be ambiguous.
    batch, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if rows:
        return x.movedim(1, -1).contiguous().view(batch, pixels, channels)
    return x.contiguous().view(batch, channels, pixels)


def back(y: Tensor, shape: Sequence[int], rows: bool) -> Tensor:
    """What `arranged` took, from a contiguous tensor of its result's shape."""
    if rows:
        return y.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return y.view(*shape)


def check_images(op: str, x: object, weight: object, bias: object, activation: object, least: int) -> None:
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight, optional=True)
    check_tensor(op, "bias", bias, optional=True)
    if activation not in NUMBERS:
        names = ", ".join(name for name in NUMBERS if name)
        raise ValueError(f"bigkernels.{op}: activation is {activation!r}; accepted are None, {names}")
    if x.dim() < least:
        raise ValueError(f"bigkernels.{op}: x has shape {tuple(x.shape)}, expected (N, C, ...)")
    check_same_device(op, "x", x, weight=weight, bias=bias)
    check_shape(op, "weight", weight, x.shape[1:2], "the channels of x")
    check_shape(op, "bias", bias, x.shape[1:2], "the channels of x")


def per_channel(t: Tensor, rows: bool) -> Tensor:
    """(N or 1, C), or (C,), to be broadcast over what `arranged` gives."""
    return t.unsqueeze(-2) if rows else t.unsqueeze(-1)


def gradients_of_sums(grad, x, mean, rstd, weight, bias, activation, result, rows, shared):
    """(g, xhat, dweight, dbias) of arranged tensors in one wide dtype: g is the gradient behind the activation."""
    wide = x.dtype
    scale, shift = (None if t is None else per_channel(t.to(wide), rows) for t in (weight, bias))
    xhat = (x - per_channel(mean, rows)) * per_channel(rstd, rows)
    name = NAMES[activation]
    if result is not None and name == "relu":
        grad = torch.where(result <= 0, 0.0, grad)
    elif name is not None:
        before = xhat if scale is None else xhat * scale
        with torch.enable_grad():
            leaf = (before if shift is None else before + shift).detach().requires_grad_()
            (grad,) = torch.autograd.grad(activate(leaf, name), leaf, grad)
    over = (0, 1) if rows else (0, 2)
    dweight = x.new_empty(0) if weight is None else (grad * xhat).sum(over).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else grad.sum(over).to(bias.dtype)
    return grad, xhat, dweight, dbias
