"""4-bit integers in blocks of 32 along a row, each with a scale and a minimum in float16: Q4_1 of GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.codes import AFFINE4M, Operands
from .format import Format, in_groups, pack4
from .q8_0 import BLOCK, check_range, inverse


@dataclass(frozen=True)
class Q4_1(Format):
    """``code * scale + minimum``, codes 0 to 15: a block's range in 15 equal steps.

    Scales, minima and codes are those of the `gguf` package (https://github.com/ggml-org/ggml, `ggml-quants.c`),
    whose rows are whole numbers of blocks; here the last block of a row may be shorter. Files hold code i of a block in
    the low half of byte i and code 16 + i in its high half; here neighbours share a byte, as in `Int4`.
    """

    name: ClassVar[str] = "q4_1"

    def encode(self, rows: Tensor, data: None = None) -> dict[str, Tensor]:
        blocks = in_groups(rows, BLOCK)
        if not blocks.shape[1]:
            empty = rows.new_zeros(rows.shape[0], 0)
            return {"codes": empty.to(torch.uint8), "scale": empty.half(), "minimum": empty.half()}
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        step = (high - low) / torch.full_like(low, 15.0)
        # Half up, and not to even, as the difference is never negative.
        codes = ((blocks - low) * inverse(step) + 0.5).trunc().nan_to_num(0.0, 0.0).clamp(0, 15)
        tensors = {"scale": step.squeeze(-1).half(), "minimum": low.squeeze(-1).half()}
        check_range(self.name, *tensors.values())
        return {"codes": pack4(codes.flatten(1), rows.shape[1])} | tensors

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        blocks = (n, -(-k // BLOCK))
        return {
            "codes": ((n, (k + 1) // 2), torch.uint8),
            "scale": (blocks, torch.float16),
            "minimum": (blocks, torch.float16),
        }

    def operands(self, tensors: dict[str, Tensor]) -> Operands:
        return Operands.of(AFFINE4M, tensors["codes"], tensors["scale"], zero=tensors["minimum"], group=BLOCK)
