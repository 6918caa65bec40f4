"""Blocks of a file as the stored tensors of formats that have kernels, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantization.ggml import BLOCK_TYPES, BlockType


def planes(row: BlockType, raw: Tensor, shape: tuple[int, int]) -> dict[str, Tensor] | None:
    """Blocks (N, bytes) of a weight (N, K) as `Q4_1`, `Q8_0` or `MXFP4` store them; None where they cannot: a minimum
    is beyond float16, or a power of two is the largest, which in OCP's standard is no number.
    """
    n, k = shape
    blocks = raw.view(n, k // row.block, row.nbytes)
    if row.name == "MXFP4":
        exponent = blocks[..., 0].contiguous()
        return None if (exponent == 255).any() else {"codes": _neighbours(blocks[..., 1:], k), "exponent": exponent}
    numbers = [blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1) for at in row.scales]
    scale, codes = numbers[0], blocks[..., 2 * len(numbers) :]
    if row.name == "Q8_0":
        return {"codes": codes.reshape(n, k).view(torch.int8), "scale": scale}
    minimum = numbers[1] if row.name == "Q4_1" else scale * -8  # Q4_0 is a Q4_1 with that minimum
    if not minimum.isfinite().all():
        return None
    return {"codes": _neighbours(codes, k), "scale": scale, "minimum": minimum}


def blocks_of(name: str, stored: dict[str, Tensor]) -> Tensor | None:
    """The blocks (N, bytes) of type `name` that hold these codes; None where the type cannot."""
    if name not in ("Q4_0", "Q4_1", "Q8_0", "MXFP4"):
        return None
    row, codes = BLOCK_TYPES[name], stored["codes"]
    if name == "MXFP4":
        exponent = stored["exponent"]
        parts = exponent.unsqueeze(-1), _halves(codes.unflatten(1, (exponent.shape[1], -1)))
        return torch.cat(parts, -1).flatten(1)
    scale = stored["scale"]
    n, count = scale.shape
    numbers = [scale] if name != "Q4_1" else [scale, stored["minimum"]]
    if name == "Q4_0" and not torch.equal(stored["minimum"], scale * -8):
        return None
    codes = codes.view(torch.uint8).unflatten(1, (count, -1))
    if name != "Q8_0":
        codes = _halves(codes)
    words = [number.contiguous().view(torch.uint8).view(n, count, 2) for number in numbers]
    return torch.cat((*words, codes), -1).view(n, count * row.nbytes)


def _neighbours(codes: Tensor, k: int) -> Tensor:
    """Code i of a block (N, G, 16) is beside code 16 + i in a file, and beside code i + 1 here, (N, K / 2)."""
    halves = [half[..., ::2] | half[..., 1::2] << 4 for half in (codes & 15, codes >> 4)]
    return torch.cat(halves, -1).view(-1, k // 2)


def _halves(codes: Tensor) -> Tensor:
    """And back: codes of neighbours, (N, G, 16)."""
    each = torch.stack((codes & 15, codes >> 4), -1).flatten(2)
    return each[..., :16] | each[..., 16:] << 4
