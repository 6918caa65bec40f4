"""Segments that run again without their expensive operators: their results are kept.

Two dispatch modes, below autograd: one notes results while a segment runs first, one hands them out while it runs
again. What is worth keeping is learnt from both: how long each operator took, and which of them the second run reaches
at all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch_private import Overload, TorchDispatchMode, counting_writes
from ._policy import Selection
from ._recompute import Misplaced, gpus, random_state
from ._saver import Exact, Packed, Saver, is_parameter

# Attention, whose work grows with the square of the sequence, and products, whose work for each byte grows with the
# width of the model.
ATTENTION = frozenset(
    (
        "bigkernels::attention_fwd",
        "bigkernels::varlen_attention_fwd",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
    )
)
PRODUCTS = frozenset(
    (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_mm",
        "aten::_grouped_mm",
        "aten::linear",
        "aten::convolution",
        "aten::mkldnn_linear",
        "aten::_addmm_activation",
        "mkldnn::_linear_pointwise",
        "bigkernels::linear_fwd",
        "bigkernels::quantized_linear_fwd",
    )
)


# (operator, args, kwargs, result) -> seconds, for tensors on which nothing is computed.
_estimate: ContextVar[Callable[..., float] | None] = ContextVar("_estimate", default=None)


@contextmanager
def times_estimated_by(estimate: Callable[..., float]) -> Iterator[None]:
    """What to keep is learnt from these times, and not from measured ones."""
    token = _estimate.set(estimate)
    try:
        yield
    finally:
        _estimate.reset(token)


Key = tuple[str, int]  # an operator, and which of its calls in a segment


@dataclass
class _Call:
    """One call of an operator in a segment, from its first runs."""

    seconds: float  # the least of them
    nbytes: int  # of its results


@dataclass
class Plan:
    """What is kept of the calls of a segment. It outlives the runs of the segment, and segments of one structure share
    it: the more runs are measured before the first backward, the better the choice.
    """

    selection: Selection
    calls: dict[Key, _Call] = field(default_factory=dict)  # measured
    saved_bytes: int = 0  # what autograd would have kept of a segment
    input_bytes: int = 0  # what is kept in any case
    chosen: frozenset[Key] | None = None
    reached: dict[str, int] | None = None  # calls of each operator up to the last saved tensor; later ones are not kept
    unlike: set[str] = field(default_factory=set)  # operators that are not called as often when a segment runs again

    def __post_init__(self):
        self.names = self.selection.operators or ATTENTION | PRODUCTS  # of operators that may be kept

    @property
    def measures(self) -> bool:
        return self.selection.budget is not None and self.chosen is None

    def note(self, calls: dict[Key, _Call], saved_bytes: int, input_bytes: int) -> None:
        self.saved_bytes, self.input_bytes = max(self.saved_bytes, saved_bytes), max(self.input_bytes, input_bytes)
        for key, call in calls.items():
            known = self.calls.setdefault(key, call)
            known.seconds = min(known.seconds, call.seconds)

    def keeps(self, key: Key) -> bool:
        if key[0] in self.unlike or (self.reached is not None and key[1] >= self.reached.get(key[0], 0)):
            return False
        if self.chosen is not None:
            return key in self.chosen
        if self.measures:
            return key[0] in ATTENTION  # more, when it is known what there is room for
        return key[0] in self.names

    def learn(self, reached: dict[str, int]) -> None:
        """The segment has run again, with so many calls of each operator."""
        known = self.reached or {}
        self.reached = known | {name: max(count, known.get(name, 0)) for name, count in reached.items()}
        if self.measures and self.calls:
            self.chosen = self._choose()
            self.names = frozenset(name for name, _ in self.chosen)

    def _choose(self) -> frozenset[Key]:
        budget, reached = self.selection.budget or 0, self.reached or {}
        left = int(budget * self.saved_bytes) - self.input_bytes if isinstance(budget, float) else budget
        allowed = self.selection.operators
        worth = [
            (c.seconds / c.nbytes, key)
            for key, c in self.calls.items()
            if c.nbytes and key[1] < reached.get(key[0], 0) and (allowed is None or key[0] in allowed)
        ]
        paths = set()
        for _, key in sorted(worth, reverse=True):
            if self.calls[key].nbytes <= left:
                paths.add(key)
                left -= self.calls[key].nbytes
        return frozenset(paths)


# An operator on arguments of such shapes, and which of these calls: hooks that run in one run and not in the other, as
# those that gather the shards of parameters, may call anything in between.
Place = tuple[Overload, tuple, int]


@dataclass
class Results:
    """What one run of a segment has kept, and how to note it and hand it out."""

    plan: Plan
    saver: Saver | None = None  # in which form; None: as they are
    kept: dict[Place, _Kept] = field(default_factory=dict)
    calls: Counter[tuple] = field(default_factory=Counter)  # at the last saved tensor, of operators that may be kept
    noting: _Note | None = None
    input_bytes: int = 0
    saved_bytes: int = 0
    storages: dict[int, StorageWeakRef] = field(default_factory=dict)

    def watch(self, tensor: Tensor) -> None:
        """A tensor is saved. While measuring, adds up what autograd would keep, each storage once."""
        noting = self.noting
        assert noting is not None  # within `forward`
        noting.saved_at = noting.count
        if not self.plan.measures or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages and not is_parameter(tensor):
            self.storages[storage._cdata] = StorageWeakRef(storage)
            self.saved_bytes += storage.nbytes()

    def forward(self) -> TorchDispatchMode:
        return _Note(self)

    def recompute(self) -> TorchDispatchMode:
        return _HandOut(self)


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]


@cache
def _always_recomputed(func: Overload) -> bool:
    """Views and operators that write their arguments are done again: they cost nothing, or have to happen. They are
    not numbered either. No more are conversions, which autocast remembers and leaves out of one run or the other, and
    what processes do together.
    """
    schema = func._schema
    # A fake tensor is asked for its device by an operator, as often as somebody wants to know.
    return (
        func.namespace in ("prim", "profiler", "c10d", "_c10d_functional", "fsdp")
        or schema.name == "aten::_to_copy"
        or schema.is_mutable
        or any(r.alias_info is not None for r in schema.returns)
    )


class _Mode(TorchDispatchMode):
    def __init__(self, results: Results):
        super().__init__()
        self.results, self.plan = results, results.plan
        self.numbers: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Note(_Mode):
    def __init__(self, results: Results):
        super().__init__(results)
        results.noting = self
        self.measure = self.plan.measures
        self.calls: dict[Key, _Call] = {}
        self.count = self.saved_at = 0  # calls of operators that may be kept; of these, before the last saved tensor
        self.order: list[tuple] = []  # these calls
        self.like: Counter[tuple] = Counter()
        if self.measure:
            self.plan.saved_bytes = 0  # a run before may have failed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if _always_recomputed(func) or not (self.measure or name in self.plan.names):
            return func(*args, **(kwargs or {}))
        key = name, self.numbers[name]
        self.numbers[name] += 1
        keeps = self.plan.keeps(key)
        if keeps or not self.measure or name in ATTENTION:
            kind = _kind(func, args)
            number, self.like[kind] = self.like[kind], self.like[kind] + 1
            self.order.append(kind)
            self.count += 1
        # What has drawn random numbers must draw them again, or those that follow would draw others.
        before = _random(args) if keeps and torch.Tag.nondeterministic_seeded in func.tags else None
        if self.measure:
            out = self._timed(key, func, args, kwargs or {})
        else:
            out = func(*args, **(kwargs or {}))
        if keeps and (before is None or before == _random(args)) and not _nested(out):
            self.results.kept[(*kind, number)] = _Kept(out, self.results.saver)
        return out

    def _timed(self, key: Key, func: Callable, args: tuple, kwargs: dict) -> Any:
        estimate = _estimate.get()
        if estimate is not None:
            out = func(*args, **kwargs)
            self.calls[key] = _Call(estimate(func, args, kwargs, out), sum(t.nbytes for t in _tensors(out)))
            return out
        wait = torch.cuda.synchronize if torch.cuda.is_initialized() else _nothing
        wait()
        begin = time.perf_counter()
        out = func(*args, **kwargs)
        wait()
        self.calls[key] = _Call(time.perf_counter() - begin, sum(t.nbytes for t in _tensors(out)))
        return out

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.measure and error[0] is None:
            self.plan.note(self.calls, self.results.saved_bytes, self.results.input_bytes)
        self.results.noting = None
        self.results.kept = {i: k for i, k in self.results.kept.items() if k.intact()}
        self.results.calls = Counter(self.order[: self.saved_at])


class _HandOut(_Mode):
    def __init__(self, results: Results):
        super().__init__(results)
        self.learns = self.plan.measures
        self.kinds = {place[:2] for place in results.kept}
        self.functions = {function for function, _ in self.kinds}
        self.like: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if _always_recomputed(func) or not (self.learns or name in self.plan.names):
            return func(*args, **(kwargs or {}))
        self.numbers[name] += 1
        if func not in self.functions:
            return func(*args, **(kwargs or {}))
        kind = _kind(func, args)
        number, self.like[kind] = self.like[kind], self.like[kind] + 1
        kept = self.results.kept.get((*kind, number))
        if kept is None or not kept.intact():
            return func(*args, **(kwargs or {}))
        return kept.get()

    def __exit__(self, error=None, *rest) -> None:
        super().__exit__(error, *rest)
        if error is not None:
            return
        unlike = {
            func._schema.name
            for func, shapes in self.kinds
            if self.like[func, shapes] != self.results.calls[func, shapes]
        }
        if unlike:
            self.plan.unlike |= unlike
            self.results.kept = {}
            raise Misplaced
        self.plan.learn(self.numbers)


def _kind(func: Overload, args: tuple) -> tuple:
    return func, tuple([(a.shape, a.dtype) for a in args if isinstance(a, Tensor)])


class _Kept:
    """What one call has returned."""

    def __init__(self, out: Any, saver: Saver | None):
        self.saver = saver
        self.kind = type(out) if isinstance(out, (tuple, list)) else None
        # Without their graphs, which hold this; with their counters of what is written to them.
        with counting_writes():
            pack = Exact if saver is None else saver.pack
            self.values = [pack(v) if isinstance(v, Tensor) else v for v in (out if self.kind else (out,))]

    def intact(self) -> bool:
        return all(v.intact() for v in self.values if isinstance(v, Exact))

    def get(self) -> Any:
        values = [self._get(v) for v in self.values]
        return values[0] if self.kind is None else self.kind(values)

    def _get(self, value: Any) -> Any:
        if isinstance(value, Exact):
            with counting_writes():
                return value.get().detach()
        return self.saver.unpack(value) if isinstance(value, Packed) and self.saver is not None else value


def _nested(out: Any) -> bool:
    return isinstance(out, (tuple, list)) and any(isinstance(v, (tuple, list)) for v in out)


def _random(args: tuple) -> list:
    return random_state(gpus(_tensors(args)))


def _nothing() -> None:
    pass
