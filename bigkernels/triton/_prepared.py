"""Launchers that are read once: what one does for a layout of its arguments is noted, and done again without it.

A launcher is a straight line once shapes, strides, dtypes, devices, alignments and scalars are known: it allocates, it
launches, and it may call a few operators of torch. Yet every call checks arguments, chooses tiles and lets Triton look
at each argument of each kernel (7 us a launch). The second call of a layout is therefore watched, by a dispatch mode
that sees operators and by `launch`, which says what it launched; from the third on, a `_Tape` does the same with other
tensors. A launcher that does what no tape can repeat, as reading a value from the device, is called as before.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._torch_private import TorchDispatchMode, cuda_device, dispatch_modes, empty_cpu, empty_cuda
from ..ops import _registry

_MOST = 512  # layouts that a launcher remembers; then those that were noted first are forgotten
# How Triton launches what it has compiled, and tapes do; a release that does it in another way gets none.
_RUN = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)

_watching = threading.local()
_deterministic = torch.are_deterministic_algorithms_enabled


def _driver() -> Any:
    return triton.runtime.driver.active


class _Unrepeatable(Exception):
    """A launcher does something that depends on more than the layout of its arguments."""


class _Value(NamedTuple):
    """A tensor in a tape: an argument, or what a step made."""

    index: int


class _New(NamedTuple):
    """An allocation."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Call(NamedTuple):
    """A call of an operator of torch, whose result, if any, is the next value."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    several: bool  # whether it returns a tuple
    made: int  # tensors that it returns


class _Launched(NamedTuple):
    """A launch: the kernel as it was compiled, its grid and its arguments; at `pointers` (place, value, offset)."""

    run: Callable
    grid: tuple[int, int, int]
    function: int
    metadata: Any
    args: list
    pointers: tuple[tuple[int, int, int], ...]


@dataclass
class _Tape:
    """The steps of a launcher, and which values it returns. Value i is argument i, as far as there are arguments."""

    steps: list[_New | _Call | _Launched]
    results: tuple[int, ...]
    several: bool
    device: int

    def play(self, args: tuple, pointers: list[int]) -> Any:
        """The launcher's result; `pointers` are those of the arguments, 0 for scalars."""
        values = list(args)
        device, stream = self.device, None
        for step in self.steps:
            kind = type(step)
            if kind is _New:
                made = empty_cuda(*step) if device >= 0 else empty_cpu(*step)
                values.append(made)
                pointers.append(made.data_ptr())
            elif kind is _Launched:
                if stream is None:
                    stream = _driver().get_current_stream(max(device, 0))
                run, (x, y, z), function, metadata, given, places = step
                given = given.copy()
                for place, value, offset in places:
                    given[place] = pointers[value] + offset
                run(x, y, z, stream, function, metadata, None, None, None, *given)
            else:
                made = step.function(*_filled(step.args, values), **_filled_by_name(step.kwargs, values))
                for t in made if step.several else (made,):
                    values.append(t)
                    pointers.append(t.data_ptr() if isinstance(t, Tensor) else 0)
        if self.several:
            return tuple(values[i] for i in self.results)
        return values[self.results[0]]


def _filled(args: Any, values: list) -> list:
    return [
        values[a.index] if type(a) is _Value else _filled(a, values) if isinstance(a, list) else a for a in args
    ]  # fmt: skip


def _filled_by_name(kwargs: dict[str, Any], values: list) -> dict[str, Any]:
    return dict(zip(kwargs, _filled(kwargs.values(), values), strict=True)) if kwargs else kwargs


_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Watch(TorchDispatchMode):
    """Notes the allocations, operators and launches of a launcher."""

    def __init__(self, args: tuple) -> None:
        super().__init__()
        self.steps: list[_New | _Call | _Launched] = []
        self.reason: str | None = None  # why no tape can repeat this
        self.held: list[Any] = []  # keeps the tensors alive, so that no other gets the `id` of one
        self.held_apart: list[Tensor] = []  # names of values that have one already
        self.indices: dict[int, int] = {}  # of values, by the `id` of a tensor
        self.roots: dict[int, tuple[int, int]] = {}  # of views, by their index: the value that they look into, bytes
        self.views: dict[int, _New] = {}  # steps that make views, and what these look like
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
            return _Value(index)
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
            self.steps.append(_New(tuple(out.shape), out.stride(), out.dtype))
            return
        if func is torch.ops.aten.detach.default and id(args[0]) in self.indices:
            self.held_apart.append(out)
            self.indices[id(out)] = self.indices[id(args[0])]
            return
        call = _Call(func, tuple(self._known(args)), {n: self._known(v) for n, v in kwargs.items()}, several,
                     len(made))  # fmt: skip
        aliased = [r.alias_info for r in func._schema.returns]
        if len(made) == 1 and aliased[0] is not None and not aliased[0].is_write:
            base = next(a for a in args if isinstance(a, Tensor))
            root, offset = self.roots.get(self.indices[id(base)], (self.indices[id(base)], 0))
            moved = made[0].storage_offset() * made[0].element_size() - base.storage_offset() * base.element_size()
            self.roots[len(self.held)] = root, offset + moved
            self.views[len(self.steps)] = _New(tuple(made[0].shape), made[0].stride(), made[0].dtype)
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
        self.steps.append(_Launched(compiled.run, (x, y, z), compiled.function, compiled.packed_metadata, given,
                                    tuple(pointers)))  # fmt: skip

    def tape(self, arguments: int, result: Any) -> _Tape | None:
        """What was noted, without what nothing needs; None where it cannot be repeated."""
        several = isinstance(result, (tuple, list))
        found = [self.indices.get(id(t)) for t in (result if several else (result,))]
        if self.reason is not None or None in found or len(set(found)) < len(found) or min(found) < arguments:
            return None  # what is no new tensor of its own is left to the launcher
        return _Tape(*self._needed(arguments, found), several, self.device)

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
            if (type(step) is _New or at in self.views) and not needed.intersection(made):
                continue
            kept.insert(0, at)
            needed |= _reads(step)
        steps = {at: self.steps[at] for at in kept}
        same = self._allocated_as_views(steps, first, results)
        places = {i: i for i in range(arguments)}
        for at, step in steps.items():
            for i in range(first[at], first[at] + self._made(step)):
                places[i] = len(places)
        places |= {view: places[root] for view, root in same.items()}
        return [_renumbered(step, places) for step in steps.values()], tuple(places[i] for i in results)

    def _allocated_as_views(self, steps: dict[int, Any], first: list[int], results: list[int]) -> dict[int, int]:
        """Where nothing but a view of it reads an allocation, it is made as the view is; {view: allocation}."""
        same = {}
        calls = [v for step in steps.values() if type(step) is _Call for v in _reads(step)]
        for at, view in self.views.items():
            root, offset = self.roots[first[at]]
            made = next((i for i, step in steps.items() if first[i] == root and type(step) is _New), None)
            if at not in steps or made is None or offset or root in results or calls.count(root) > 1:
                continue
            whole = steps[made]
            if _reads(steps[at]) == {root} and (math.prod(whole.shape), whole.dtype) == (
                math.prod(view.shape), view.dtype
            ):  # fmt: skip
                steps[made] = view
                del steps[at]
                same[first[at]] = root
        return same

    @staticmethod
    def _made(step: Any) -> int:
        return step.made if type(step) is _Call else int(type(step) is _New)


def _reads(step: Any) -> set[int]:
    if type(step) is _Launched:
        return {value for _, value, _ in step.pointers}
    return {v.index for v in _values(step.args) + _values(step.kwargs.values())} if type(step) is _Call else set()


def _values(args: Any) -> list[_Value]:
    found = []
    for a in args:
        found += [a] if type(a) is _Value else _values(a) if isinstance(a, list) else []
    return found


def _renumbered(step: Any, places: dict[int, int]) -> Any:
    def moved(a: Any) -> Any:
        return _Value(places[a.index]) if type(a) is _Value else [*map(moved, a)] if isinstance(a, list) else a

    if type(step) is _Launched:
        return step._replace(pointers=tuple((place, places[v], offset) for place, v, offset in step.pointers))
    if type(step) is _Call:
        return step._replace(args=tuple(map(moved, step.args)), kwargs={n: moved(a) for n, a in step.kwargs.items()})
    return step


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
    if triton.knobs.runtime.interpret:
        return False
    return _RUN in " ".join(inspect.getsource(triton.runtime.jit.JITFunction.run).split())


def prepared(launcher: Callable) -> Callable:
    """A launcher with tapes, by the layout of its arguments."""
    if not _can_prepare():
        return launcher
    tapes: dict[tuple, _Tape | int | None] = {}  # or how often a layout was seen, or None where it has no tape
    find, tensor, runtime = tapes.get, Tensor, triton.knobs.runtime

    def call(*args: Any) -> Any:
        key: list[Any] = [_registry._nondeterministic and not _deterministic(), _registry._forced]
        pointers: list[int] = []
        for a in args:
            if isinstance(a, tensor):
                pointer = a.data_ptr()
                pointers.append(pointer)
                key += (a.shape, a.stride(), a.dtype, a.get_device(), pointer & 15)
            else:
                pointers.append(0)
                key.append(a)
        key = tuple(key)
        tape = find(key, 0)
        if type(tape) is _Tape and not (
            dispatch_modes() or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
        ):
            device = tape.device
            if device < 0 or device == cuda_device():
                return tape.play(args, pointers)
            with torch.cuda.device(device):
                return tape.play(args, pointers)
        if type(tape) is not int or dispatch_modes():
            return launcher(*args)
        while len(tapes) >= _MOST:
            tapes.pop(next(iter(tapes)), None)
        if tape == 0:  # many layouts come once
            tapes[key] = 1
            return launcher(*args)
        args = _told_apart(args)
        watch, outer = _Watch(args), getattr(_watching, "watch", None)
        _watching.watch = watch
        try:
            with watch:
                result = launcher(*args)
        finally:
            _watching.watch = outer
        tapes[key] = watch.tape(len(args), result)
        return result

    call.tapes = tapes
    _all_tapes.append(tapes)
    return call


_all_tapes: list[dict] = []


def all_tapes() -> list[dict]:
    """The tapes of every launcher: to be cleared by whoever exchanges what launchers choose by, tiles say."""
    return _all_tapes
