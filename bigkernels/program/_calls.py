"""The model's own code in the middle of a program: a module whose inside nobody knows, but that is a function of what
goes in, or of that and the layer of the cache that it keeps.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._arguments import from_context
from ._context import Context, FromContext, MaskOf
from ._forms import close
from ._ir import Attend, Call, Stored
from ._trace import ModuleCall, Recorder, Ref, Refused, leaves, mapped
from .suspend import suspended, wrapped

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
    """`module`'s outputs, (B, S, width) each, from values (B, S, width); in a context, if it is given one's."""

    module: nn.Module
    args: tuple
    kwargs: tuple
    outs: tuple[int, ...]

    def __call__(self, *values: Tensor, context: Context | None = None) -> tuple[Tensor, ...]:
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
            if isinstance(leaf, FromContext):
                return leaf.get(context)
            return given[leaf.number] if isinstance(leaf, Place) else leaf

        args, kwargs = mapped(fill, self.args), {k: mapped(fill, v) for k, v in self.kwargs}
        with torch.no_grad():
            if whole:
                seeming = {id(given[i]): p.dtype for i, p in wanted.items()}
                out = in_float64(self.module, args, kwargs, seeming, None if context is None else context.cache)
            else:
                out = self.module(*args, **kwargs)
        tensors = [t for t in leaves(out) if isinstance(t, Tensor)]
        return tuple(tensors[i].reshape(batch, length, -1).to(values[0].dtype) for i in self.outs)


def in_float64(module: nn.Module, args: tuple, kwargs: dict, seeming: dict[int, torch.dtype], cache: Any = None) -> Any:
    """A module's own code on tensors of float64, which seem to be of the dtypes given by their ids."""
    from ._record import _eager_experts, _noted, _wrap

    recorder = Recorder()
    for t in leaves((args, kwargs)):
        if isinstance(t, Tensor) and id(t) in seeming:
            recorder.give(t, seeming[id(t)])
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager_experts(module))
        stack.enter_context(suspended(module))
        stack.enter_context(wrapped(module, functools.partial(_wrap, recorder)))
        if cache is not None:
            stack.enter_context(_noted(cache, recorder, []))
        stack.enter_context(recorder)
        return module(*args, **kwargs)


def enclosing(trace: Trace, step: int, opaque: list[ModuleCall], cached: bool = False) -> list[ModuleCall]:
    """Calls of the innermost module around a step that may be left to its own code, and those like it in other layers.

    Those that were tried before, and what lies in them, are not. `cached`: of those that are given the cache.
    """
    if cached:
        callers = [c for c in trace.recorder.calls if c.begin <= step < c.end and takes_cache(trace, c)]
        call = min(callers, key=lambda c: c.end - c.begin, default=None)
        if call is not None and any(
            takes_cache(trace, c)
            for c in trace.recorder.calls
            if c is not call and call.begin <= c.begin < c.end <= call.end
        ):
            return []  # what is not known is something else in it
        if call is None or call in opaque or not _reads(trace, call) or not call.outs:
            return []
        alike = [c for c in trace.recorder.calls if _pattern(c.path) == _pattern(call.path)]
        return [c for c in alike if type(c.module) is type(call.module) and takes_cache(trace, c)]
    stops = {u.step for u in trace.updates}
    stops |= {i for i, s in enumerate(trace.recorder.steps) if s.name == "scaled_dot_product_attention"}
    stops.add(0)
    tried = {_pattern(c.path) for c in opaque}
    callers = [c for c in trace.recorder.calls if c.begin <= step < c.end]
    for call in sorted(callers, key=lambda c: c.end - c.begin):
        if any(call.begin <= s < call.end for s in stops):
            return []
        if _pattern(call.path) not in tried and _reads(trace, call) and isinstance(call.outs[:1], tuple) and call.outs:
            alike = [c for c in trace.recorder.calls if _pattern(c.path) == _pattern(call.path)]
            return [c for c in alike if not any(c.begin <= s < c.end for s in stops)]
    return []


def _pattern(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def takes_cache(trace: Trace, call: ModuleCall) -> bool:
    return any(leaf is trace.cache for leaf in leaves((call.args, call.kwargs)))


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
    cached = takes_cache(b.trace, call)
    layer = _layer_of(b, call) if cached else -1

    def place(leaf: Any) -> Any:
        if isinstance(leaf, Ref) and leaf in numbers:
            t = b.tensor(leaf)
            if t.shape[:2] == (batch, length) and t.dim() == 3:
                flat = False
            elif t.dim() == 2 and t.shape[0] == batch * length:
                flat = True
            else:
                raise Refused(f"{where}: reads a tensor that has no row for each token")
            kind = b.recorder.seeming.get(id(t), t.dtype)
            if kind == torch.float64:  # of a state that was kept
                kind = b.trace.dtype
            return Place(refs.index(leaf), flat, kind)
        if isinstance(leaf, Tensor) and id(leaf) in b.trace.stored:
            return b.trace.stored[id(leaf)]
        t = b.tensor(leaf) if isinstance(leaf, Ref) else leaf
        if cached and (leaf is b.trace.cache or (isinstance(t, Tensor) and t.numel() > 1)):
            try:
                return from_context(b, leaf, layer)
            except Refused as refused:
                raise Refused(f"{where}: {refused}") from refused
        if isinstance(t, Tensor) and t.numel() > 1:
            raise Refused(f"{where}: reads more than the hidden states")
        return t

    args = tuple(mapped(place, call.args))
    kwargs = tuple((k, mapped(place, v)) for k, v in call.kwargs.items())
    kept, outs = [], []
    read = {b.trace.logits, *(r for n in b.needed if n >= call.end for r in b.recorder.steps[n].inputs)}
    for i, ref in enumerate(call.outs):
        if ref not in read or ref in b.values:
            continue
        if b.recorder.steps[ref.step].depends and b._width(ref):
            kept.append(i)
            outs.append(b.new(b._width(ref)))
            b.values[ref] = outs[-1]
    if not outs:
        raise Refused(f"{where}: makes nothing that has a row for each token")
    code = ModuleCode(call.module, args, kwargs, tuple(kept))
    if cached:
        b.own_layers(call, layer, any(isinstance(leaf, MaskOf) for leaf in leaves((args, [v for _, v in kwargs]))))
        b.graph.operations.append(Call(tuple(numbers.values()), tuple(outs), code, call.path, cached=True))
        return
    if not _by_token(b, code, refs):
        raise Refused(f"{where}: what it makes of a token depends on the others", call.begin)
    b.graph.operations.append(Call(tuple(numbers.values()), tuple(outs), code, call.path))


def _layer_of(b: Builder, call: ModuleCall) -> int:
    """Of the cache, that a module keeps."""
    layers = {u.layer for u in b.trace.updates if call.begin <= u.step < call.end}
    layers |= {m.layer_idx for m in call.module.modules() if isinstance(getattr(m, "layer_idx", None), int)}
    if len(layers) != 1:
        raise Refused(f"{call.path}: keeps {len(layers)} layers of the cache")
    return layers.pop()


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


def window_in(op: Attend | Call) -> set[int]:
    """The windows of an attention, or of the masks that a call is given."""
    if isinstance(op, Attend):
        return {op.window}
    return {leaf.window for leaf in leaves((op.function.args, op.function.kwargs)) if isinstance(leaf, MaskOf)}


def with_window(op: Attend | Call, window: int) -> Attend | Call:
    if isinstance(op, Attend):
        return replace(op, window=window)

    def put(leaf: Any) -> Any:
        return replace(leaf, window=window) if isinstance(leaf, MaskOf) else leaf

    args, kwargs = mapped(put, op.function.args), tuple((k, mapped(put, v)) for k, v in op.function.kwargs)
    return replace(op, function=replace(op.function, args=args, kwargs=kwargs))
