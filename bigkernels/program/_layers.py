"""Linear layers as the program's products know them, and their value in any dtype without a copy of their weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.linear import Linear
from ..nn.quantized_linear import QuantizedLinear
from ..quantization._layers import conv1d, rows
from ._ir import StoredLinear

_PART = 2**16


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


def apply(module: nn.Module | StoredLinear, x: Tensor) -> Tensor:
    """The layer in the dtype of `x`."""
    return product(x, dense(module), module.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of `x`; rows of the weight are cast some at a time."""
    if weight.dtype == x.dtype:
        out = x @ weight.T
    else:
        part = max(_PART // max(weight.shape[1], 1), 1)
        out = torch.cat([x @ w.to(x.dtype).T for w in weight.split(part)], -1)
    return out if bias is None else out + bias.to(x.dtype)
