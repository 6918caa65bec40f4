"""4-bit floats in blocks of 32 with a power of two: the MXFP4 of OCP's microscaling formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .book4 import NF4, _nearest
from .format import in_groups, pack4, ratio

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS, _LARGEST = 127, 252  # of a stored exponent; 6 times a larger power of two is none of float32's numbers


@dataclass(frozen=True)
class MXFP4(NF4):
    """``codebook[code] * 2^(exponent - 127)`` (OCP Microscaling Formats 1.0): floats of 4 bits, of gpt-oss's experts
    among others. A block takes 17 bytes; of its power of two, that of the largest magnitude over 4 or the next one, the
    one with the smaller squared error is taken.
    """

    name: ClassVar[str] = "mxfp4"
    values: ClassVar[tuple[float, ...]] = _E2M1 + tuple(-v for v in _E2M1)
    block_size: int = 32
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.block_size != 32 or self.double_quant:
            raise ValueError("bigkernels.quantization.MXFP4: blocks are of 32 elements, whose scales are powers of two")

    def encode(self, rows: Tensor, data: Any = None) -> dict[str, Tensor]:
        blocks = in_groups(rows, self.block_size)
        most = blocks.abs().amax(-1)
        if bool((most > 6 * 2.0 ** (_LARGEST - _BIAS)).any()):
            raise ValueError(
                "bigkernels.functional.quantize_weight: w is beyond the range of mxfp4, which ends at 6 * 2^125"
            )
        first = (torch.frexp(most).exponent - 3 + _BIAS).clamp(0, _LARGEST)  # of 4 to 8 times the power of two
        best, codes, least = first, None, None
        for exponent in (first, (first + 1).clamp_max(_LARGEST)):
            scaled = ratio(blocks, self._scale(exponent).unsqueeze(-1))
            nearest = _nearest(scaled, self.values)
            book = torch.tensor(self.values, dtype=torch.float32, device=rows.device)
            # In units that do not over- or underflow: of the first power of two.
            error = (scaled - book[nearest]).square().sum(-1) * torch.where(exponent > first, 4.0, 1.0)
            if codes is None or least is None:
                codes, least = nearest, error
            else:
                better = error < least
                best, codes = torch.where(better, exponent, best), torch.where(better.unsqueeze(-1), nearest, codes)
        assert codes is not None
        best = torch.where(most > 0, best, 0)
        return {"codes": pack4(codes.flatten(1), rows.shape[1]), "exponent": best.to(torch.uint8)}

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        return {"codes": ((n, (k + 1) // 2), torch.uint8), "exponent": ((n, -(-k // 32)), torch.uint8)}

    @property
    def derived(self) -> tuple[str, ...]:
        return ("exponent",)

    def operands(self, tensors: dict[str, Tensor]) -> Any:
        return super().operands({"codes": tensors["codes"], "scale": self._scale(tensors["exponent"])})

    @staticmethod
    def _scale(exponent: Tensor) -> Tensor:
        """2^(exponent - 127) as float32, from its bits; the least one is no normal number. 255 stands for none."""
        wide = exponent.to(torch.int32)
        bits = torch.where(wide == 0, 1 << 22, wide << 23)
        return torch.where(wide == 255, torch.nan, bits.view(torch.float32))
