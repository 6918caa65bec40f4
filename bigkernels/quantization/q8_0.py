"""8-bit integers in blocks of 32 along a row, each with a scale in float16: Q8_0 of GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.codes import INT8G, Operands
from .format import Format, in_groups

BLOCK = 32  # elements, of GGUF's formats


@dataclass(frozen=True)
class Q8_0(Format):
    """``code * scale``: scale is the block's largest magnitude / 127, codes are rounded half away from zero.

    Scales and codes are those that the `gguf` package makes (https://github.com/ggml-org/ggml, `ggml-quants.c`), whose
    rows are whole numbers of blocks; here the last block of a row may be shorter.
    """

    name: ClassVar[str] = "q8_0"

    def encode(self, rows: Tensor, data: None = None) -> dict[str, Tensor]:
        blocks = in_groups(rows, BLOCK)
        if not blocks.shape[1]:
            empty = rows.new_zeros(rows.shape[0], 0)
            return {"codes": empty.to(torch.int8), "scale": empty.half()}
        most = blocks.abs().amax(-1, keepdim=True)
        step = most / torch.full_like(most, 127.0)
        exact = blocks * inverse(step)
        whole = exact.abs().floor()
        codes = exact.sign() * (whole + (2 * (exact.abs() - whole)).floor())
        codes = codes.nan_to_num(0.0, 0.0, 0.0).to(torch.int8)
        scale = step.squeeze(-1).half()
        check_range(self.name, scale)
        return {"codes": codes.flatten(1)[:, : rows.shape[1]].contiguous(), "scale": scale}

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        return {"codes": (shape, torch.int8), "scale": ((n, -(-k // BLOCK)), torch.float16)}

    def operands(self, tensors: dict[str, Tensor]) -> Operands:
        return Operands.of(INT8G, tensors["codes"], tensors["scale"], group=BLOCK)


def inverse(step: Tensor) -> Tensor:
    """1 / step, zero where the step is."""
    return torch.where(step == 0, 0.0, 1 / step)


def check_range(name: str, *numbers: Tensor) -> None:
    """Raise ValueError where a weight is beyond the range of float16, in which its scales are stored."""
    if not all(t.isfinite().all() for t in numbers):
        raise ValueError(
            f"bigkernels.functional.quantize_weight: w is beyond the range of {name}, whose scales are float16"
        )
