"""The block types of GGUF files: one row each, and how its blocks are decoded.

A block is consecutive elements of a row: codes, and the scales that belong to them, in the order of ggml's structs
(https://github.com/ggml-org/ggml, `ggml-common.h`). Decoding computes in float32, in the order of the `gguf` package's
own dequantizers, so that each value is theirs bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.codes import Kind, Operands, register
from .book4 import beside

K = 256  # elements of a block of the K-quants
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class BlockType:
    """One row.

    Attributes:
        name, number: as ggml has them.
        block: elements of a block; `nbytes` of it.
        decode: blocks (B, nbytes) to values (B, block), in float32.
        scales: where the float16 numbers of a block are; none may be infinite or NaN.
        ours: the format whose codes these are, in another order ("" if none).
        dtype: of what is floats, one by one, and no codes.
        bits: of a code; of kinds that kernels read as they are.
        kernels: the number by which kernels know the kind, -1 if none does.
    """

    name: str
    number: int
    block: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]
    scales: tuple[int, ...] = ()
    ours: str = ""
    dtype: torch.dtype | None = None
    bits: int = 0
    kernels: int = -1

    @property
    def is_numbers(self) -> bool:
        return self.dtype is not None

    @property
    def kind(self) -> Kind:
        """The row of `bigkernels.ops.codes`, under which rows of blocks are operands."""
        return _KINDS[self.name]


# ---- parts -----------------------------------------------------------------------------------------------------------


def _half(b: Tensor, at: int) -> Tensor:
    """A float16 number of each block, (B, 1)."""
    return b[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(t: Tensor, width: int, *shifts: int) -> Tensor:
    """Fields of the bytes (B, n): of each `width` bytes those at the first shift, then those at the next, (B, n')."""
    return (t.unflatten(1, (-1, 1, width)) >> beside(t, shifts, torch.uint8)[:, None]).flatten(1)


def _nibbles(t: Tensor, width: int = 16) -> Tensor:
    return _fields(t, width, 0, 4) & 15


def _pairs(t: Tensor) -> Tensor:
    return _fields(t, 32, 0, 2, 4, 6) & 3


def _bits(t: Tensor) -> Tensor:
    return _fields(t, 32, 0, 1, 2, 3, 4, 5, 6, 7) & 1


def _top_bits(t: Tensor) -> Tensor:
    """Four bytes a block as 32 bits, the lowest first."""
    return (t[:, :, None] >> beside(t, tuple(range(8)), torch.uint8) & 1).flatten(1)


def _decoded(values: tuple[int, ...], codes: Tensor) -> Tensor:
    return beside(codes, values)[codes.long()]


def _each(scale: Tensor, values: Tensor) -> Tensor:
    """``scale * values``, each scale (B, n) for as many elements (B, block)."""
    return (scale[:, :, None] * values.unflatten(1, (scale.shape[1], -1))).flatten(1)


def _scales_6(t: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    d, m, high = t[:, :4], t[:, 4:8], t[:, 8:]
    return (
        torch.cat((d & 63, (high & 15) | (d >> 2 & 48)), 1).float(),
        torch.cat((m & 63, high >> 4 | (m >> 2 & 48)), 1).float(),
    )


# ---- types -----------------------------------------------------------------------------------------------------------


def _f32(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.float32)


def _f16(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.float16).float()


def _bf16(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.bfloat16).float()


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:]).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _top_bits(b[:, 2:6]) << 4).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _top_bits(b[:, 4:8]) << 4).float() + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0)


def _q2_k(b: Tensor) -> Tensor:
    scales = b[:, :16]
    minima = _half(b, 82) * (scales >> 4).float()
    codes = _pairs(b[:, 16:80]).float()
    scaled = _each(_half(b, 80) * (scales & 15).float(), codes)
    return (scaled.unflatten(1, (16, 16)) - minima[:, :, None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    low, high = _fields(b[:, 96:104], 8, 0, 4) & 15, _fields(b[:, 104:108], 4, 0, 2, 4, 6) & 3
    scales = (low | high << 4).float() - 32
    codes = _pairs(b[:, 32:96]).float() - ((_bits(b[:, :32]) ^ 1) << 2).float()
    return _each(_half(b, 108) * scales, codes)


def _with_minima(b: Tensor, codes: Tensor) -> Tensor:
    scales, minima = _scales_6(b[:, 4:16])
    scaled = _each(_half(b, 0) * scales, codes.float())
    return (scaled.unflatten(1, (8, 32)) - (_half(b, 2) * minima)[:, :, None]).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _with_minima(b, _nibbles(b[:, 16:], 32))


def _q5_k(b: Tensor) -> Tensor:
    return _with_minima(b, _nibbles(b[:, 48:], 32) | _bits(b[:, 16:48]) << 4)


def _q6_k(b: Tensor) -> Tensor:
    codes = (_nibbles(b[:, :128], 64) | _pairs(b[:, 128:192]) << 4).float() - 32
    return _each(_half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float(), codes)


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b, 0) * _decoded(_IQ4, _nibbles(b[:, 2:]))


def _iq4_xs(b: Tensor) -> Tensor:
    low = (b[:, 4:8, None] >> beside(b, (0, 4), torch.uint8)).flatten(1) & 15
    high = (b[:, 2:4, None] >> beside(b, (0, 2, 4, 6), torch.uint8)).flatten(1) & 3
    return _each(_half(b, 0) * ((low | high << 4).float() - 32), _decoded(_IQ4, _nibbles(b[:, 8:])))


def _mxfp4(b: Tensor) -> Tensor:
    e = b[:, :1].to(torch.int32)  # of two halves: the codebook is twice the values
    bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1).clamp(min=0) << 23)
    return bits.to(torch.int32).view(torch.float32) * _decoded(_MXFP4, _nibbles(b[:, 1:]))


def _trits(t: Tensor, width: int, *powers: int) -> Tensor:
    """Numbers of base 3 are fractions of 256 in a byte: each power takes the next digit to the front."""
    shifted = t.unflatten(1, (-1, 1, width)) * beside(t, powers, torch.uint8)[:, None]
    return (shifted.to(torch.int16) * 3 >> 8).flatten(1)


def _tq1_0(b: Tensor) -> Tensor:
    five = (1, 3, 9, 27, 81)
    codes = torch.cat(
        (_trits(b[:, :32], 32, *five), _trits(b[:, 32:48], 16, *five), _trits(b[:, 48:52], 4, *five[:4])), 1
    )
    return _half(b, 52) * (codes.float() - 1)


def _tq2_0(b: Tensor) -> Tensor:
    return _half(b, 64) * (_pairs(b[:, :64]).float() - 1)


BLOCK_TYPES = {
    row.name: row
    for row in (
        BlockType("F32", 0, 1, 4, _f32, dtype=torch.float32),
        BlockType("F16", 1, 1, 2, _f16, dtype=torch.float16),
        BlockType("BF16", 30, 1, 2, _bf16, dtype=torch.bfloat16),
        BlockType("Q4_0", 2, 32, 18, _q4_0, (0,), "q4_1"),
        BlockType("Q4_1", 3, 32, 20, _q4_1, (0, 2), "q4_1"),
        BlockType("Q5_0", 6, 32, 22, _q5_0, (0,), bits=5, kernels=9),
        BlockType("Q5_1", 7, 32, 24, _q5_1, (0, 2), bits=5, kernels=10),
        BlockType("Q8_0", 8, 32, 34, _q8_0, (0,), "q8_0"),
        BlockType("Q2_K", 10, K, 84, _q2_k, (80, 82), bits=2, kernels=11),
        BlockType("Q3_K", 11, K, 110, _q3_k, (108,), bits=3, kernels=12),
        BlockType("Q4_K", 12, K, 144, _q4_k, (0, 2), bits=4, kernels=13),
        BlockType("Q5_K", 13, K, 176, _q5_k, (0, 2), bits=5, kernels=14),
        BlockType("Q6_K", 14, K, 210, _q6_k, (208,), bits=6, kernels=15),
        BlockType("IQ4_NL", 20, 32, 18, _iq4_nl, (0,), bits=4, kernels=16),
        BlockType("IQ4_XS", 23, K, 136, _iq4_xs, (0,), bits=4, kernels=17),
        BlockType("MXFP4", 39, 32, 17, _mxfp4, ours="mxfp4"),
        BlockType("TQ1_0", 34, K, 54, _tq1_0, (52,), bits=2, kernels=18),
        BlockType("TQ2_0", 35, K, 66, _tq2_0, (64,), bits=2, kernels=19),
    )
}


def _decoder(row: BlockType) -> Callable[[Operands, int, torch.dtype], Tensor]:
    def decode(o: Operands, k: int, dtype: torch.dtype) -> Tensor:
        blocks = o.codes.reshape(-1, row.nbytes)
        return row.decode(blocks).view(o.codes.shape[0], k).to(dtype)

    return decode


_KINDS = {
    name: register(
        Kind(
            f"gguf {name}",
            row.bits or 8 * row.nbytes / row.block,
            _decoder(row),
            scale=None,
            block=row.block,
            block_bytes=row.nbytes,
            number=row.kernels,
        )
    )
    for name, row in BLOCK_TYPES.items()
    if not row.is_numbers
}
