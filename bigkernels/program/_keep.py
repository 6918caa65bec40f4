"""Where rows whose logits nobody asks for are dropped."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ._ir import Attend, Call, Graph, Heads, HeadsOf, Keep, Operation

_WRITES = {"out", "outs"}
_NUMBERS = {"layer", "heads", "groups", "d", "dv", "window", "width", "x_column", "up_column", "angles", "rotary",
            "experts", "top"}  # fmt: skip


def reads(op: Operation) -> list[int]:
    """The values that an operation reads."""
    found: list[int] = []
    for f in fields(op):
        value = getattr(op, f.name)
        if f.name in _WRITES or f.name in _NUMBERS or value is None:
            continue
        if isinstance(value, HeadsOf):
            found.append(value.x)
        elif f.name in ("x", "up", "residual", "q", "logits", "weights", "chosen"):
            found.append(value)
        elif f.name == "xs":
            found += value
        elif f.name == "terms":
            found += [term[0] for term in value]
    return found


def writes(op: Operation) -> tuple[int, ...]:
    return op.outs if hasattr(op, "outs") else (op.out,)


def renamed(op: Operation, old: int, new: int) -> Operation:
    """The operation with one value for another among what it reads."""

    def put(name: str, value: Any) -> Any:
        if isinstance(value, HeadsOf):
            return replace(value, x=new) if value.x == old else value
        if name == "xs":
            return tuple(new if x == old else x for x in value)
        if name == "terms":
            return tuple((new if x == old else x, *rest) for x, *rest in value)
        return new if name not in _NUMBERS and type(value) is int and value == old else value

    changes = {f.name: put(f.name, getattr(op, f.name)) for f in fields(op) if f.name not in _WRITES}
    return replace(op, **changes)


def keep_last(graph: Graph) -> None:
    """After the last attention, where one value alone is read later on."""
    operations = graph.operations
    last = max((i for i, op in enumerate(operations) if isinstance(op, (Attend, Heads)) or _keeps(op)), default=-1)
    for i in range(last + 1, len(operations)):
        before = {graph.hidden, *(v for op in operations[: i + 1] for v in writes(op))}
        live = {v for op in operations[i + 1 :] for v in reads(op)} & before
        if len(live) == 1:
            (value,) = live
            out = graph.value(graph.widths[value])
            later = [renamed(op, value, out) for op in operations[i + 1 :]]
            graph.operations = [*operations[: i + 1], Keep(value, out), *later]
            return


def _keeps(op: Operation) -> bool:
    return isinstance(op, Call) and op.cached
