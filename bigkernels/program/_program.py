"""A graph as it runs: its records, its tables of angles, and the tensors that these point to."""

# mypy: ignore-errors

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import program as ops
from ._angles import Tables
from ._cache import CacheShape
from ._context import Context
from ._embedding import Embed
from ._ir import Attend, Call, Graph
from ._lower import Lowered
from ._pages import prefer_huge_pages
from ._panels import Panels
from ._trace import Refused


class Program:
    """The steps of one model.

    Attributes:
        graph: what was found in the model.
        dtype: of the hidden states that come in.
        shapes: what it keeps of a token in each layer of the cache.
        windows: how many keys a token sees in its layers; 0: all.
        widest: columns of the widest value but the logits.
        lowered: its records. They are good as long as the tensors that they point to stay where they are.
        panels: what their codes were copied to; None: it was dropped, and `lower` makes it again.
    """

    def __init__(self, graph: Graph, dtype: torch.dtype, integers: bool | None = None, stored: bool = False) -> None:
        """
        Args:
            integers: as of `Lowered`.
            stored: read codes as they are stored, and copy none.

        Raises:
            Refused: with what records cannot hold.
        """
        self.graph, self.dtype, self._integers, self._stored = graph, dtype, integers, stored
        self._tables = Tables(graph.angles, dtype)
        self.shapes = _shapes(graph)
        self.windows = {o.window for o in graph.operations if isinstance(o, Attend)} or {0}
        self.widest = max(w for v, w in enumerate(graph.widths) if v != graph.logits)
        self.panels: Panels | None = None
        self._lower()
        self._table = _table(graph)
        self._row = torch.empty(1, 1, graph.widths[graph.hidden], dtype=dtype, device="cpu")
        self._storages: list | None = None

    def hold(self) -> None:
        """Keep the memory of all that is read alive. Threads that lost their core may read weights after a call, which
        `weight.data = ...` would give back under them.
        """
        if self._storages is None:
            self._storages = [t.untyped_storage() for t in self.reads]

    def release(self) -> None:
        """Let memory go where it is replaced."""
        ops.settle()
        self._storages = None

    def lower(self) -> None:
        """Make the records again: tensors are elsewhere, or lie in another way."""
        self.drop()
        self._tables.forget()
        self._lower()

    def _lower(self) -> None:
        self.lowered = Lowered(self.graph, self.dtype, self._integers)
        prefer_huge_pages(self.reads)
        self.panels = Panels(self.lowered.packed, self.lowered.reads.codes, self._stored)

    def drop(self) -> None:
        """Let the copy of the codes go, and what `release` does."""
        self.release()
        self.panels = None

    def refresh(self, whole: bool) -> bool:
        """Make the copy of the codes again where these have changed, or it was dropped; whether it was.

        Args:
            whole: look at all of their bytes.
        """
        if self.panels is not None and self.panels.hold(whole):
            return False
        self.lower()
        return True

    @property
    def reads(self) -> list[Tensor]:
        """The tensors of the model that the records point to."""
        return self.lowered.reads.held

    @property
    def rounds(self) -> bool:
        """Whether tokens are rounded to 8 bits for some product."""
        return self.lowered.rounds

    def embed(self, ids: Tensor | None, positions: Tensor, embeds: Tensor | None) -> Tensor:
        """The hidden states that go in, by the model's own code or, of the simplest, what that comes to."""
        if self._table is None or embeds is not None:
            return self.graph.embed(ids, positions, embeds)
        weight = self._table.weight
        if ids.numel() == 1 and weight.dtype == self.dtype and weight.is_contiguous():
            number = ids.item()
            if 0 <= number < weight.shape[0]:
                ctypes.memmove(self._row.data_ptr(), weight.data_ptr() + number * self._row.nbytes, self._row.nbytes)
                return self._row  # which a run copies
        return torch.embedding(weight, ids)

    @property
    def vocabulary(self) -> int:
        return self.lowered.widths[self.lowered.logits]

    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        starts: Tensor | None,
        longest: int,
        caches: Tensor,
        past: int,
        logits: Tensor,
        cache: Any = None,
    ) -> None:
        """One run: keys and values go to the caches.

        Args:
            hidden: (B, S, width).
            positions: (B, S), int64, `longest` the largest of them.
            starts: (B,), int64, the first token of each sequence that is no padding; None where there is none.
            caches: a LayerCache a row.
            past: tokens that a sequence has in the caches.
            logits: (B, keep, V), of the last `keep` tokens, or of none.
            cache: transformers' `Cache`, for calls that keep something there.
        """
        self.hold()
        angles = self._tables.at(positions, longest)
        if not self.lowered.calls:
            ops.run(self.lowered.packed, hidden, positions, starts, caches, angles, logits, past)
            return
        context = Context(cache, positions, starts, past)
        number = ops.start(self.lowered.packed, hidden, positions, starts, caches, angles, logits.shape[1], past)
        try:
            while (at := ops.step(number)) >= 0:
                tokens = (hidden if self.lowered.keeps is None or at < self.lowered.keeps else logits).shape[1]
                self._call(number, self.lowered.calls[at], hidden.new_empty(hidden.shape[0], tokens, 0), context)
            if logits.shape[1]:
                ops.read(number, self.lowered.logits, logits)
        finally:
            ops.finish(number)

    def _call(self, number: int, call: Call, like: Tensor, context: Context) -> None:
        given = [like.new_empty(*like.shape[:2], self.lowered.widths[x]) for x in call.xs]
        for x, t in zip(call.xs, given, strict=True):
            ops.read(number, x, t)
        outs = call.function(*given, context=context) if call.cached else call.function(*given)
        outs = outs if isinstance(outs, (tuple, list)) else (outs,)
        for value, t in zip(call.outs, outs, strict=True):
            ops.write(number, value, t)

    def describe(self) -> str:
        """For the report: what there is, and the memory that it takes beside the model's."""
        formats = ", ".join(f"{count} {name}" for name, count in sorted(self.lowered.reads.formats.items()))
        panels = 0 if self.panels is None else self.panels.nbytes
        products = f"{self.lowered.products} products ({formats})"
        text = f"decode program: {self.graph.layers} layers, {products}, {self.nbytes / 1e6:.1f} MB"
        if panels:
            text += f", {panels / 1e6:.1f} of them codes in panels"
        elif self.panels is not None and self.panels.why:
            text += f"; codes are read as stored: {self.panels.why}"
        return text

    @property
    def nbytes(self) -> int:
        """Records, tables, what was made of weights, and the copy of their codes."""
        nbytes = sum(t.nbytes for t in self.lowered.reads.made if isinstance(t, Tensor))
        panels = 0 if self.panels is None else self.panels.nbytes
        return self.lowered.packed.nbytes + self._tables.nbytes + nbytes + panels

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # Threads that lost their core may still read what goes away now. At the end of the process modules are gone.
        if not ending():
            ops.settle()


def _table(graph: Graph) -> nn.Embedding | None:
    """The embedding that is all that happens to tokens, if it is a plain one."""
    embed = graph.embed
    plain = isinstance(embed, Embed) and embed.scale == 1.0 and not embed.positions
    if not plain or type(embed.tokens) is not nn.Embedding or embed.tokens.max_norm is not None:
        return None
    return embed.tokens


def _shapes(graph: Graph) -> list[CacheShape | None]:
    """None for layers that calls keep."""
    shapes: dict[int, CacheShape] = {}
    for o in graph.operations:
        if isinstance(o, Attend):
            shape = CacheShape(o.groups, o.d, o.dv, o.window)
            held = shapes.setdefault(o.layer, shape)
            if held[:3] != shape[:3]:
                raise Refused("layers of different heads that share a cache")
            if held.window != shape.window:
                shapes[o.layer] = held._replace(window=0)
    if not graph.own_cache and {*shapes, *graph.owned} != set(range(graph.layers)):
        raise Refused("a layer of the cache that no attention reads")
    return [shapes.get(i) for i in range(graph.layers)]
