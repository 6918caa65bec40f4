"""How weights are held in codes: one row of traits a kind, the same as `kCodes` of csrc/include/bigkernels/codes.h.

A format (`bigkernels.quantization`) says how a weight becomes codes, and names the kind that its codes are of. Whoever
reads codes gets `Operands`, which carry the number of their kind, and looks the rest up here.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = 0  # the kind of a weight that is no codes, but numbers as they are


class Operands(NamedTuple):
    """The codes of a weight (N, K) and what goes with them, as operators take it.

    Attributes:
        codes: (N, bytes), of a row each.
        scale: (N, G) of blocks, or (N,) of rows; None where the codes hold it.
        zero: (N, G), zero points or minima.
        row_scale: (N,).
        book: the values that codes stand for.
        group: elements of a block, 0 where scales are of rows.
        kind: a number of `KINDS`, or `NUMBERS`.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    row_scale: Tensor | None
    book: Tensor | None
    group: int
    kind: int

    @classmethod
    def of(
        cls,
        kind: Kind,
        codes: Tensor,
        scale: Tensor | None = None,
        *,
        zero: Tensor | None = None,
        row_scale: Tensor | None = None,
        book: Tensor | None = None,
        group: int = 0,
    ) -> Operands:
        return cls(codes, scale, zero, row_scale, book, group, kind.number)

    @classmethod
    def plain(cls, weight: Tensor) -> Operands:
        """Numbers (N, K) in the place of codes."""
        return cls(weight, None, None, None, None, 0, NUMBERS)

    def rows(self, pick: Callable[[Tensor], Tensor]) -> Operands:
        """Of some rows, which `pick` takes out of a tensor."""
        return Operands(*(t if t is None else pick(t) for t in self[:4]), *self[4:])

    def decoded(self, k: int, dtype: torch.dtype) -> Tensor:
        """The values (N, K) in `dtype`, which is wide enough to compute them in."""
        return KINDS[self.kind].decode(self, k, dtype)


class CodedWeight:
    """What operators know a weight in codes by; `bigkernels.quantization.QuantizedWeight` is one.

    Attributes:
        shape: (N, K).
    """

    shape: tuple[int, int]

    def operands(self) -> Operands:
        raise NotImplementedError


@dataclass(frozen=True)
class Kind:
    """One row.

    Attributes:
        name: of the kind.
        bits: of a code.
        decode: (operands of some rows, K, dtype) to the values (n, K): what the codes mean, in plain PyTorch.
        codes: the dtype of the tensor of codes.
        scale: the dtype of scales; None where the codes hold them.
        blocked: whether a scale belongs to `Operands.group` elements of a row, and not to a row.
        zero: "point" where a zero point (float16) is subtracted from the code, "minimum" where a minimum (float16) is
            added after the scale, "" where there is neither.
        row_scale: whether rows have a scale (float32) beside those of blocks.
        book: values of the codebook (float32), 0: codes are numbers.
        block: elements whose codes and scales lie together, where the codes hold all; `block_bytes` of them.
        number: of `Codes` in csrc/include/bigkernels/codes.h. Kinds that no kernel reads get one from `register`.
    """

    name: str
    bits: float
    decode: Callable[[Operands, int, torch.dtype], Tensor]
    codes: torch.dtype = torch.uint8
    scale: torch.dtype | None = torch.float32
    blocked: bool = False
    zero: str = ""
    row_scale: bool = False
    book: int = 0
    block: int = 0
    block_bytes: int = 0
    number: int = -1

    @property
    def has_kernels(self) -> bool:
        """Whether kernels read it; others run in plain PyTorch, a few rows at a time."""
        return 0 <= self.number < FIRST_WITHOUT_KERNELS

    @property
    def scale_bytes(self) -> int:
        """Of a scale that lies apart from the codes; 0 where none does."""
        return 0 if self.scale is None else self.scale.itemsize


def _spread(t: Tensor, group: int, k: int) -> Tensor:
    """Of each block to each of its elements."""
    return t.repeat_interleave(group, 1)[:, :k]


def _nibbles(o: Operands, k: int) -> Tensor:
    return torch.stack((o.codes & 15, o.codes >> 4), -1).flatten(1)[:, :k]


def _int8(o: Operands, k: int, dtype: torch.dtype) -> Tensor:
    return o.codes.to(dtype) * o.scale.to(dtype)[:, None]


def _fp8(o: Operands, k: int, dtype: torch.dtype) -> Tensor:
    return o.codes.view(torch.float8_e4m3fn).to(dtype) * o.scale.to(dtype)[:, None]


def _affine4(o: Operands, k: int, dtype: torch.dtype) -> Tensor:
    values = _nibbles(o, k).to(dtype) - _spread(o.zero.to(dtype), o.group, k)
    return values * _spread(o.scale.to(dtype), o.group, k) * o.row_scale.to(dtype)[:, None]


def _book4(o: Operands, k: int, dtype: torch.dtype) -> Tensor:
    return o.book.to(dtype)[_nibbles(o, k).long()] * _spread(o.scale.to(dtype), o.group, k)


def _affine4m(o: Operands, k: int, dtype: torch.dtype) -> Tensor:
    scaled = _nibbles(o, k).to(dtype) * _spread(o.scale.to(dtype), o.group, k)
    return scaled + _spread(o.zero.to(dtype), o.group, k)


def _int8g(o: Operands, k: int, dtype: torch.dtype) -> Tensor:
    return o.codes.to(dtype) * _spread(o.scale.to(dtype), o.group, k)


HALF = torch.float16
INT8 = Kind("int8", 8, _int8, torch.int8, number=3)
FP8 = Kind("fp8", 8, _fp8, number=4)
AFFINE4 = Kind("affine4", 4, _affine4, scale=HALF, blocked=True, zero="point", row_scale=True, number=5)
BOOK4 = Kind("book4", 4, _book4, blocked=True, book=16, number=6)
AFFINE4M = Kind("affine4m", 4, _affine4m, scale=HALF, blocked=True, zero="minimum", number=7)
INT8G = Kind("int8g", 8, _int8g, torch.int8, scale=HALF, blocked=True, number=8)

FIRST_ON_CPU_ALONE = 9  # numbers from here on are of kinds that no GPU kernel reads
FIRST_WITHOUT_KERNELS = 64  # numbers from here on are given out by `register`, and differ between processes
KINDS: dict[int, Kind] = {kind.number: kind for kind in (INT8, FP8, AFFINE4, BOOK4, AFFINE4M, INT8G)}


def kernels_read(kind: int, codes: Tensor) -> bool:
    """Whether the kernels of the codes' device read a kind, by its number."""
    return kind < FIRST_ON_CPU_ALONE or (kind < FIRST_WITHOUT_KERNELS and codes.device.type == "cpu")


def register(kind: Kind) -> Kind:
    """Add a kind. One that has no number is read by no kernel.

    Returns:
        The kind with its number, by which `Operands.of` names it.

    One that was registered by the same name before gives way, as when a cell of a notebook runs again.

    Raises:
        ValueError: it has the name of a kind that kernels read.
    """
    before = next((number for number, other in KINDS.items() if other.name == kind.name), None)
    if before is not None and KINDS[before].has_kernels:
        raise ValueError(f"bigkernels: {kind.name!r} is a kind of codes that kernels read")
    number = kind.number
    if number < 0:
        number = max(FIRST_WITHOUT_KERNELS, max(KINDS) + 1) if before is None else before
    KINDS[number] = replace(kind, number=number)
    return KINDS[number]
