"""The cosines and sines of a model's rotary embeddings, by its own code: tables of the positions seen so far."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..ops.program import settle
from . import _records as records
from ._ir import Angles
from ._trace import Refused
from ._weights import TYPES

_SHORTEST = 512  # positions of a table
_WORDS = ctypes.sizeof(records.AngleTable) // 8


class Tables:
    """The angles of a graph for hidden states of a dtype, made at first use.

    Attributes:
        rows: an AngleTable a row.
        made: what these point to; another list when they are made again.
    """

    def __init__(self, angles: list[Angles], dtype: torch.dtype) -> None:
        self._angles, self._dtype = angles, dtype
        self.made: list[tuple[Tensor, Tensor] | None] = [None] * len(angles)
        with torch.inference_mode(False):  # they are written again, in whatever mode a later call is
            self.rows = torch.zeros(len(angles), _WORDS, dtype=torch.int64, device="cpu")
        self._length = 0 if any(a.table for a in angles) else None
        self._by_row = [i for i, a in enumerate(angles) if not a.table]

    def at(self, positions: Tensor, longest: int) -> Tensor:
        """An AngleTable a row, as the operators take them: int64.

        Args:
            positions: (B, S).
            longest: the largest of them.
        """
        if self._length is not None and longest >= self._length:
            self._length = max(_SHORTEST, 1 << longest.bit_length())
            self.made = list(self.made)
            every = torch.arange(self._length, dtype=torch.int64, device="cpu").unsqueeze(0)
            for i, angles in enumerate(self._angles):
                if angles.table:
                    self._make(i, every)
        for i in self._by_row:
            self._make(i, positions)
        return self.rows

    @property
    def tabled(self) -> bool:
        """Whether all are tables, of positions up to `length`."""
        return not self._by_row

    @property
    def length(self) -> int:
        return 1 << 62 if self._length is None else self._length

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pair in self.made if pair is not None for t in pair)

    def forget(self) -> None:
        """Make them again at the next use."""
        if self._length is not None:
            self._length = 0

    def _make(self, i: int, positions: Tensor) -> None:
        angles = self._angles[i]
        x = torch.zeros(1, 1, 1, dtype=self._dtype, device="cpu")
        pair = tuple(
            t.expand(*positions.shape, -1).reshape(-1, t.shape[-1]) for t in angles.module(x, positions, *angles.extra)
        )
        cos, sin = pair = tuple(t.detach().contiguous() for t in pair)
        if cos.dtype not in TYPES or cos.dtype != sin.dtype or cos.shape != sin.shape or cos.shape[1] < angles.rotary:
            raise Refused(f"angles {cos.dtype} {tuple(cos.shape)}")
        if angles.table and self.made[i] is not None:
            settle()  # threads that lost their core may still read the shorter table
        self.made[i] = pair
        row = records.AngleTable(
            cos.data_ptr(), sin.data_ptr(), TYPES[cos.dtype], not angles.table, cos.stride(0), cos.shape[0]
        )
        self.rows[i] = torch.frombuffer(bytearray(row), dtype=torch.int64)
