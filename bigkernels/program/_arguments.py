"""What stands in the place of the arguments of code that is given more than rows: told from a recorded call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ._attention import window_of
from ._context import PAST, SHAPE, AnglesOf, CacheOf, FromContext, MadeOf, MaskOf, PositionsOf, SlotsOf
from ._replay import is_in_place, refs_of
from ._rotary import resolve_value
from ._trace import Ref, Refused

if TYPE_CHECKING:
    from ._identify import Builder

_LONGEST = 20  # steps


def from_context(b: Builder, leaf: Any, layer: int) -> FromContext:
    """What stands in the place of an argument of a recorded call that does not depend on the tokens.

    Raises:
        Refused: it is nothing of these.
    """
    trace = b.trace
    if leaf is trace.cache:
        return CacheOf()
    t = b.tensor(leaf) if isinstance(leaf, Ref) else leaf
    length, total = trace.tokens.shape[1], trace.past + trace.tokens.shape[1]
    if t.dim() == 4 and t.shape[-2:] == (length, total):
        seen = t if t.dtype == torch.bool else t > -1e4
        if t.dtype != torch.bool and not (t.is_floating_point() and (t[seen] == 0).all()):
            raise Refused("a mask adds to the scores")
        if not torch.equal(seen, seen[:1, :1].expand_as(seen)):
            raise Refused("a mask differs between heads")
        return MaskOf(t.dtype, window_of(seen[0, 0], trace.past, "(model)"), layer)
    if not t.dtype.is_floating_point and not t.dtype.is_complex:
        if t.shape[-1:] == (length,) and t.dim() == 2 and bool((t == trace.positions).all()):
            return PositionsOf()
        if t.shape == (length,) and bool((t == trace.positions[0]).all()):
            return SlotsOf()
        raise Refused("whole numbers that are no positions")
    if not isinstance(leaf, Ref):
        raise Refused("numbers that nobody has made of positions")
    return _angles(b, leaf) or _made(b, leaf)


def _angles(b: Builder, leaf: Ref) -> AnglesOf | None:
    """What a module has made of positions."""
    call = next((c for c in b.recorder.calls if leaf in c.outs), None)
    if call is None:
        return None

    def name(value: Any) -> Any:
        if isinstance(value, tuple) and not isinstance(value, Ref) and value == tuple(b.trace.tokens.shape):
            return SHAPE
        return PAST if type(value) is int and value == b.trace.past else resolve_value(b, value)

    args, kwargs = tuple(map(name, call.args)), tuple((k, name(v)) for k, v in call.kwargs.items())
    return AnglesOf(call.module, args, kwargs, call.outs.index(leaf), b.trace.dtype)


def _made(b: Builder, leaf: Ref) -> MadeOf:
    """What steps outside of modules have made of positions, or of what modules have."""
    given: dict[Ref, FromContext] = {}
    numbers: set[int] = set()
    todo = [leaf]
    while todo:
        ref = todo.pop()
        if ref in given or ref.step in numbers:
            continue
        step = b.recorder.steps[ref.step]
        if step.depends or is_in_place(step) or len(numbers) > _LONGEST:
            raise Refused("numbers that are not made of positions")
        angles = _angles(b, ref)
        if angles is not None:
            given[ref] = angles
            continue
        numbers.add(ref.step)
        todo += refs_of(step)
    steps = [b.recorder.steps[n] for n in sorted(numbers)]
    lines = tuple((s.number, s.func, s.args, s.kwargs) for s in steps)
    return MadeOf(lines, given, b.trace.positions, leaf)
