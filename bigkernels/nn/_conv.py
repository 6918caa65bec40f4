"""Convolutions whose weights `pack` declared as not written, by oneDNN with the weights as it wants them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch_private import forward_ad
from ..ops._registry import has_values, needs_grad


@functools.cache
def unavailable() -> str | None:
    """Why this build of PyTorch has no convolution on prepacked weights; None if it has. `torch.compile` calls the same
    operators.
    """
    names = ("_convolution_pointwise", "_reorder_convolution_weight")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return "PyTorch is built without oneDNN"
    module = nn.Conv2d(3, 5, 3, stride=2, padding=1, device="cpu", dtype=torch.float32).requires_grad_(False)
    x = torch.linspace(-1, 1, 3 * 42, dtype=torch.float32, device="cpu").view(1, 3, 6, 7)
    try:
        right = torch.allclose(_convolve(module, x, _packed(module, x)), module(x), rtol=1e-4, atol=1e-5)
    except Exception as error:  # noqa: BLE001  names that are not public may have become anything
        return f"oneDNN's convolution raised {type(error).__name__}"
    return None if right else "oneDNN's convolution computes something else"


def packs(module: nn.Module) -> bool:
    """Whether a module is a convolution that `packed_conv2d` may compute."""
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    return unavailable() is None


def packed_conv2d(module: nn.Conv2d, x: Tensor, copies: dict) -> Tensor | None:
    """What a module that `packs` computes, from the weight packed in `copies`; None where its own forward has to."""
    weight, bias = module.weight, module.bias
    if x.dim() != 4 or type(x) is not Tensor or needs_grad(x, weight, bias) or not has_values(x):
        return None
    if forward_ad._current_level >= 0:  # a tangent may hang on it
        return None
    if not (x.is_cpu and weight.is_cpu) or not x.numel() or torch.is_autocast_enabled("cpu"):
        return None
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype) or not torch.backends.mkldnn.enabled:
        return None
    if x.dtype != torch.float32 and not (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    # oneDNN gives channels-last, as PyTorch's convolution does where one of its operands lies so. To give a contiguous
    # result costs more than packing saves.
    if x.is_contiguous() and weight.is_contiguous():
        return None
    if x.shape[1] != weight.shape[1] * module.groups or not has_values(weight) or not _covers(module, x):
        return None
    # The storage beside the address: what `weight.data = ...` frees is where the next one may be allocated.
    storage = StorageWeakRef(weight.untyped_storage())
    options = module.stride, module.padding, module.dilation, module.groups
    key = storage, weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, options
    held = copies.get("conv2d")
    if held is None or held[0] != key:
        held = copies["conv2d"] = key, _packed(module, x)
    return _convolve(module, x, held[1])


def _covers(module: nn.Conv2d, x: Tensor) -> bool:
    """Whether the image is as large as the kernel; PyTorch's error says so best."""
    sizes: Any = zip(x.shape[2:], module.padding, module.dilation, module.weight.shape[2:], strict=True)
    return all(n + 2 * padding > dilation * (k - 1) for n, padding, dilation, k in sizes)


def _packed(module: nn.Conv2d, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_convolution_weight(
            module.weight.detach(), module.padding, module.stride, module.dilation, module.groups, list(x.shape)
        )


def _convolve(module: nn.Conv2d, x: Tensor, packed: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, module.bias, module.padding, module.stride, module.dilation, module.groups, "none", [], ""
        )
