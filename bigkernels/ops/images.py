"""What GroupNorm and BatchNorm share: tensors (N, C, ...) as planes or rows of channels, and their activations."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .activations import NUMBERS as _NUMBERS
from .arguments import check_same_device, check_shape, check_tensor

# By name, the number by which kernels know them; None is no activation.
NUMBERS = {None: _NUMBERS["identity"]} | {name: _NUMBERS[name] for name in ("silu", "gelu", "gelu_tanh", "relu")}
NAMES = {number: name for name, number in NUMBERS.items()}


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation == "silu":  # of operators whose derivatives of every kind torch has
        return x * torch.sigmoid(x)
    return x if activation is None else ACTIVATIONS[activation](x)


def has_rows(x: Tensor) -> bool:
    """Whether the channels of a pixel are neighbours in memory, and the pixels of a channel are not."""
    if x.dim() == 2:
        return True
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def lies(x: Tensor, rows: bool) -> bool:
    """Whether a tensor is contiguous, or with rows has its channels innermost."""
    return (x.movedim(1, -1) if rows else x).is_contiguous()


def arranged(x: Tensor, rows: bool) -> Tensor:
    """x itself where it lies so, else a copy: the channels innermost with rows, else contiguous."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if rows else x.contiguous()


def empty(x: Tensor, rows: bool) -> Tensor:
    """A tensor of the shape, dtype and device of x that lies so."""
    if not rows:
        return x.new_empty(x.shape)
    # No view, which autograd would not let users write to.
    strides = torch.empty((x.shape[0], *x.shape[2:], x.shape[1]), dtype=x.dtype, device="meta").movedim(-1, 1).stride()
    return x.new_empty_strided(x.shape, strides)


def over(x: Tensor) -> list[int]:
    """The dimensions that are no channels."""
    return [0, *range(2, x.dim())]


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


def per_channel(t: Tensor, x: Tensor) -> Tensor:
    """(N, C) or (C,), to be broadcast over x."""
    return t.reshape(*t.shape, *(1,) * (x.dim() - 2))


def gradients_of_sums(grad, x, mean, rstd, weight, bias, activation, result):
    """(g, xhat, dweight, dbias) in one wide dtype: g is the gradient behind the activation."""
    scale, shift = (None if t is None else per_channel(t.to(x.dtype), x) for t in (weight, bias))
    xhat = (x - per_channel(mean, x)) * per_channel(rstd, x)
    name = NAMES[activation]
    if result is not None and name == "relu":
        grad = torch.where(result <= 0, 0.0, grad)
    elif name is not None:
        before = xhat if scale is None else xhat * scale
        with torch.enable_grad():
            leaf = (before if shift is None else before + shift).detach().requires_grad_()
            (grad,) = torch.autograd.grad(activate(leaf, name), leaf, grad)
    dweight = x.new_empty(0) if weight is None else (grad * xhat).sum(over(x)).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else grad.sum(over(x)).to(bias.dtype)
    return grad, xhat, dweight, dbias
