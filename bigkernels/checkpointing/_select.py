"""Regions that run again without their expensive operators: their results are kept.

Two dispatch modes, below autograd: one notes results while a region runs first, one hands them out while it runs again.
What is worth keeping is learnt from both: how long each operator took, and which of them the second run reaches at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ._policy import Selection
from ._recompute import CheckpointError, gpus, random_state
from ._saver import Exact, Packed, Saver, is_parameter

# Attention, whose work grows with the square of the sequence, and products, whose work for each byte grows with the
# width of the model.
ATTENTION = frozenset(
    ("bigkernels::attention_fwd", "bigkernels::varlen_attention_fwd", "aten::_scaled_dot_product_flash_attention",
     "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_efficient_attention",
     "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_fused_attention_overrideable",
     "aten::_flash_attention_forward", "aten::_efficient_attention_forward")
)  # fmt: skip
PRODUCTS = frozenset(
    ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::_grouped_mm", "aten::linear",
     "aten::convolution", "aten::mkldnn_linear", "aten::_addmm_activation", "mkldnn::_linear_pointwise",
     "bigkernels::linear_fwd", "bigkernels::quantized_linear_fwd")
)  # fmt: skip


@dataclass
class _Call:
    """One call of an operator in a region, from its first runs."""

    name: str
    seconds: float  # the least of them
    nbytes: int  # of its results


@dataclass
class Plan:
    """What is kept of the calls of a region, numbered in their order. It outlives the runs of the region, and regions
    of one structure share it: the more runs are measured before the first backward, the better the choice.
    """

    selection: Selection
    calls: list[_Call] | None = None  # measured
    saved_bytes: int = 0  # what autograd would have kept of a region
    input_bytes: int = 0  # what is kept in any case
    chosen: frozenset[int] | None = None
    reached: int | None = None  # calls up to the last saved tensor; later ones need not be kept

    @property
    def measures(self) -> bool:
        return self.selection.budget is not None and self.chosen is None

    def note(self, calls: list[_Call], saved_bytes: int, input_bytes: int) -> None:
        self.saved_bytes, self.input_bytes = max(self.saved_bytes, saved_bytes), max(self.input_bytes, input_bytes)
        if self.calls is None or [c.name for c in self.calls] != [c.name for c in calls]:
            self.calls = self.calls or calls
            return
        for known, again in zip(self.calls, calls, strict=True):
            known.seconds = min(known.seconds, again.seconds)

    def keeps(self, index: int, name: str) -> bool:
        if self.reached is not None and index >= self.reached:
            return False
        if self.chosen is not None:
            return index in self.chosen
        if self.measures:
            return name in ATTENTION  # more, when it is known what there is room for
        return name in (self.selection.operators or ATTENTION | PRODUCTS)

    def learn(self, reached: int) -> None:
        """The region has run again and stopped before call `reached`."""
        self.reached = max(reached, self.reached or 0)
        if self.measures and self.calls is not None:
            self.chosen = self._choose()

    def _choose(self) -> frozenset[int]:
        budget = self.selection.budget
        left = int(budget * self.saved_bytes) - self.input_bytes if isinstance(budget, float) else budget
        allowed = self.selection.operators
        worth = [(c.seconds / c.nbytes, i) for i, c in enumerate(self.calls[: self.reached])
                 if c.nbytes and (allowed is None or c.name in allowed)]  # fmt: skip
        found = set()
        for _, i in sorted(worth, reverse=True):
            if self.calls[i].nbytes <= left:
                found.add(i)
                left -= self.calls[i].nbytes
        return frozenset(found)


@dataclass
class Results:
    """What one run of a region has kept, and how to note it and hand it out."""

    plan: Plan
    saver: Saver | None = None  # in which form; None: as they are
    kept: dict[int, _Kept] = field(default_factory=dict)
    input_bytes: int = 0
    saved_bytes: int = 0
    storages: dict[int, StorageWeakRef] = field(default_factory=dict)

    def watch(self, tensor: Tensor) -> None:
        """Adds up what autograd would keep, each storage once."""
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages and not is_parameter(tensor):
            self.storages[storage._cdata] = StorageWeakRef(storage)
            self.saved_bytes += storage.nbytes()

    def forward(self) -> TorchDispatchMode:
        return _Note(self)

    def again(self) -> TorchDispatchMode:
        return _HandOut(self)


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]


@cache
def _always_again(func: torch._ops.OpOverload) -> bool:
    """Views and operators that write their arguments are done again: they cost nothing, or have to happen. They are
    not numbered either. No more are conversions, which autocast remembers and leaves out of one run or the other.
    """
    schema = func._schema
    # A fake tensor is asked for its device by an operator, as often as somebody wants to know.
    return (
        func.namespace == "prim"
        or schema.name == "aten::_to_copy"
        or schema.is_mutable
        or any(r.alias_info is not None for r in schema.returns)
    )


class _Mode(TorchDispatchMode):
    def __init__(self, results: Results):
        super().__init__()
        self.results, self.plan = results, results.plan
        self.index = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Note(_Mode):
    def __init__(self, results: Results):
        super().__init__(results)
        self.measure = self.plan.measures
        self.calls: list[_Call] = []
        if self.measure:
            self.plan.saved_bytes = 0  # a run before may have failed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _always_again(func):
            return func(*args, **(kwargs or {}))
        index, self.index = self.index, self.index + 1
        name = func._schema.name
        keeps = self.plan.keeps(index, name)
        # What has drawn random numbers must draw them again, or those that follow would draw others.
        before = _random(args) if keeps and torch.Tag.nondeterministic_seeded in func.tags else None
        if self.measure:
            out = self._timed(name, func, args, kwargs or {})
        else:
            out = func(*args, **(kwargs or {}))
        if keeps and (before is None or before == _random(args)) and not _nested(out):
            self.results.kept[index] = _Kept(func, out, self.results.saver)
        return out

    def _timed(self, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        wait = torch.cuda.synchronize if torch.cuda.is_initialized() else _nothing
        wait()
        begin = time.perf_counter()
        out = func(*args, **kwargs)
        wait()
        self.calls.append(_Call(name, time.perf_counter() - begin, sum(t.nbytes for t in _tensors(out))))
        return out

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.measure and error[0] is None:
            self.plan.note(self.calls, self.results.saved_bytes, self.results.input_bytes)
        self.results.kept = {i: k for i, k in self.results.kept.items() if k.intact()}


class _HandOut(_Mode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _always_again(func):
            return func(*args, **(kwargs or {}))
        index, self.index = self.index, self.index + 1
        kept = self.results.kept.get(index)
        if kept is None or not kept.intact():
            return func(*args, **(kwargs or {}))
        return kept.get(func)

    def __exit__(self, error=None, *rest) -> None:
        super().__exit__(error, *rest)
        if error is None:
            self.plan.learn(self.index)


class _Kept:
    """What one call has returned."""

    def __init__(self, func: torch._ops.OpOverload, out: Any, saver: Saver | None):
        self.func, self.saver = func, saver
        self.kind = type(out) if isinstance(out, (tuple, list)) else None
        # Without their graphs, which hold this; with their counters of what is written to them.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            pack = Exact if saver is None else saver.pack
            self.values = [pack(v) if isinstance(v, Tensor) else v for v in (out if self.kind else (out,))]

    def intact(self) -> bool:
        return all(v.intact() for v in self.values if isinstance(v, Exact))

    def get(self, func: torch._ops.OpOverload) -> Any:
        if func is not self.func:
            raise CheckpointError(f"bigkernels.checkpoint: the region called {self.func}, and calls {func} in its "
                                  "place when it runs again; it must do the same every time")  # fmt: skip
        values = [self._get(v) for v in self.values]
        return values[0] if self.kind is None else self.kind(values)

    def _get(self, value: Any) -> Any:
        if isinstance(value, Exact):
            with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
                return value.get().detach()
        return self.saver.unpack(value) if isinstance(value, Packed) else value


def _nested(out: Any) -> bool:
    return isinstance(out, (tuple, list)) and any(isinstance(v, (tuple, list)) for v in out)


def _random(args: tuple) -> list:
    return random_state(gpus(_tensors(args)))


def _nothing() -> None:
    pass
