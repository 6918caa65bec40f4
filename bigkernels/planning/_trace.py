"""What a run on fake tensors allocates, frees, reads, writes and computes.

`FakeTensorMode` runs the real Python and autograd code on tensors without memory. `Recorder` follows every storage
that an operator makes until nothing holds it: a log of allocations and releases that is exact where the operators
allocate what they return. What a kernel takes and gives back within one call is not in it.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_private import TorchDispatchMode, storage_users, tree_iter
from ..patch._lazy import Lazy
from ._flops import flops_of, moved_bytes

_CUDA_BLOCK = 512  # what the CUDA allocator rounds sizes up to
# The engine calls operators from C++; these frames lie between it and `Recorder`.
_WRAPPERS = ("torch._dynamo.", "torch._compile", "torch.utils._python_dispatch", "torch._subclasses.")


class Work(NamedTuple):
    """One call of an operator."""

    operator: str
    dtype: str
    flops: int  # of matrix products, convolutions and attention; 0 for everything else
    bytes: int  # read and written, as if nothing was in a cache


@dataclass
class Phase:
    """A part of a run: where it begins and ends in the log, and its work."""

    name: str
    begin: int
    end: int = 0
    work: list[Work] = field(default_factory=list)

    @property
    def flops(self) -> int:
        return sum(w.flops for w in self.work)

    @property
    def bytes(self) -> int:
        return sum(w.bytes for w in self.work)


@dataclass
class Trace:
    """The log of a run.

    Attributes:
        events: (number of a storage, bytes), negative where it is freed.
        tags: what a storage is, for those that somebody told.
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    tags: dict[int, str] = field(default_factory=dict)

    def alive(self, end: int) -> dict[int, int]:
        """The storages after so many events, with their bytes."""
        held: dict[int, int] = {}
        for number, size in self.events[:end]:
            if size >= 0:
                held[number] = size
            else:
                held.pop(number, None)
        return held

    def peak(self, phase: Phase) -> tuple[int, int]:
        """The largest number of bytes held at once while `phase` ran, and after how many events that was."""
        now = sum(self.alive(phase.begin).values())
        most, where = now, phase.begin
        for index in range(phase.begin, phase.end):
            now += self.events[index][1]
            if now > most:
                most, where = now, index + 1
        return most, where

    def by_tag(self, end: int) -> Counter[str]:
        """Bytes held after so many events, by what they are; "temporary" where nobody told."""
        held: Counter[str] = Counter()
        for number, size in self.alive(end).items():
            held[self.tags.get(number, "temporary")] += size
        return held


class Recorder(TorchDispatchMode):
    """Records a run into `trace`. Tensors that were there before have to be shown to it by `hold`."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.trace = Trace()
        self._device = device
        self._numbers: dict[int, tuple[int, Any]] = {}  # address of a storage: its number, the reference to it
        self._sizes: dict[int, int] = {}
        self._next = 0
        self._rows: dict[int, tuple[int, int]] = {}  # number: size of the last dimension and elements, as it was made
        self._phase: Phase | None = None

    # ---- told from outside ------------------------------------------------------------------------------------------

    def hold(self, values: Any, tag: str, *, again: bool = False) -> int:
        """Say what the tensors in a nest of containers are; returns the bytes of those that had no tag yet.

        Args:
            again: also where a storage has a tag already.
        """
        total = 0
        for t in tensors_in(values):
            number = self._follow(t)
            if number is not None and (again or number not in self.trace.tags):
                self.trace.tags[number] = tag
                total += self._sizes[number]
        return total

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        self._phase = Phase(name, len(self.trace.events))
        try:
            yield self._phase
        finally:
            self._phase.end, self._phase = len(self.trace.events), None

    def tag_alive(self, tag: str) -> int:
        """Everything that lives now and has no tag gets this one; returns its bytes."""
        total = 0
        for number, _ in self._numbers.values():
            if number not in self.trace.tags:
                self.trace.tags[number] = tag
                total += self._sizes[number]
        return total

    def tag_shape(self, last: int, least: int, tag: str) -> int:
        """What was made with rows of `last` elements and at least `least` in all; returns the bytes alive of it."""
        for number, (side, elements) in self._rows.items():
            if side == last and elements >= least and number not in self.trace.tags:
                self.trace.tags[number] = tag
        numbers = [number for number, _ in self._numbers.values()]
        return sum(self._sizes[n] for n in numbers if self.trace.tags.get(n) == tag)

    # ---- the run ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        if any(issubclass(t, Lazy) for t in types):
            return NotImplemented  # it has no memory; what it computes comes here again
        kwargs = kwargs or {}
        if func is torch.ops.aten.equal.default and args[0].dtype == torch.uint8:
            # States of a random number generator, which segments compare before they run again: nothing is drawn here.
            return args[0].shape == args[1].shape
        if func is torch.ops.aten.add.Tensor and _from_engine():
            self._reuse(*args[:2])
        out = _grouped_mm(*args, **kwargs) if func is torch.ops.aten._grouped_mm.default else func(*args, **kwargs)
        results = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        for t in results:
            self._follow(t)
        if self._phase is not None:
            work = work_of(func, args, kwargs, out)
            if work.bytes or work.flops:
                self._phase.work.append(work)
        return out

    def _follow(self, t: Tensor) -> int | None:
        """The number of a tensor's storage, which is new if it has not been seen; None if it is not counted."""
        if t.layout != torch.strided or t.device.type != self._device.type:
            return None
        storage = t.untyped_storage()
        address = storage._cdata
        known = self._numbers.get(address)
        if known is not None:
            return known[0]
        number, self._next = self._next, self._next + 1
        size = storage.nbytes()
        if self._device.type == "cuda":
            size = -(-size // _CUDA_BLOCK) * _CUDA_BLOCK

        # The address is free for another storage from here on.
        def free(_: object, address: int = address, number: int = number) -> None:
            self._free(address, number)

        reference = weakref.ref(storage, free)
        self._numbers[address] = number, reference
        self._sizes[number] = size
        self._rows[number] = (t.shape[-1] if t.dim() else 1, t.numel())
        self.trace.events.append((number, size))
        return number

    def _free(self, address: int, number: int) -> None:
        del self._numbers[address]
        if self._sizes[number] >= 0:
            self.trace.events.append((number, -self._sizes[number]))

    def _reuse(self, *gradients: Any) -> None:
        """Of two gradients that the engine adds it writes the sum over one, but not if they are subclasses, as here."""
        for t in gradients:
            if not isinstance(t, Tensor) or t.numel() * t.element_size() != t.untyped_storage().nbytes():
                continue
            known = self._numbers.get(t.untyped_storage()._cdata)
            # Of a storage that only this gradient holds: it, the meta tensor inside of it, and a view's base.
            if known is not None and storage_users(t.untyped_storage()._cdata) <= 3:
                number = known[0]
                self.trace.events.append((number, -self._sizes[number]))
                self._sizes[number] = -1
                return


def tensors_in(values: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in containers, dataclasses and plain objects, such as caches."""
    seen = set() if seen is None else seen
    if id(values) in seen:
        return
    seen.add(id(values))
    if isinstance(values, Tensor):
        yield values
        return
    inner: Iterable[Any] = ()
    if isinstance(values, dict):
        inner = values.values()
    elif isinstance(values, (list, tuple, set)):
        inner = values
    elif type(values).__module__ not in ("builtins", "torch") and hasattr(values, "__dict__"):
        inner = vars(values).values()
    for value in inner:
        yield from tensors_in(value, seen)


def _grouped_mm(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> Tensor:
    """CPUs take any dtype, and the operator's fake bfloat16 alone."""
    product = torch.ops.aten._grouped_mm.default(a.bfloat16(), b.bfloat16(), *rest, **options)
    return torch.empty_strided(
        product.shape, product.stride(), dtype=options.get("out_dtype") or a.dtype, device=a.device
    )


def _from_engine() -> bool:
    """Whether the autograd engine itself called, and not a function's backward."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_WRAPPERS):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def work_of(func: Any, args: tuple, kwargs: dict, out: Any) -> Work:
    """Of one call of an operator."""
    results = [t for t in tree_iter(out) if isinstance(t, Tensor)]
    moved, flops = moved_bytes(func, args, kwargs, results), flops_of(func, args, kwargs, out)
    return Work(func.name(), _dtype(args, results), flops, moved)


def _dtype(args: tuple, made: list[Tensor]) -> str:
    for t in (*tree_iter(args), *made):
        if isinstance(t, Tensor) and t.is_floating_point():
            return str(t.dtype).removeprefix("torch.")
    return "other"
