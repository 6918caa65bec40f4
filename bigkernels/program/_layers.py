"""Linear layers as the program's products know them, and their value in any dtype without a copy of their weight."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from ..nn.linear import Linear
from ..nn.quantized import Quantized
from ..nn.quantized_linear import QuantizedLinear
from ..quantization.layers import conv1d, rows
from ._ir import StoredLinear

_PART = 2**17
_DECODED = 2**18  # elements of a weight in codes that are there at once
_BY: ContextVar[Callable[[object, Tensor], Tensor] | None] = ContextVar("products", default=None)


def is_linear(module: object) -> bool:
    """Whether a module is a linear layer and nothing more."""
    kind = type(module)
    return kind in (nn.Linear, Linear, QuantizedLinear, StoredLinear) or (kind is conv1d() and kind is not None)


def dense(module: nn.Module | StoredLinear) -> Tensor:
    """The weight (N, K) of a linear layer; dequantized for this call where it is in codes."""
    if isinstance(module, QuantizedLinear):
        return module.qweight.dequantize()
    if isinstance(module, StoredLinear):
        return module.weight.T if module.transposed else module.weight
    return rows(module)


def shape(module: nn.Module | StoredLinear) -> tuple[int, int]:
    """(N, K) of a linear layer's weight."""
    if isinstance(module, Quantized):
        return tuple(module.qweight.shape)
    return tuple(dense(module).shape)


def apply(module: nn.Module | StoredLinear, x: Tensor) -> Tensor:
    """The layer in the dtype of `x`; within `products`, of float64, as that says."""
    by = _BY.get()
    return computed(module, x) if by is None or x.dtype != torch.float64 else by(module, x)


@contextmanager
def products(by: Callable[[object, Tensor], Tensor]) -> Iterator[None]:
    """Inside, `by(module, x)` stands for the product of a linear layer with `x`, (..., K) in float64."""
    token = _BY.set(by)
    try:
        yield
    finally:
        _BY.reset(token)


def computed(module: nn.Module | StoredLinear, x: Tensor) -> Tensor:
    """The layer in the dtype of `x`, with its own weight."""
    if not isinstance(module, QuantizedLinear):
        return product(x, dense(module), module.bias)
    weight = module.qweight
    rows, part = weight.shape[0], max(_DECODED // max(weight.shape[1], 1), 1)
    parts = (weight.rows(i, min(i + part, rows)).dequantize() for i in range(0, max(rows, 1), part))
    out = torch.cat([product(x, w) for w in parts], -1)
    return out if module.bias is None else out + module.bias.to(x.dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of `x`; rows of the weight are cast some at a time."""
    if weight.dtype == x.dtype:
        out = x @ weight.T
    else:
        part = max(_PART // max(weight.shape[1], 1), 1)
        out = torch.cat([x @ w.to(x.dtype).T for w in weight.split(part)], -1)
    return out if bias is None else out + bias.to(x.dtype)
