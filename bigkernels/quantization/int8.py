"""8-bit integers, one scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.codes import INT8, Operands
from .format import Format, ratio


@dataclass(frozen=True)
class Int8(Format):
    """``code * scale``, symmetric: scale is the row's largest magnitude / 127, codes are rounded half to even."""

    name: ClassVar[str] = "int8"

    def encode(self, rows: Tensor, data: None = None) -> dict[str, Tensor]:
        scale = rows.abs().amax(1) / 127 if rows.shape[1] else rows.new_zeros(rows.shape[0])
        codes = ratio(rows, scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        return {"codes": codes, "scale": scale}

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"codes": (shape, torch.int8), "scale": (shape[:1], torch.float32)}

    def operands(self, tensors: dict[str, Tensor]) -> Operands:
        return Operands.of(INT8, tensors["codes"], tensors["scale"])


@dataclass(frozen=True)
class Int8Dynamic(Int8):
    """Weights as `Int8`; each token is rounded to 8-bit integers when it comes, and integers are multiplied."""

    name: ClassVar[str] = "int8-dynamic"
    dynamic: ClassVar[bool] = True

    def exact(self) -> Int8:
        return Int8()
