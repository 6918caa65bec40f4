"""Convolutions whose weights `pack` declared as not written, by oneDNN with the weights as it wants them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch_private import forward_ad
from ..ops.registry import has_values, needs_grad


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
        right = torch.allclose(
            _convolve(module, x, _packed(module, module.weight, x), module.bias), module(x), rtol=1e-4, atol=1e-5
        )
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
    weight = module.weight
    # oneDNN gives channels-last, as PyTorch's convolution does where one of its operands lies so. To give a contiguous
    # result costs more than packing saves.
    if not _fits(module, x) or (x.is_contiguous() and weight.is_contiguous()):
        return None
    key = _options(module), *_state(weight)
    held = copies.get("conv2d")
    if held is None or held[0] != key:
        held = copies["conv2d"] = key, _packed(module, weight.detach(), x)
    return _convolve(module, x, held[1], module.bias)


def folded_conv2d(
    module: nn.Conv2d, norm: nn.modules.batchnorm._BatchNorm, x: Tensor, copies: dict, relu: bool = False
) -> Tensor | None:
    """norm(module(x)), and its positive part where `relu` says so, for a norm of running statistics, by a weight and a
    bias that contain it, kept in `copies`; None where the modules themselves have to compute it.
    """
    mean, var = norm.running_mean, norm.running_var
    if norm.training or mean is None or var is None or len(mean) != module.out_channels or not _fits(module, x):
        return None
    parts = [t for t in (module.weight, module.bias, mean, var, norm.weight, norm.bias) if t is not None]
    if needs_grad(*parts) or not all(map(has_values, parts)) or not all(t.is_cpu for t in parts):
        return None
    if any(t.dtype not in (x.dtype, torch.float32) for t in parts):
        return None
    packs_it = not (x.is_contiguous() and module.weight.is_contiguous())
    key = _options(module), norm.eps, packs_it, *(_state(t) for t in parts)
    held = copies.get(norm)
    if held is None or held[0] != key:
        weight, bias = _folded(module, norm, mean, var)
        held = copies[norm] = key, (_packed(module, weight, x) if packs_it else weight), bias
    if packs_it:
        return _convolve(module, x, held[1], held[2], relu)
    with torch.no_grad():
        y = nn.functional.conv2d(x, held[1], held[2], module.stride, module.padding, module.dilation, module.groups)
        return y.relu_() if relu else y


@torch.no_grad()
def _folded(module: nn.Conv2d, norm: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a convolution that normalises its result; in float64, and rounded once."""
    scale = torch.rsqrt(var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean.double() if module.bias is None else module.bias.double() - mean.double()
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    weight = module.weight.double() * scale.view(-1, 1, 1, 1)
    dtype = module.weight.dtype
    layout = torch.contiguous_format if module.weight.is_contiguous() else torch.channels_last
    return weight.to(dtype).contiguous(memory_format=layout), bias.to(dtype)


def _fits(module: nn.Conv2d, x: Tensor) -> bool:
    weight, bias = module.weight, module.bias
    if x.dim() != 4 or type(x) is not Tensor or needs_grad(x, weight, bias) or not has_values(x):
        return False
    if forward_ad._current_level >= 0:  # a tangent may hang on it
        return False
    if not (x.is_cpu and weight.is_cpu) or not x.numel() or torch.is_autocast_enabled("cpu"):
        return False
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype) or not torch.backends.mkldnn.enabled:
        return False
    if x.dtype != torch.float32 and not (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    return x.shape[1] == weight.shape[1] * module.groups and has_values(weight) and _covers(module, x)


def _options(module: nn.Conv2d) -> tuple:
    return module.stride, module.padding, module.dilation, module.groups


def _state(t: Tensor) -> tuple:
    """What changes where a tensor is written to as PyTorch counts, or is another one."""
    # The storage beside the address: what `weight.data = ...` frees is where the next one may be allocated.
    storage = StorageWeakRef(t.untyped_storage())
    version = -1 if t.is_inference() else t._version
    return storage, t.data_ptr(), version, t.shape, t.stride(), t.dtype


def _covers(module: nn.Conv2d, x: Tensor) -> bool:
    """Whether the image is as large as the kernel; PyTorch's error says so best."""
    sizes: Any = zip(x.shape[2:], module.padding, module.dilation, module.weight.shape[2:], strict=True)
    return all(n + 2 * padding > dilation * (k - 1) for n, padding, dilation, k in sizes)


def _packed(module: nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight, module.padding, module.stride, module.dilation, module.groups, list(x.shape)
        )


def _convolve(module: nn.Conv2d, x: Tensor, packed: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._convolution_pointwise(
            x,
            packed,
            bias,
            module.padding,
            module.stride,
            module.dilation,
            module.groups,
            "relu" if relu else "none",
            [],
            "",
        )
