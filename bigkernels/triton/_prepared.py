"""Launchers that are read once: what one does for a layout of its arguments is noted, and done again without it.

A launcher is a straight line once shapes, strides, dtypes, devices, alignments and scalars are known: it allocates, it
launches, and it may call a few operators of torch. Yet every call checks arguments, chooses tiles and lets Triton look
at each argument of each kernel (7 us a launch). The second call of a layout is therefore watched, by a dispatch mode
that sees operators and by `launch`, which says what it launched; from the third on, a `Tape` does the same with other
tensors. A launcher that does what no tape can repeat, as reading a value from the device, is called as before.

Where nothing stands between a call and its launcher (no mode, no subclass, no profiler), a tape is played without the
dispatcher, which takes 2.5 us to arrive here.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

from .._torch_private import (
    ALLOCATION,
    KERNELS,
    PREPARED,
    TRACES,
    TorchDispatchMode,
    dispatch_flag,
    dispatch_modes,
    function_modes,
    is_profiled,
    lacks,
)
from ..ops import registry
from ._tape import Call, Launched, New, Source, Tape, Value, reads, renumbered

_MOST = 512  # layouts that a launcher remembers; then those that were noted first are forgotten
# How Triton launches what it has compiled, and tapes do; a release that does it in another way gets none.
_RUN = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)

_watching = threading.local()
_deterministic = torch.are_deterministic_algorithms_enabled


class _Unrepeatable(Exception):
    """A launcher does something that depends on more than the layout of its arguments."""


_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Watch(TorchDispatchMode):
    """Notes the allocations, operators and launches of a launcher."""

    def __init__(self, args: tuple) -> None:
        super().__init__()
        self.steps: list[New | Call | Launched] = []
        self.reason: str | None = None  # why no tape can repeat this
        self.held: list[Any] = []  # keeps the tensors alive, so that no other gets the `id` of one
        self.held_apart: list[Tensor] = []  # names of values that have one already
        self.indices: dict[int, int] = {}  # of values, by the `id` of a tensor
        self.roots: dict[int, tuple[int, int]] = {}  # of views, by their index: the value that they look into, bytes
        self.views: dict[int, New] = {}  # steps that make views, and what these look like
        for a in args:
            self._value(a)
        self.device = next(t.get_device() for t in args if isinstance(t, Tensor))

    def _value(self, t: Any) -> int:
        self.held.append(t)
        if isinstance(t, Tensor) and id(t) not in self.indices:
            self.indices[id(t)] = len(self.held) - 1
        return len(self.held) - 1

    def _known(self, value: Any) -> Any:
        """A template of an argument: tensors by their index."""
        if isinstance(value, Tensor):
            index = self.indices.get(id(value))
            if index is None:
                raise _Unrepeatable("a tensor that is no argument and was not made here")
            return Value(index)
        if isinstance(value, (list, tuple)):
            return [self._known(v) for v in value]
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.reason is None:
            try:
                self._note(func, args, kwargs, out)
            except _Unrepeatable as reason:
                self.reason = str(reason)
        return out

    def _note(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if _READS & set(func.tags):
            raise _Unrepeatable(f"{func} reads values")
        several = isinstance(out, (tuple, list))
        made = list(out) if several else [out]
        if not all(isinstance(t, Tensor) and t.get_device() == self.device for t in made):
            raise _Unrepeatable(f"{func} returns no tensors, or takes them to another device")
        if func in _ALLOCATIONS and out.layout is torch.strided and not out.is_pinned():
            self._value(out)
            self.steps.append(New(tuple(out.shape), out.stride(), out.dtype))
            return
        if func is torch.ops.aten.detach.default and id(args[0]) in self.indices:
            self.held_apart.append(out)
            self.indices[id(out)] = self.indices[id(args[0])]
            return
        call = Call(func, tuple(self._known(args)), {n: self._known(v) for n, v in kwargs.items()}, several, len(made))
        aliased = [r.alias_info for r in func._schema.returns]
        if len(made) == 1 and aliased[0] is not None and not aliased[0].is_write:
            base = next(a for a in args if isinstance(a, Tensor))
            root, offset = self.roots.get(self.indices[id(base)], (self.indices[id(base)], 0))
            moved = made[0].storage_offset() * made[0].element_size() - base.storage_offset() * base.element_size()
            self.roots[len(self.held)] = root, offset + moved
            self.views[len(self.steps)] = New(tuple(made[0].shape), made[0].stride(), made[0].dtype)
        self.steps.append(call)
        for t in made:  # what an operator writes to, it returns as another value with the same pointer
            self._value(t)

    def launched(self, kernel: Any, grid: tuple[int, ...], compiled: Any, args: tuple, constants: dict) -> None:
        if self.reason is not None:
            return
        if getattr(compiled.metadata, "global_scratch_size", 0):
            self.reason = "a launch for which Triton allocates memory"
            return
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        given, pointers = [], []
        for place, name in enumerate(kernel.arg_names):
            value = named[name]
            if isinstance(value, Tensor):
                index = self.indices.get(id(value))
                if index is None:
                    self.reason = "a launch takes a tensor that is no argument and was not made here"
                    return
                pointers.append((place, *self.roots.get(index, (index, 0))))
                value = None
            given.append(value)
        x, y, z = (*grid, 1, 1)[:3]
        self.steps.append(
            Launched(compiled.run, (x, y, z), compiled.function, compiled.packed_metadata, given, tuple(pointers))
        )

    def tape(self, arguments: int, result: Any) -> Tape | None:
        """What was noted, without what nothing needs; None where it cannot be repeated."""
        several = isinstance(result, (tuple, list))
        found = [self.indices.get(id(t)) for t in (result if several else (result,))]
        if self.reason is not None or None in found or len(set(found)) < len(found) or min(found) < arguments:
            return None  # what is no new tensor of its own is left to the launcher
        tensors = tuple(i for i, a in enumerate(self.held[:arguments]) if isinstance(a, Tensor))
        return Tape(*self._needed(arguments, found), several, self.device, arguments, tensors)

    def _needed(self, arguments: int, results: list[int]) -> tuple[list, tuple[int, ...]]:
        """The steps that are needed, and the results, by the values that are left."""
        first, value = [], arguments  # of each step, the first value that it makes
        for step in self.steps:
            first.append(value)
            value += self._made(step)
        needed = set(results)
        kept: list[int] = []
        for at in range(len(self.steps) - 1, -1, -1):
            step, begin = self.steps[at], first[at]
            made = range(begin, begin + self._made(step))
            if (type(step) is New or at in self.views) and not needed.intersection(made):
                continue
            kept.insert(0, at)
            needed |= reads(step)
        steps = {at: self.steps[at] for at in kept}
        same = self._allocated_as_views(steps, first, results)
        places = {i: i for i in range(arguments)}
        for at, step in steps.items():
            for i in range(first[at], first[at] + self._made(step)):
                places[i] = len(places)
        places |= {view: places[root] for view, root in same.items()}
        return [renumbered(step, places) for step in steps.values()], tuple(places[i] for i in results)

    def _allocated_as_views(self, steps: dict[int, Any], first: list[int], results: list[int]) -> dict[int, int]:
        """Where nothing but a view of it reads an allocation, it is made as the view is; {view: allocation}."""
        same = {}
        calls = [v for step in steps.values() if type(step) is Call for v in reads(step)]
        for at, view in self.views.items():
            root, offset = self.roots[first[at]]
            made = next((i for i, step in steps.items() if first[i] == root and type(step) is New), None)
            if at not in steps or made is None or offset or root in results or calls.count(root) > 1:
                continue
            whole = steps[made]
            if reads(steps[at]) == {root} and (math.prod(whole.shape), whole.dtype) == (
                math.prod(view.shape),
                view.dtype,
            ):
                steps[made] = view
                del steps[at]
                same[first[at]] = root
        return same

    @staticmethod
    def _made(step: Any) -> int:
        return step.made if type(step) is Call else int(type(step) is New)


def note_launch(kernel: Any, grid: tuple[int, ...], compiled: Any, args: tuple, constants: dict) -> None:
    """What `launch` says of each launch that it makes."""
    watch = getattr(_watching, "watch", None)
    if watch is not None:
        watch.launched(kernel, grid, compiled, args, constants)


def _told_apart(args: tuple) -> tuple:
    """The arguments, those that are one tensor as several: later calls with this layout may have others there."""
    seen: set[int] = set()
    return tuple(a.detach() if isinstance(a, Tensor) and (id(a) in seen or seen.add(id(a))) else a for a in args)


@functools.cache
def _can_prepare() -> bool:
    if triton.knobs.runtime.interpret or any(map(lacks, (ALLOCATION, KERNELS, PREPARED, TRACES))):
        return False
    return _RUN in " ".join(inspect.getsource(triton.runtime.jit.JITFunction.run).split())


_SCALARS = (type(None), int, float, bool, torch.dtype)


def _reader(kinds: tuple[type, ...], tapes: dict, missed: Callable, direct: bool) -> Callable:
    """A function of arguments of some types that plays the tape of their layout, or gives the layout and them to
    `missed`. `direct`: it is called without the dispatcher, for what the dispatcher would have seen to first.
    """
    source = Source()
    named = source.named
    args = [f"a{i}" for i in range(len(kinds))]
    tensors = [i for i, kind in enumerate(kinds) if issubclass(kind, Tensor)]
    selection, runtime = named(registry), named(triton.knobs.runtime)
    key = [f"{selection}._nondeterministic and not {named(_deterministic)}()", f"{selection}._forced"]
    for i, kind in enumerate(kinds):
        if i in tensors:  # one without memory, which stands for another, has no layout of a tape
            key += [f"a{i}.shape", f"a{i}.stride()", f"a{i}.dtype", f"a{i}.get_device()", f"p{i} & 15 if p{i} else -1"]
        elif kind is not type(None):
            key.append(f"a{i}")
    watched = [f"{named(dispatch_modes)}()", f"{runtime}.launch_enter_hook.calls", f"{runtime}.launch_exit_hook.calls"]
    if direct:
        modes = named(dispatch_flag)
        watched += [
            f"{modes}._is_in_torch_dispatch_mode",
            f"{named(function_modes)}()",
            f"{named(is_profiled)}()",
            *(f"a{i}.is_neg()" for i in tensors),
        ]
    source.lines += [
        "try:",
        *(f"    p{i} = a{i}.data_ptr()" for i in tensors),
        f"    key = ({', '.join(key)},)",
        "except RuntimeError:",  # sparse and nested tensors, and those that a transform wraps
        f"    return {named(missed)}(None, {', '.join(args)})",
        f"tape = {named(tapes.get)}(key)",
        f"if type(tape) is {named(Tape)} and not ({' or '.join(watched)}):",
        f"    return tape.play({', '.join(args + [f'p{i}' for i in tensors])})",
        f"return {named(missed)}(key, {', '.join(args)})",
    ]
    return source.function(args, "read")


class Prepared:
    """A launcher with tapes, by the layout of its arguments.

    Attributes:
        tapes: of each layout, or how often it was seen, or None where it has no tape.
    """

    def __init__(self, launcher: Callable) -> None:
        self.launcher = launcher
        self.tapes: dict[tuple, Tape | int | None] = {}
        self._readers: dict[tuple[type, ...], Callable] = {}  # by the types of arguments
        _all_tapes.append(self.tapes)

    def __call__(self, *args: Any) -> Any:
        """What the dispatcher calls."""
        kinds = (*map(type, args),)
        read = self._readers.get(kinds)
        if read is None:
            read = self._readers[kinds] = _reader(kinds, self.tapes, self._missed, False)
        return read(*args)

    def direct(self, overload: Callable) -> Callable:
        """What gives what an operator gives, and plays tapes without the dispatcher."""
        readers: dict[tuple[type, ...], Callable] = {}

        def call(*args: Any) -> Any:
            kinds = (*map(type, args),)
            read = readers.get(kinds)
            if read is None:
                plain = all(kind in (Tensor, Parameter, *_SCALARS) for kind in kinds)
                missed = (lambda key, *args: overload(*args)) if plain else None
                read = readers[kinds] = _reader(kinds, self.tapes, missed, True) if plain else overload
            return read(*args)

        return call

    def _missed(self, key: tuple | None, *args: Any) -> Any:
        seen = 0 if key is None else self.tapes.get(key, 0)
        if type(seen) is not int or key is None or dispatch_modes():
            return self.launcher(*args)
        while len(self.tapes) >= _MOST:
            self.tapes.pop(next(iter(self.tapes)), None)
        if seen == 0:  # many layouts come once
            self.tapes[key] = 1
            return self.launcher(*args)
        args = _told_apart(args)
        watch, outer = _Watch(args), getattr(_watching, "watch", None)
        _watching.watch = watch
        try:
            with watch:
                result = self.launcher(*args)
        finally:
            _watching.watch = outer
        self.tapes[key] = watch.tape(len(args), result)
        return result


def prepared(launcher: Callable) -> Callable:
    """A launcher with tapes, where this Triton launches as tapes do."""
    return Prepared(launcher) if _can_prepare() else launcher


_all_tapes: list[dict] = []


def all_tapes() -> list[dict]:
    """The tapes of every launcher: to be cleared by whoever exchanges what launchers choose by, tiles say."""
    return _all_tapes
