"""The model's own code in the middle of a program: a module whose inside nobody knows, but that is a function of what
goes in.
"""

from __future__ import annotations

import functools
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._forms import close
from ._ir import Call, Stored
from ._suspend import suspended, wrapped
from ._trace import ModuleCall, Recorder, Ref, Refused, leaves, mapped

if TYPE_CHECKING:
    from ._identify import Builder
    from ._record import Trace


@dataclass(frozen=True)
class Place:
    """Where in a module's arguments a value goes, and as what."""

    number: int
    flat: bool  # (B * S, width), else (B, S, width)
    dtype: torch.dtype


@dataclass(frozen=True)
class ModuleCode:
    """`module`'s outputs, (B, S, width) each, from values (B, S, width)."""

    module: nn.Module
    args: tuple
    kwargs: tuple
    outs: tuple[int, ...]

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        batch, length = values[0].shape[:2]
        wanted = {p.number: p for p in leaves((self.args, self.kwargs)) if isinstance(p, Place)}
        given = {}
        whole = values[0].dtype == torch.float64
        for i, value in enumerate(values):
            place = wanted[i]
            kind = torch.float64 if whole and place.dtype.is_floating_point else place.dtype
            value = value.to(kind)
            given[place.number] = value.flatten(0, 1) if place.flat else value

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Stored):
                return leaf.get()
            return given[leaf.number] if isinstance(leaf, Place) else leaf

        args, kwargs = mapped(fill, self.args), {k: mapped(fill, v) for k, v in self.kwargs}
        with torch.no_grad():
            if whole:
                out = in_float64(self.module, args, kwargs, {id(given[i]): p.dtype for i, p in wanted.items()})
            else:
                out = self.module(*args, **kwargs)
        found = [t for t in leaves(out) if isinstance(t, Tensor)]
        return tuple(found[i].reshape(batch, length, -1).to(values[0].dtype) for i in self.outs)


def in_float64(module: nn.Module, args: tuple, kwargs: dict, seeming: dict[int, torch.dtype]) -> Any:
    """A module's own code on tensors of float64, which seem to be of the dtypes given by their ids."""
    from ._record import _eager_experts, _wrap

    recorder = Recorder()
    for t in leaves((args, kwargs)):
        if isinstance(t, Tensor) and id(t) in seeming:
            recorder.give(t, seeming[id(t)])
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager_experts(module))
        stack.enter_context(suspended(module))
        stack.enter_context(wrapped(module, functools.partial(_wrap, recorder)))
        stack.enter_context(recorder)
        return module(*args, **kwargs)


def enclosing(trace: Trace, step: int, opaque: list[ModuleCall]) -> list[ModuleCall]:
    """Calls of the innermost module around a step that may be left to its own code, and those like it in other layers.

    Those that were tried before, and what lies in them, are not.
    """
    stops = {u.step for u in trace.updates}
    stops |= {i for i, s in enumerate(trace.recorder.steps) if s.name == "scaled_dot_product_attention"}
    stops.add(0)
    tried = {_pattern(c.path) for c in opaque}
    found = [c for c in trace.recorder.calls if c.begin <= step < c.end]
    for call in sorted(found, key=lambda c: c.end - c.begin):
        if any(call.begin <= s < call.end for s in stops):
            return []
        if _pattern(call.path) not in tried and _reads(trace, call) and isinstance(call.outs[:1], tuple) and call.outs:
            alike = [c for c in trace.recorder.calls if _pattern(c.path) == _pattern(call.path)]
            return [c for c in alike if not any(c.begin <= s < c.end for s in stops)]
    return []


def _pattern(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def _reads(trace: Trace, call: ModuleCall) -> list[Ref]:
    refs = [v for v in leaves((call.args, call.kwargs)) if isinstance(v, Ref)]
    return [r for r in refs if trace.recorder.steps[r.step].depends]


def add_call(b: Builder, call: ModuleCall) -> None:
    """The operation for a call of a module, and its outputs' values.

    Raises:
        Refused: it reads something else than rows of values.
    """
    where = call.path or "(model)"
    batch, length = b.trace.tokens.shape
    refs = list(dict.fromkeys(_reads(b.trace, call)))
    numbers = {ref: b.value(ref) for ref in refs}

    def place(leaf: Any) -> Any:
        if isinstance(leaf, Ref) and leaf in numbers:
            t = b.tensor(leaf)
            if t.shape[:2] == (batch, length) and t.dim() == 3:
                flat = False
            elif t.dim() == 2 and t.shape[0] == batch * length:
                flat = True
            else:
                raise Refused(f"{where}: reads a tensor that has no row for each token")
            return Place(refs.index(leaf), flat, b.recorder.seeming.get(id(t), t.dtype))
        if isinstance(leaf, Tensor) and id(leaf) in b.trace.stored:
            return b.trace.stored[id(leaf)]
        if isinstance(leaf, Ref):
            leaf = b.tensor(leaf)
        if isinstance(leaf, Tensor) and leaf.numel() > 1:
            raise Refused(f"{where}: reads more than the hidden states")
        return leaf

    args = tuple(mapped(place, call.args))
    kwargs = tuple((k, mapped(place, v)) for k, v in call.kwargs.items())
    kept, outs = [], []
    for i, ref in enumerate(call.outs):
        if isinstance(ref, Ref) and b.recorder.steps[ref.step].depends and b._width(ref) and ref not in b.values:
            kept.append(i)
            outs.append(b.new(b._width(ref)))
            b.values[ref] = outs[-1]
    if not outs:
        raise Refused(f"{where}: makes nothing that has a row for each token")
    code = ModuleCode(call.module, args, kwargs, tuple(kept))
    if not _by_token(b, code, refs):
        raise Refused(f"{where}: what it makes of a token depends on the others", call.begin)
    b.graph.operations.append(Call(tuple(numbers.values()), tuple(outs), code, call.path))


def _by_token(b: Builder, code: ModuleCode, refs: list[Ref]) -> bool:
    """Whether a token's outputs are the same whatever tokens stand beside it: they may come in any pieces."""
    batch, length = b.trace.tokens.shape
    given = [b.rows(b.tensor(r)).double().view(batch, length, -1) for r in refs]
    whole = code(*given)
    for first, last in ((0, 1), (1, 3), (length - 2, length)):
        part = code(*(t[1:, first:last] for t in given))
        if not all(close(p, w[1:, first:last], 1e-7) for p, w in zip(part, whole, strict=True)):
            return False
    return True
