"""A linear layer on the package's matrix product."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from .._load import cpu_library
from ..ops.arguments import autocast_dtype
from ..ops.linear import linear, pack_weight, packed_linear
from ..ops.registry import has_values, needs_grad
from ._conv import packs
from ._steps import count_steps

_FEW = 16  # tokens up to which the kernel reads the weight as it is

# Of weights that `pack` declared: by dtype of the tokens, what says that the weight is still the same, and its packed
# form. Neither saved nor copied.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


# From how many to how many tokens a call without gradients is no slower by the kernel than by
# `torch.nn.functional.linear`, by ISA level and dtype (csrc/cpu/NOTES.md).
_TOKENS: dict[str, dict[torch.dtype, tuple[int, int]]] = {
    "amx": {torch.bfloat16: (1, 64)},
    "avx512": {torch.bfloat16: (1, 8), torch.float16: (4, sys.maxsize), torch.float32: (1, 5)},
    "avx512_vnni": {torch.bfloat16: (2, sys.maxsize), torch.float16: (2, sys.maxsize), torch.float32: (2, 5)},
    "avx2": {torch.bfloat16: (4, sys.maxsize), torch.float16: (4, sys.maxsize), torch.float32: (1, 4)},
}


class Linear(nn.Linear):
    """``x @ weight.T + bias``: `torch.nn.Linear` with its arguments, parameters and state dict."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_by_packed(x, self.weight, self.bias)


def pack(model: nn.Module) -> list[str]:
    """Declare that the weights of a model's linear layers and convolutions will not be written, so that calls with more
    than 16 tokens and no gradient read a packed copy, made on first use, which takes memory once more (for float16 and
    float32 up to twice that on CPUs with tile units). It is worth it where packing takes long beside the product: a few
    dozen tokens on tile units. Layers are those of class `bigkernels.nn.Linear`, and `torch.nn.Linear` patched by
    `bigkernels.patch`. `torch.nn.Conv2d` patched by it (float32 and bfloat16, CPU, channels-last) reads a copy in
    oneDNN's order, which a convolution otherwise makes anew in every call.

    A weight that is written all the same, moved or trained loses its copy, as far as PyTorch counts writes; steps of
    optimizers count. After one through ``weight.data``, a numpy array or another process, call `bigkernels.refresh`,
    which forgets all copies: call `pack` again for new ones.

    Returns:
        The names of the layers.
    """
    count_steps()
    names = []
    for name, module in model.named_modules():
        if type(module) in (Linear, nn.Linear) and module.weight.is_cpu and not module.weight.is_inference():
            _packed[module.weight] = {}
            names.append(name)
        elif packs(module) and module.weight.is_cpu and not module.weight.is_inference():
            _packed[module.weight] = {}
            names.append(name)
    return names


def packed_copies(weight: Tensor) -> dict | None:
    """Where the packed copies of a weight are kept that `pack` declared as not written; None if it did not."""
    if torch.compiler.is_compiling():  # which cannot look into it, and packs by itself
        return None
    return _packed.get(weight) if len(_packed) else None


@functools.cache
def _tokens() -> dict[torch.dtype, tuple[int, int]]:
    return {} if cpu_library().reason else _TOKENS.get(torch.ops.bigkernels.cpu_isa(), {})


def may_pay() -> bool:
    """Whether the kernel is known to be as fast as PyTorch's product for some calls on this machine."""
    return bool(_tokens())


def pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel computes a call without gradients at least as fast as PyTorch: a few tokens, or a weight that
    `pack` declared. False wherever something but values is asked for (graphs, transforms, autocast).
    """
    if type(x) is not Tensor or x.dim() == 0 or not has_values(x) or needs_grad(x, weight, bias):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    least, most = _tokens().get(x.dtype, (1, 0))
    return max(least * x.shape[-1], 1) <= x.numel() <= most * x.shape[-1] or (len(_packed) > 0 and weight in _packed)


def linear_by_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`bigkernels.functional.linear`, from a packed weight where `pack` declared it."""
    if torch.compiler.is_dynamo_compiling() or not _packed or x.numel() <= _FEW * x.shape[-1]:
        return linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        forget_packed(weight)
        return linear(x, weight, bias)
    return packed_linear(x, weight, bias, _packed_of(weight, autocast_dtype(x.device) or x.dtype))


def forget_packed(weight: Tensor) -> None:
    """Drop the packed copies of a weight; it counts as written from then on."""
    _packed.pop(weight, None)


def _packed_of(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    copies = _packed.get(weight)
    if copies is None or weight.dim() != 2 or not weight.numel() or not has_values(weight):
        return None
    # The storage beside the address: what `weight.data = ...` frees is where the next one may be allocated.
    storage = StorageWeakRef(weight.untyped_storage())
    key = storage, weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype
    held = copies.get(dtype)
    if held is None or held[0] != key:
        held = copies[dtype] = key, pack_weight(weight.detach(), dtype)
    return held[1]
