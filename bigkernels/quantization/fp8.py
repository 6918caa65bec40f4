"""8-bit floats (e4m3; Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433), one scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import codes as kinds
from ..ops.codes import Operands
from .format import Format, ratio

_LARGEST = 448.0


@dataclass(frozen=True)
class FP8(Format):
    """``code * scale``: scale takes the row's largest magnitude to 448, the largest that e4m3 holds.

    Codes are stored as bytes: pickle and many operators do not know torch's floats of 8 bits.
    """

    name: ClassVar[str] = "fp8"

    def encode(self, rows: Tensor, data: None = None) -> dict[str, Tensor]:
        scale = rows.abs().amax(1) / _LARGEST if rows.shape[1] else rows.new_zeros(rows.shape[0])
        codes = ratio(rows, scale[:, None]).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return {"codes": codes.view(torch.uint8), "scale": scale}

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"codes": (shape, torch.uint8), "scale": (shape[:1], torch.float32)}

    def operands(self, tensors: dict[str, Tensor]) -> Operands:
        return Operands.of(kinds.FP8, tensors["codes"], tensors["scale"])


@dataclass(frozen=True)
class FP8Dynamic(FP8):
    """Weights as `FP8`; each token is rounded to floats of 8 bits when it comes, its largest magnitude at 448, and
    these are multiplied: by the matrix units where a GPU has them (`torch._scaled_mm`, compute capability 9.0 and
    newer).

    Args:
        gradients: round the tokens of the gradient too, so that backward is of floats of 8 bits as well; otherwise the
            gradient is that of the weight, as if nothing had been rounded.
    """

    name: ClassVar[str] = "fp8-dynamic"
    dynamic: ClassVar[bool] = True
    gradients: bool = False

    @property
    def rounds_gradients(self) -> bool:
        return self.gradients

    def exact(self) -> FP8:
        return FP8()
