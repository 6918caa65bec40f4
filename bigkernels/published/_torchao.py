"""How torchao lays its tensor classes out in safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ._integers import integers
from ._method import Method, floats
from ._packed import Packed

_WHAT = "bigkernels.load_quantized"


class TorchAO(Method):
    """A tensor class lies in several tensors, ``_weight_qdata`` and others; the file's header describes it in JSON."""

    mark = "_weight_qdata"
    parts = ("qdata", "scale", "zero_point", "act_pre_scale", "act_quant_scale", "act_quant_zero_point")

    def layers(self, names: Collection[str]) -> Iterator[tuple[str, str, dict[str, str]]]:
        for name in names:
            match = re.fullmatch(r"(?:(.*)\.)?_(\w+)_qdata", name)
            if match is not None:
                owner, key = f"{match[1]}." if match[1] else "", match[2]
                held = {part: f"{owner}_{key}_{part}" for part in self.parts if f"{owner}_{key}_{part}" in names}
                yield f"{owner}{key}", f"{owner}{key}", held

    def decode(self, name: str, held: dict[str, Tensor]) -> Packed | Tensor:
        kind, about = self._described(name)
        codes, scale = held["qdata"], held.get("scale")
        if scale is None or not scale.is_floating_point():
            raise ValueError(f"{_WHAT}: the scales of {name} are missing or no floats")
        if "act_pre_scale" in held:
            raise ValueError(f"{_WHAT}: {name} scales its inputs (act_pre_scale), for which no format here has a place")
        shape = codes.shape
        if codes.dim() not in (2, 3) or not codes.numel():
            raise ValueError(f"{_WHAT}: the codes of {name} have shape {tuple(shape)}")
        n, k = shape[:-1].numel(), shape[-1]
        block = about.get("block_size")
        if (
            not isinstance(block, list)
            or len(block) != len(shape)
            or not all(isinstance(b, int) and b > 0 and not s % b for b, s in zip(block, shape, strict=True))
        ):
            raise ValueError(f"{_WHAT}: {name} has blocks of {block} in a weight {tuple(shape)}")
        codes = codes.reshape(n, k)
        if kind == "Float8Tensor":
            if codes.dtype != torch.float8_e4m3fn:
                raise ValueError(f"{_WHAT}: {name} has codes of {codes.dtype}, expected torch.float8_e4m3fn")
            return _shaped(floats(name, codes, self._numbers(name, scale, block, shape)), shape)
        if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            raise ValueError(
                f"{_WHAT}: {name} is a {kind} of torchao; accepted are Int8Tensor, Float8Tensor and "
                "IntxUnpackedToInt8Tensor"
            )
        if codes.dtype != torch.int8:
            raise ValueError(f"{_WHAT}: {name} has codes of {codes.dtype}, expected torch.int8")
        zero = held.get("zero_point")
        zero = None if zero is None else self._numbers(name, zero, block, shape)
        weight = integers(codes, zero, self._numbers(name, scale, block, shape), dynamic=_rounds_tokens(kind, about))
        return _shaped(weight, shape)

    def _described(self, name: str) -> tuple[str, Mapping[str, Any]]:
        try:
            said = json.loads(self.said[name])
            kind, about = said["_type"], said["_data"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{_WHAT}: the file's header does not describe {name} as torchao does") from error
        if not isinstance(about, Mapping):
            raise ValueError(f"{_WHAT}: the file's header describes {name} as {about!r}")
        return str(kind), about

    def _numbers(self, name: str, t: Tensor, block: list[int], shape: torch.Size) -> Tensor:
        """One a block, as (N, G): several rows may share theirs."""
        expected = torch.Size(s // b for s, b in zip(shape, block, strict=True))
        if t.numel() != expected.numel():
            raise ValueError(
                f"{_WHAT}: scales or zero points of {name} have shape {tuple(t.shape)}, expected {tuple(expected)}"
            )
        t = t.reshape(expected)
        for dim, size in enumerate(block[:-1]):
            t = t.repeat_interleave(size, dim)
        return t.flatten(0, -2).contiguous()


def _rounds_tokens(kind: str, about: Mapping[str, Any]) -> bool:
    """Whether tokens are rounded to 8 bits as `Int8Dynamic` does: each alone, symmetric."""
    said = about.get("act_quant_kwargs")
    if kind != "Int8Tensor" or not isinstance(said, Mapping) or not isinstance(said.get("_data"), Mapping):
        return False
    how = said["_data"]
    granularity, mapping = how.get("granularity"), how.get("mapping_type")
    alone = isinstance(granularity, Mapping) and granularity.get("_type") == "PerRow"
    symmetric = isinstance(mapping, Mapping) and mapping.get("_data") == "SYMMETRIC"
    return alone and symmetric and not how.get("reduce_range")


def _shaped(found: Packed | Tensor, shape: torch.Size) -> Packed | Tensor:
    if isinstance(found, Tensor):
        return found.view(shape)
    return Packed(found.format, tuple(shape), found.tensors)
