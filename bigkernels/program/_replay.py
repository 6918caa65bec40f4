"""Pieces of a recorded call, on other numbers."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from .._torch_private import without_functions
from ._layers import is_linear
from ._trace import _IN_PLACE, Recorder, Ref, Refused, Step, exact, leaves, mapped


def refs_of(step: Step) -> list[Ref]:
    """All tensors that a step reads and another step made."""
    return [v for v in leaves((step.args, step.kwargs)) if isinstance(v, Ref)]


def steps_between(recorder: Recorder, outs: Collection[Ref], given: Collection[Ref]) -> list[int]:
    """The steps that make `outs` and depend on `given`, in order.

    Raises:
        Refused: something else that depends on the tokens goes in.
    """
    depends: dict[int, bool] = {}
    first = min((ref.step for ref in given), default=0)
    todo = [ref.step for ref in outs if ref not in given]
    while todo:
        number = todo[-1]
        if number in depends:
            todo.pop()
            continue
        step = recorder.steps[number]
        others = refs_of(step)
        waiting = [r.step for r in others if r not in given and r.step > first and r.step not in depends]
        if waiting:
            todo += waiting
            continue
        todo.pop()
        depends[number] = any(r in given or depends.get(r.step, False) for r in others)
    for number, found in depends.items():
        step = recorder.steps[number]
        if found and any(r not in given and not depends.get(r.step, False) for r in step.inputs):
            raise Refused(f"{step.path}: {step.name} reads something else that depends on the tokens", number)
        if not found and step.depends and any(ref.step == number for ref in outs):
            raise Refused(f"{step.path}: {step.name} reads the tokens", number)
    return sorted(number for number, found in depends.items() if found)


def replay(recorder: Recorder, outs: Collection[Ref], given: Mapping[Ref, Tensor]) -> list[Tensor]:
    """`outs` from other values of `given`, in float64."""
    values = {ref: laid_out(t, recorder.steps[ref.step].outs[ref.number]) for ref, t in given.items()}

    def value(leaf):
        if isinstance(leaf, Ref):
            leaf = values[leaf] if leaf in values else recorder.steps[leaf.step].outs[leaf.number]
        return exact(leaf)

    with without_functions():
        for number in steps_between(recorder, outs, given):
            step = recorder.steps[number]
            if step.module is not None and not is_linear(step.module):
                raise Refused(f"{step.path}: its inside is not looked at", number)
            args, kwargs = mapped(value, step.args), mapped(value, step.kwargs)
            if is_in_place(step):
                args = (args[0].clone(), *args[1:])
            try:
                out = step.func(*args, **kwargs)
            except Exception as error:
                where = f"{step.path}: {step.name} does not run on other numbers"
                raise Refused(f"{where} ({type(error).__name__})", number) from error
            tensors = [args[0]] if step.name == "__setitem__" else [t for t in leaves(out) if isinstance(t, Tensor)]
            for i, t in enumerate(tensors):
                if Ref(number, i) not in given:
                    values[Ref(number, i)] = t
        return [values[ref] if ref in values else exact(recorder.steps[ref.step].outs[ref.number]) for ref in outs]


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """`t` with the strides that the model's tensor has: its code may only take a view of that."""
    if t.stride() == like.stride() or t.shape != like.shape:
        return t
    return torch.empty_like(like, dtype=t.dtype, device=t.device).copy_(t)


def is_in_place(step: Step) -> bool:
    name = step.name
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name in _IN_PLACE


def dominators(recorder: Recorder, ref: Ref, known: Collection[Ref]) -> Iterator[Ref]:
    """The tensors that all ways from `known` to `ref` go through, the nearest first, without `ref` itself."""
    heap = [(-ref.step, -ref.number)]
    seen = {ref}
    first = True
    while heap:
        step, number = heapq.heappop(heap)
        here = Ref(-step, -number)
        if not heap and not first:
            yield here
        first = False
        if here in known:
            return
        for other in recorder.steps[here.step].inputs:
            if other not in seen:
                seen.add(other)
                heapq.heappush(heap, (-other.step, -other.number))


def between(recorder: Recorder, ref: Ref, known: Collection[Ref]) -> list[int]:
    """The steps that depend on the tokens between `known` and `ref`, `ref`'s own included."""
    found: set[int] = set()
    todo = [ref]
    while todo:
        here = todo.pop()
        if here.step in found or here in known:
            continue
        found.add(here.step)
        todo += recorder.steps[here.step].inputs
    return sorted(found)
