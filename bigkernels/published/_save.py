"""Quantized models as other libraries read them: compressed-tensors (vLLM) and GPTQ folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn import LoRALinear, QuantizedLinear
from ..nn.quantized import Quantized
from ..quantization import FP8, Int4, Int8, Int8Dynamic, QuantizedWeight
from ..quantization.layers import is_linear, is_transposed

_WHAT = "bigkernels.save_quantized"
Stored = tuple[dict[str, Tensor], dict[str, Any]]


def stored_as(model: nn.Module, method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's tensors as a method stores them, and what config.json says of it.

    Raises:
        ValueError: there is no such method, or a layer cannot be stored so.
    """
    methods: dict[str, Callable] = {"compressed-tensors": _compressed, "gptq": _gptq}
    if method not in methods:
        raise ValueError(f"{_WHAT}: method is {method!r}; accepted are {', '.join(methods)}")
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            raise ValueError(f"{_WHAT}: {path} has an adapter; merge it, or save it by LoRALinear.save")
        if isinstance(module, Quantized):
            if not isinstance(module, QuantizedLinear) or module._tie is not None:
                raise ValueError(
                    f"{_WHAT}: {path} is a {type(module).__name__}, or shares its codes, which {method} cannot store"
                )
            if module._shell is not None and is_transposed(module._shell.kind):
                raise ValueError(f"{_WHAT}: {path} stands for a Conv1D, whose weight {method} cannot store")
            layers[path] = module
    if not layers:
        raise ValueError(f"{_WHAT}: the model has no quantized layers")
    state: dict[str, Tensor] = {}
    held: set[str] = set()
    config = methods[method](model, layers, state)
    for path, module in layers.items():
        held |= {f"{path}.{name}" for name in module._buffers}
    state |= {name: t for name, t in model.state_dict().items() if name not in held}
    return state, config


def _compressed(model: nn.Module, layers: dict[str, QuantizedLinear], state: dict[str, Tensor]) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for path, module in layers.items():
        tensors, scheme = _compressed_layer(path, module.qweight)
        state |= {f"{path}.{name}": t for name, t in tensors.items()}
        group = groups.setdefault(json.dumps(scheme, sort_keys=True), scheme | {"targets": []})
        group["targets"].append(path)
    ignored = [path for path, m in model.named_modules() if is_linear(type(m))]
    if len(groups) == 1:
        next(iter(groups.values()))["targets"] = ["Linear"]
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "ignore": ignored,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
    }


def _compressed_layer(path: str, qweight: QuantizedWeight) -> Stored:
    config, t = qweight.format, qweight.tensors
    plain = {"symmetric": True, "dynamic": False, "strategy": "channel"}
    if isinstance(config, Int8):  # `Int8Dynamic` is one
        scheme = {"format": "int-quantized", "weights": {"num_bits": 8, "type": "int", **plain}}
        if isinstance(config, Int8Dynamic):
            scheme["input_activations"] = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "dynamic": True,
                "strategy": "token",
            }
        return {"weight": t["codes"], "weight_scale": t["scale"][:, None]}, scheme
    if isinstance(config, FP8):
        scheme = {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float", **plain}}
        return {"weight": t["codes"].view(torch.float8_e4m3fn), "weight_scale": t["scale"][:, None]}, scheme
    codes, zero, scale = _int4(path, qweight, "compressed-tensors")
    if qweight.order is not None:
        raise ValueError(f"{_WHAT}: the groups of {path} are not of neighbours (act-order); save it as gptq")
    config = cast(Int4, config)
    half = scale.to(qweight.dtype)
    grouped = {"num_bits": 4, "type": "int", "symmetric": False, "dynamic": False, "strategy": "group"}
    scheme = {"format": "pack-quantized", "weights": grouped | {"group_size": config.group_size}}
    if qweight.shape[1] % config.group_size:
        raise ValueError(
            f"{_WHAT}: {path} has rows of {qweight.shape[1]}, no whole number of groups of {config.group_size}"
        )
    return {
        "weight_packed": pack(codes.T).T.contiguous(),
        "weight_zero_point": pack(zero),
        "weight_scale": half if torch.equal(half.float(), scale) else scale,
        "weight_shape": torch.tensor(qweight.shape, dtype=torch.int64, device="cpu"),
    }, scheme


def _gptq(model: nn.Module, layers: dict[str, QuantizedLinear], state: dict[str, Tensor]) -> dict[str, Any]:
    sizes = {module.weight_format.group_size for module in layers.values() if isinstance(module.weight_format, Int4)}
    if len(sizes) > 1:
        raise ValueError(f"{_WHAT}: gptq has one group size for all layers, and these have {sorted(sizes)}")
    found = {}
    for path, module in layers.items():
        found[path] = codes, zero, scale = _int4(path, module.qweight, "gptq")
        n, k = module.qweight.shape
        if n % 8 or k % cast(Int4, module.weight_format).group_size:
            raise ValueError(
                f"{_WHAT}: {path} is ({n}, {k}); gptq needs rows in whole groups and a multiple of 8 of them"
            )
        if not torch.equal(scale.half().float(), scale):
            raise ValueError(f"{_WHAT}: {path} has scales beyond float16, in which gptq stores them")
    # A zero point of 0 is stored in two ways by those that store one less.
    newer = any(bool((zero == 0).any()) for _, zero, _ in found.values())
    for path, (codes, zero, scale) in found.items():
        k = codes.shape[1]
        size = cast(Int4, layers[path].weight_format).group_size
        group = torch.arange(k, dtype=torch.int32, device=codes.device) // size
        order = layers[path].qweight.order
        if order is not None:  # back to the elements' own
            back = order.argsort()
            codes, group = codes[:, back], group[back]
        stored = zero if newer else zero - 1
        state |= {
            f"{path}.qweight": pack(codes.T),
            f"{path}.qzeros": pack(stored).T.contiguous(),
            f"{path}.scales": scale.half().T.contiguous(),
            f"{path}.g_idx": group,
        }
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": sizes.pop(),
        "sym": False,
        "desc_act": any(module.qweight.order is not None for module in layers.values()),
        "checkpoint_format": "gptq_v2" if newer else "gptq",
    }


def _int4(path: str, qweight: QuantizedWeight, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """codes (N, K), zero points and scales (N, G) in float32."""
    if not isinstance(qweight.format, Int4):
        raise ValueError(f"{_WHAT}: {path} is {qweight.format.name}, which {method} cannot store")
    if qweight.channel is not None:
        raise ValueError(f"{_WHAT}: {path} divides its inputs (awq), for which {method} has no place")
    codes, scale, zero, row_scale, *_ = qweight.operands()
    assert scale is not None and zero is not None and row_scale is not None  # as int4 has them
    if not torch.equal(zero, zero.round()) or not bool(((zero >= 0) & (zero <= 15)).all()):
        raise ValueError(f"{_WHAT}: zero points of {path} are no integers; use Int4(algorithm='rtn')")
    flat = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, : qweight.shape[1]]
    return flat, zero.to(torch.uint8), scale.float() * row_scale[:, None]


def pack(values: Tensor) -> Tensor:
    """(m, n) values below 16 as (ceil(m / 8), n) int32, eight down a column in a word, the first lowest."""
    wide = nn.functional.pad(values.long(), (0, 0, 0, -len(values) % 8)).unflatten(0, (-1, 8))
    shift = torch.arange(0, 32, 4, dtype=torch.int64, device=values.device)[:, None]
    words = (wide << shift).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
