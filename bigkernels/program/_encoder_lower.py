"""From the graphs of an encoder's layers, one after the other, to records."""

# mypy: ignore-errors

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from . import _lower
from . import _records as records
from ._encoder_ir import GivenAngles, LayerGraph, Mix, Turn
from ._ir import HeadsOf
from ._lower import Lowered, _or_none
from ._weights import TYPES


@dataclass
class Whole:
    """Layers in a row. `angles`: (layer, what it is given) of each table; `scores`: the layer of each."""

    widths: list[int]
    operations: list[Any]
    angles: list[tuple[int, GivenAngles]]
    scores: list[int]
    hidden: int
    logits: int
    layers: int = 0


def joined(graphs: Sequence[LayerGraph], same_scores: Sequence[int], same_angles: Sequence[int]) -> Whole:
    """
    Args:
        same_scores: for each layer the first that is given the same scores; `same_angles` likewise.
    """
    whole = Whole([graphs[0].widths[graphs[0].hidden]], [], [], [], 0, 0)
    for at, graph in enumerate(graphs):
        number = {graph.hidden: whole.logits}
        for v, width in enumerate(graph.widths):
            if v not in number:
                number[v] = len(whole.widths)
                whole.widths.append(width)
        tables = [_place(whole.angles, (same_angles[at], given)) for given in graph.angles]
        for operation in graph.operations:
            operation = _renumbered(operation, number)
            if isinstance(operation, Turn) and operation.angles is not None:
                operation = replace(operation, angles=tables[operation.angles])
            if isinstance(operation, Mix) and operation.scores is not None:
                operation = replace(operation, scores=_place(whole.scores, same_scores[at]))
            whole.operations.append(operation)
        whole.logits = number[graph.logits]
    return whole


def _place(where: list, what: Any) -> int:
    if what not in where:
        where.append(what)
    return where.index(what)


_VALUES = {"x", "out", "residual", "up"}


def _renumbered(operation: Any, number: dict[int, int]) -> Any:
    made = {}
    for f in fields(operation):
        value = getattr(operation, f.name)
        if isinstance(value, HeadsOf):
            made[f.name] = replace(value, x=number[value.x])
        elif f.name in _VALUES and value is not None:
            made[f.name] = number[value]
        elif f.name == "terms":
            made[f.name] = tuple((number[x], scale, channel) for x, scale, channel in value)
    return replace(operation, **made)


class EncoderLowered(Lowered):
    """The records of an encoder's layers."""

    def _turn(self, o: Turn) -> tuple[str, records.TurnRecord]:
        return "turn", records.TurnRecord(
            self._heads_of(o.x), o.out, o.x.d, self._norm_of(o.norm), _or_none(o.angles), o.rotary, o.interleaved
        )

    def _mix(self, o: Mix) -> tuple[str, records.MixRecord]:
        # Where the model computes in float32 nothing is rounded.
        kind = TYPES[self._dtype if self._dtype in TYPES else torch.float32]
        return "mix", records.MixRecord(
            self._heads_of(o.q),
            self._heads_of(o.k),
            self._heads_of(o.v),
            o.out,
            o.heads,
            o.groups,
            o.d,
            o.dv,
            o.scale,
            o.softcap,
            o.causal,
            _or_none(o.scores),
            kind,
            self.reads.vector(o.sinks, o.heads, "sinks"),
        )


_lower._LOWER |= {Turn: EncoderLowered._turn, Mix: EncoderLowered._mix}
_lower.OPS |= {"turn": records.TURN, "mix": records.MIX}


def pack_tables(rows: Sequence[ctypes.Structure], kind: type[ctypes.Structure]) -> torch.Tensor:
    """Structs as the operators take them, int64."""
    size = ctypes.sizeof(kind) // 8
    if not rows:
        return torch.zeros(0, size, dtype=torch.int64, device="cpu")
    return torch.frombuffer(bytearray(b"".join(bytes(r) for r in rows)), dtype=torch.int64).view(len(rows), size)
