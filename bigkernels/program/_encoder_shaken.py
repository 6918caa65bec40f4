"""A layer with other vectors: a bias of zeros and a weight of ones leave no trace in what it computes."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization._weight import QuantizedWeight
from .suspend import RECORD, suspended

_ALSO = ("_bigkernels_encoder", "_bigkernels_program")


def shaken(layer: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy that shares all but the vectors, which are others; and each of its modules' original."""
    generator = torch.Generator("cpu").manual_seed(29)
    memo: dict[int, Any] = {}
    modules = list(layer.modules())
    for module in modules:
        for key in _ALSO:
            held = module.__dict__.get(key)
            memo[id(held)] = held
        config = module.__dict__.get("config")
        memo[id(config)] = config
        record = module.__dict__.get(RECORD)
        if record is not None:
            memo[id(record)] = {}
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None:
                memo[id(t)] = _other(t, generator)
        for value in vars(module).values():
            if isinstance(value, QuantizedWeight):
                memo[id(value)] = value
    with suspended(layer):
        made = copy.deepcopy(layer, memo)
    return made, dict(zip(made.modules(), modules, strict=True))


def _other(t: Tensor, generator: torch.Generator) -> Tensor:
    if not isinstance(t, nn.Parameter) or t.dim() != 1 or not t.is_floating_point() or t.device.type == "meta":
        return t
    noise = torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.device)
    with torch.no_grad():
        return nn.Parameter((t.double() + 0.1 * noise).to(t.dtype), requires_grad=t.requires_grad)


def original(value: Any, modules: dict[nn.Module, nn.Module]) -> Any:
    """Operations with the originals in the places of their copies."""
    if isinstance(value, nn.Module):
        return modules.get(value, value)
    if isinstance(value, (list, tuple)):
        return type(value)(original(v, modules) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: original(getattr(value, f.name), modules) for f in fields(value)})
    return value
