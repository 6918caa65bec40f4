"""A linear layer on the package's matrix product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops._arguments import autocast_dtype
from ..ops._registry import needs_grad
from ..ops.linear import linear, pack_weight, packed_linear

_FEW = 16  # tokens up to which the kernel reads the weight as it is
_PROBED = 16  # rows and columns

# Beside the weights: for each, what says that it is still the same, and its packed form. Neither saved nor copied.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Linear(nn.Linear):
    """``x @ weight.T + bias``: `torch.nn.Linear` with its arguments, parameters and state dict.

    Where no gradient is needed, more than 16 tokens read a packed copy of the weight, made on first use, which takes
    memory once more (for float16 and float32 up to twice that on CPUs with tile units). It is dropped when the weight
    is written, moved or trained. Writes of single elements through ``weight.data``, which PyTorch does not count, may
    go unseen; call `forget_packed` after them.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear_by_packed(x, self.weight, self.bias)


def linear_by_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`bigkernels.functional.linear`, from a packed weight where that is of use."""
    if torch.compiler.is_dynamo_compiling():
        return linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        if _packed:
            forget_packed(weight)
        return linear(x, weight, bias)
    if x.numel() <= _FEW * x.shape[-1]:
        return linear(x, weight, bias)
    return packed_linear(x, weight, bias, _packed_of(weight, autocast_dtype(x.device) or x.dtype))


def forget_packed(weight: Tensor) -> None:
    """Drop the packed copy of a weight."""
    _packed.pop(weight, None)


def _packed_of(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    if not weight.is_cpu or weight.dim() != 2 or not weight.numel():
        return None
    version = 0 if weight.is_inference() else weight._version
    key = weight.data_ptr(), version, weight.shape, weight.stride(), weight.dtype, dtype
    # Old code writes through `.data`, which counts nothing: a sample of the values tells.
    n, k = weight.shape
    probe = weight.detach()[:: -(-n // _PROBED), :: -(-k // _PROBED)]
    held = _packed.get(weight)
    if held is not None and held[0] == key and torch.equal(held[1], probe):
        return held[2]
    packed = pack_weight(weight.detach(), dtype)
    if packed is not None:
        _packed[weight] = key, probe.clone(), packed
    return packed
