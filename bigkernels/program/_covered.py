"""Whether a graph reads all parameters that the recorded code read.

A weight of ones, a bias of zeros or a scale of one element leaves no trace in the numbers that a graph is told from: a
later edit of it would not be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._ir import Stored
from ._trace import Ref, Refused, leaves

if TYPE_CHECKING:
    from ._identify import Builder


def check_covered(b: Builder) -> None:
    """
    Raises:
        Refused: a parameter is read by a step, and by no operation.
    """
    known = {id(t) for value in (b.graph.operations, b.graph.embed, b.graph.angles) for t in _tensors(value)}
    seen: set[int] = set()
    inside = -1
    for number in sorted({*b.needed, *b.opaque}):
        if number in b.opaque:
            inside = max(inside, b.opaque[number].end)
        if number < inside:
            continue
        for t in _read(b, number, seen):
            if id(t) not in known:
                name = b.trace.stored[id(t)].name
                raise Refused(f"{b.path(Ref(number, 0))}: what its {name} does is not known", number)


def _read(b: Builder, number: int, seen: set[int]) -> Iterator[nn.Parameter]:
    """Parameters that a step reads, itself or by what was made of them."""
    if number in seen:
        return
    seen.add(number)
    step = b.recorder.steps[number]
    for leaf in leaves((step.args, step.kwargs)):
        if isinstance(leaf, Ref):
            if not b.recorder.steps[leaf.step].depends:
                yield from _read(b, leaf.step, seen)
        elif isinstance(leaf, nn.Parameter) and id(leaf) in b.trace.stored:
            yield leaf


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors that operations lead to."""
    if isinstance(value, Stored):
        yield value.get()
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name))
