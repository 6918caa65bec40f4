"""A format of a user's own: symmetric 3-bit integers in blocks of 32, each with a scale. All that it takes is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigkernels.ops.codes import Kind, Operands, register
from bigkernels.quantization import Format
from bigkernels.quantization.format import in_groups, ratio

BLOCK = 32


def decode(o: Operands, k: int, dtype: torch.dtype) -> Tensor:
    """Eight codes lie in three bytes, the first in the lowest bits."""
    words = o.codes.unflatten(1, (-1, 3)).to(torch.int32)
    words = words[..., 0] | words[..., 1] << 8 | words[..., 2] << 16
    codes = words[..., None] >> torch.arange(0, 24, 3, dtype=torch.int32, device=words.device) & 7
    values = (codes - 4).flatten(1).to(dtype).unflatten(1, (-1, BLOCK)) * o.scale.to(dtype)[..., None]
    return values.flatten(1)[:, :k]


TOY3 = register(Kind("toy3", 3, decode, scale=torch.float16, blocked=True))


@dataclass(frozen=True)
class Toy3(Format):
    """``(code - 4) * scale``, codes 1 to 7."""

    name: ClassVar[str] = "toy3"

    def encode(self, rows: Tensor, data: Any = None) -> dict[str, Tensor]:
        blocks = in_groups(rows, BLOCK)
        scale = (blocks.abs().amax(-1) / 3).half()
        codes = (ratio(blocks, scale.float()[..., None]).round().clamp(-3, 3) + 4).to(torch.int32).unflatten(2, (-1, 8))
        words = (codes << torch.arange(0, 24, 3, dtype=torch.int32, device=rows.device)).sum(-1)
        parts = torch.stack((words, words >> 8, words >> 16), -1) & 255
        return {"codes": parts.flatten(1).to(torch.uint8), "scale": scale}

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, blocks = shape[0], -(-shape[1] // BLOCK)
        return {"codes": ((n, blocks * 12), torch.uint8), "scale": ((n, blocks), torch.float16)}

    def operands(self, tensors: dict[str, Tensor]) -> Operands:
        return Operands.of(TOY3, tensors["codes"], tensors["scale"], group=BLOCK)
