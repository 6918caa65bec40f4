"""Quantized weights in the order in which a GPU's matrix units read them: the copy that the kernels for a few tokens
multiply with (`csrc/cuda/kernels/few_formats.cuh` reads it).

A unit is 16 rows by 128 of the depth; four units, of 64 rows, lie together, then come those of the next 128. In a unit
a lane's 16 bytes lie beside those of the next lane; behind the codes are the scales of its groups, a word a row.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import AFFINE4, AFFINE4M, BOOK4, FP8, INT8, INT8G

RUN = 128  # of the depth: what lies together
_ROWS = 64
_AT_ONCE = 2**22  # elements that are put in order at once

CODES = ("int4", "book4", "int8", "fp8")
OFFSETS = ("none", "zero", "minimum")


@dataclass(frozen=True)
class Fragments:
    """A weight (n, k) in this order.

    Attributes:
        units: its bytes.
        factor: (n,) float32, of the rows, or None.
        top: () float32, a power of two near the largest of the groups' numbers, or None where there are no groups.
        code, offset, group: how codes, and scales of groups, stand for values, by the names above; group 0: none.
    """

    units: Tensor
    factor: Tensor | None
    top: Tensor | None
    code: str
    offset: str
    group: int
    n: int
    k: int

    @property
    def nbytes(self) -> int:
        return self.units.nbytes + (0 if self.factor is None else self.factor.nbytes)


# Of the kinds of codes that the kernels read: code, offset, and the groups that a run is divided into.
_READ = {
    INT8.number: ("int8", "none", (0,)),
    INT8G.number: ("int8", "none", (32,)),
    FP8.number: ("fp8", "none", (0,)),
    AFFINE4.number: ("int4", "zero", (32, 64, 128)),
    AFFINE4M.number: ("int4", "minimum", (32,)),
    BOOK4.number: ("book4", "none", (32, 64, 128)),
}


def kind_of(kind: int, group: int) -> tuple[str, str] | None:
    """Code and offset of codes of a kind in groups; None where there is no kernel for them."""
    code, offset, groups = _READ.get(kind, ("", "", ()))
    return (code, offset) if group in groups else None


def in_fragments(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    row_scale: Tensor | None,
    book: Tensor | None,
    group: int,
    kind: int,
    k: int,
) -> Fragments:
    """The copy, on the device of the codes. Waits for nothing there."""
    layout = kind_of(kind, group)
    if layout is None:
        raise ValueError("bigkernels: no fragments of this format")
    code, offset = layout
    n = codes.shape[0]
    runs, fours = -(-k // RUN), -(-n // _ROWS)
    bits = 4 if code in ("int4", "book4") else 8
    bytes_of_codes, bytes_of_scales = 2 * RUN * bits, 64 * (RUN // group) if group else 0
    units = torch.empty(fours, runs, 4, bytes_of_codes + bytes_of_scales, dtype=torch.uint8, device=codes.device)
    at_once = max(1, _AT_ONCE // max(runs * RUN * _ROWS, 1)) * _ROWS
    for begin in range(0, n, at_once):
        rows = slice(begin, min(begin + at_once, n))
        to = units[begin // _ROWS : -(-rows.stop // _ROWS)]
        some = codes[rows].view(torch.uint8)
        if bits == 4:
            some = torch.stack((some & 15, some >> 4), -1).flatten(1)[:, :k]
        to[..., :bytes_of_codes] = _ORDERS[code](_padded(some, runs * RUN))
        if group:
            words = scale[rows].float() if offset == "none" else torch.stack((scale[rows], zero[rows]), -1).half()
            to[..., bytes_of_codes:] = _scales(
                _padded(words.view(torch.uint8).view(*scale[rows].shape, 4), runs * RUN // group), runs
            )
    factor = row_scale if group else scale
    if code == "fp8" and n:
        # A row that holds a NaN gives NaN whatever the tokens are; its code here would be a number.
        lost = torch.cat([((some & 127) == 127).any(1) for some in codes.split(at_once)])
        factor = torch.where(lost, float("nan"), factor)
    top = None
    if group and n:
        tops = [power_of_two(t.abs().amax().float()) for t in ([scale, zero] if offset == "minimum" else [scale])]
        top = functools.reduce(torch.maximum, tops)
    return Fragments(units, factor, top, code, offset, group, n, k)


def power_of_two(t: Tensor) -> Tensor:
    """The largest powers of two that are no larger than what is in t, magnitudes in float32; where that is extreme, one
    that can be divided by.
    """
    return (t.clamp(2.0**-100, 2.0**100).view(torch.int32) & 0x7F800000).view(torch.float32)


def _padded(t: Tensor, columns: int) -> Tensor:
    """Rows and columns filled up with zeros, rows to whole fours of units."""
    rows = -(-t.shape[0] // _ROWS) * _ROWS
    if t.shape[:2] == (rows, columns):
        return t
    out = t.new_zeros(rows, columns, *t.shape[2:])
    out[: t.shape[0], : t.shape[1]] = t
    return out


# Rows are counted by (four, unit, half of 16, g), the depth by (run, step.., half of 16, t, half of a pair), where lane
# 4 * g + t has rows g and g + 8, and pairs 2 * t and 2 * t + 8 of a step of 16.


def _split4(codes: Tensor) -> Tensor:
    """(four, unit, row half, g, run, quad, step, depth half, t, pair)"""
    return codes.view(-1, 4, 2, 8, codes.shape[1] // RUN, 2, 4, 2, 4, 2)


def _int4(codes: Tensor) -> Tensor:
    # Byte (pair, depth half) of a word: the codes of both rows, so that the four fragments are nibbles apart.
    parts = _split4(codes).permute(0, 4, 1, 5, 3, 8, 6, 9, 7, 2)
    return (parts[..., 0] | parts[..., 1] << 4).flatten(3)


def _book4(codes: Tensor) -> Tensor:
    # Byte (depth half, row half): a fragment's pair.
    parts = _split4(codes).permute(0, 4, 1, 5, 3, 8, 6, 7, 2, 9)
    return (parts[..., 0] | parts[..., 1] << 4).flatten(3)


def _split8(codes: Tensor) -> Tensor:
    """(four, run, unit, quad, g, t, step, depth half, pair, row half)"""
    parts = codes.view(-1, 4, 2, 8, codes.shape[1] // RUN, 4, 2, 2, 4, 2)
    return parts.permute(0, 4, 1, 5, 3, 8, 6, 7, 9, 2)


def _int8(codes: Tensor) -> Tensor:
    return _split8(codes ^ 128).flatten(3)  # 128 more, which is what has no sign


def _fp8(codes: Tensor) -> Tensor:
    # 16 bits: of the first code the sign at 15 and the others at 10 to 4, as in a bfloat16; of the second the sign at
    # 11, then the others at 14 to 12 and 3 to 0, which two shifts bring there.
    a, b = _split8(codes).unbind(-1)
    low = a << 4 | b & 15
    high = a & 128 | (b & 112) | b >> 4 & 8 | a >> 4 & 7
    return torch.stack((low, high), -1).flatten(3)


_ORDERS = {"int4": _int4, "book4": _book4, "int8": _int8, "fp8": _fp8}


def _scales(words: Tensor, runs: int) -> Tensor:
    """(rows, groups, 4 bytes) as (four, run, unit, bytes): of row g its groups', each beside that of row g + 8."""
    parts = words.view(-1, 4, 2, 8, runs, words.shape[1] // runs, 4)
    return parts.permute(0, 4, 1, 3, 5, 2, 6).flatten(3)
