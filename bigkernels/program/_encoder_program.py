"""The layers of an encoder as they run: their records, and one call of them."""

# mypy: ignore-errors

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops import program as ops
from . import _records as records
from ._encoder_call import Given
from ._encoder_ir import LayerGraph
from ._encoder_lower import EncoderLowered, joined, pack_tables
from ._encoder_masks import Scores, scores_of, texts
from ._encoder_reference import tables
from ._padding import Refusal
from ._pages import prefer_huge_pages
from ._panels import Panels
from ._weights import TYPES

ROWS = 512  # of a run: a weight is brought into order once for all of them, and what layers make stays in the caches
_CACHED = 8 << 20
_WHOLE = 64  # rows from which a comparison of all codes is a small part of a call
_EVERY = 16  # calls of fewer


class EncoderProgram:
    """Layers in a row.

    Attributes:
        lowered: the records, good as long as the tensors that they point to stay where they are.
        panels: what their codes were copied to; None: it was dropped.
    """

    def __init__(
        self,
        graphs: Sequence[LayerGraph],
        same_scores: Sequence[int],
        same_angles: Sequence[int],
        dtype: torch.dtype,
        integers: bool | None = None,
    ) -> None:
        """
        Args:
            same_scores, same_angles: for each layer the first one that is given the same.
            dtype: of the hidden states.

        Raises:
            Refused: with what records cannot hold.
        """
        self.graphs, self.dtype, self._integers = tuple(graphs), dtype, integers
        self.whole = joined(graphs, same_scores, same_angles)
        self.panels: Panels | None = None
        self._storages: list | None = None
        self._calls = 0
        self.lower()

    def lower(self) -> None:
        """Make the records, again where tensors are elsewhere."""
        self.drop()
        self.lowered = EncoderLowered(self.whole, self.dtype, self._integers)
        prefer_huge_pages(self.lowered.reads.held)
        self.panels = Panels(self.lowered.packed, self.lowered.reads.codes)
        widest = max(self.lowered.widths)
        self._most = ROWS if widest * ROWS * 4 <= _CACHED else ROWS // 2

    def drop(self) -> None:
        """Let the copy of the codes go, and memory that is held."""
        ops.settle()
        self._storages = self.panels = None

    @property
    def reads(self) -> list[Tensor]:
        return self.lowered.reads.held

    @property
    def rounds(self) -> bool:
        """Whether tokens are rounded to 8 bits for some product."""
        return self.lowered.rounds

    def refresh(self, rows: int) -> None:
        """Make the copy of the codes again where these have changed."""
        self._calls += 1
        if self.panels is None or not self.panels.hold(rows > _WHOLE or self._calls % _EVERY == 0):
            self.lower()

    def run(self, calls: Sequence[Given]) -> Tensor:
        """The last layer's hidden states (B, S, width): zeros for padding at the end of a text.

        Args:
            calls: what each layer is given; the first one's hidden states are read.

        Raises:
            Refusal: scores are such as no program takes.
        """
        hidden = calls[0].hidden
        batch, length, _ = hidden.shape
        said = [scores_of(self.graphs[at].scores, calls[at]) for at in self.whole.scores]
        if any(not g.scores for g in self.graphs):
            said.append(Scores())  # attention that is given nothing sees padding
        found = texts(said, batch, length)
        rows = [s.table() for s in found.scores[: len(self.whole.scores)]]
        pairs = [tables(a, calls[at]) for at, a in self.whole.angles]
        flat = [tuple(t.reshape(-1, t.shape[-1]).contiguous() for t in pair) for pair in pairs]
        for cos, _ in flat:
            if cos.dtype not in TYPES:
                raise Refusal(f"angles are {cos.dtype}")
        turns = [
            records.AngleTable(cos.data_ptr(), sin.data_ptr(), TYPES[cos.dtype], 0, cos.stride(0), cos.shape[0])
            for cos, sin in flat
        ]
        self._hold()
        out = (torch.zeros_like if found.padded else torch.empty_like)(hidden, memory_format=torch.contiguous_format)
        ops.encode(
            self.lowered.packed,
            hidden.contiguous(),
            found.sequences,
            pack_tables(rows, records.ScoresTable),
            pack_tables(turns, records.AngleTable),
            out,
            self._most,
        )
        if turns:
            ops.settle()  # threads that lost their core may still read the angles
        return out

    def _hold(self) -> None:
        if self._storages is None:
            self._storages = [t.untyped_storage() for t in self.reads]

    def describe(self) -> str:
        formats = ", ".join(f"{count} {name}" for name, count in sorted(self.lowered.reads.formats.items()))
        text = (
            f"encoder program: {len(self.graphs)} layers, {self.lowered.products} products ({formats}), "
            f"{self.nbytes / 1e6:.1f} MB"
        )
        if self.panels is not None and self.panels.nbytes:
            text += f", {self.panels.nbytes / 1e6:.1f} of them codes in panels"
        return text

    @property
    def nbytes(self) -> int:
        made = sum(t.nbytes for t in self.lowered.reads.made if isinstance(t, Tensor))
        return self.lowered.packed.nbytes + made + (0 if self.panels is None else self.panels.nbytes)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            ops.settle()
