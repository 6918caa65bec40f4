"""8-bit integers, one scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.codes import INT8, Operands
from . import gptq
from .format import Format, ratio

_ALGORITHMS = ("rtn", "gptq")
_PARTS = tuple(1 - i / 20 for i in range(1, 9))  # of a row's range that clipping tries


@dataclass(frozen=True)
class Int8(Format):
    """``code * scale``, symmetric, codes -127 to 127.

    Args:
        algorithm: "rtn": scale is the row's largest magnitude / 127, and codes are rounded to nearest, half to even.
            "gptq" is calibrated: it rounds element after element and moves the error of each to those that follow
            (Frantar et al. 2022, https://arxiv.org/abs/2210.17323), with the scale, down to 0.6 of that one, that costs
            least on inputs like those given.

    Raises:
        ValueError: another algorithm.
    """

    name: ClassVar[str] = "int8"
    algorithm: str = "rtn"

    def __post_init__(self) -> None:
        if self.algorithm not in _ALGORITHMS:
            raise ValueError(
                f"bigkernels.quantization.{type(self).__name__}: algorithm is {self.algorithm!r}; accepted are "
                f"{', '.join(_ALGORITHMS)}"
            )

    @property
    def calibrated(self) -> bool:
        return self.algorithm == "gptq"

    def blind(self) -> Int8:
        return type(self)()

    def prepare(self, weight: Tensor, hessian: Tensor) -> gptq.Order:
        return gptq.Order.of(hessian)

    def encode(self, rows: Tensor, data: gptq.Order | None = None) -> dict[str, Tensor]:
        scale = rows.abs().amax(1) / 127 if rows.shape[1] else rows.new_zeros(rows.shape[0])
        if data is None or not rows.shape[1]:
            return {"codes": _nearest(rows, scale).to(torch.int8), "scale": scale}
        scale = _clipped(rows, scale, data.importance)
        zero = torch.zeros_like(scale)
        codes = gptq.codes(rows, scale[:, None], zero[:, None], rows.shape[1], data, -127, 127)
        return {"codes": codes.to(torch.int8), "scale": scale}

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
        return Int8(self.algorithm)


def _nearest(rows: Tensor, scale: Tensor) -> Tensor:
    return ratio(rows, scale[:, None]).round().clamp(-127, 127)


def _clipped(rows: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    """The part of each row's scale whose rounding to nearest costs least, with the importance of each element."""

    def cost(scale: Tensor) -> Tensor:
        return ((_nearest(rows, scale) * scale[:, None] - rows).square() * importance).sum(1)

    best, least = scale, cost(scale)
    for part in _PARTS:
        tried = cost(scale * part)
        best, least = torch.where(tried < least, scale * part, best), torch.minimum(tried, least)
    return best
