"""Weights in the blocks of a GGUF file, as the file has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.codes import Operands
from .format import Format
from .ggml import BLOCK_TYPES, BlockType


@dataclass(frozen=True)
class GGUFBlocks(Format):
    """Rows of blocks of a type of ggml; values are those that the `gguf` package dequantizes, bit for bit.

    Kernels read them on CPUs, but types Q4_0, Q4_1, Q8_0 and MXFP4, which have formats of their own (`Q4_1`, `Q8_0`,
    `MXFP4`). Those, and all types on other devices, are decoded some rows at a time, in plain PyTorch, for each product
    and each gradient: that takes little memory, and the time of decoding the weight whatever the number of tokens.

    Args:
        type: "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K" to "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0" or "TQ2_0".

    Raises:
        ValueError: another type.
    """

    name: ClassVar[str] = "gguf"
    type: str = "Q4_K"

    def __post_init__(self) -> None:
        row = BLOCK_TYPES.get(self.type)
        if row is None or row.is_numbers:
            raise ValueError(
                f"bigkernels.quantization.GGUFBlocks: type is {self.type!r}; accepted are "
                f"{', '.join(n for n, r in BLOCK_TYPES.items() if not r.is_numbers)}"
            )

    @property
    def row(self) -> BlockType:
        return BLOCK_TYPES[self.type]

    def encode(self, rows: Tensor, data: Any = None) -> dict[str, Tensor]:
        raise ValueError(
            f"bigkernels: blocks of GGUF's {self.type} are read from files and not made of weights; of "
            "GGUF's types 'q4_1' and 'q8_0' are, and `dequantize` gives the values"
        )

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        if k % self.row.block:
            raise ValueError(f"bigkernels: rows of {k} are no whole number of blocks of {self.row.block} ({self.type})")
        return {"blocks": ((n, k // self.row.block * self.row.nbytes), torch.uint8)}

    def operands(self, tensors: dict[str, Tensor]) -> Operands:
        return Operands.of(self.row.kind, tensors["blocks"])
