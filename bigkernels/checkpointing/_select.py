"""Regions that run again without their expensive operators: their results are kept.

Two dispatch modes, below autograd: one notes results while a region runs first, one hands them out while it runs again.
What is worth keeping is learnt from both: how long each operator took, and which of them the second run reaches at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._policy import Selection
from ._saver import Saver

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
    """One call of an operator in a region, from its first run."""

    name: str
    seconds: float
    nbytes: int  # of its results


@dataclass
class Plan:
    """What is kept of the calls of one region, numbered in their order. It outlives the region's runs."""

    selection: Selection
    calls: list[_Call] | None = None  # measured; only where there is a budget
    saved_bytes: int = 0  # what autograd would have kept
    chosen: frozenset[int] | None = None
    reached: int | None = None  # calls up to the last saved tensor; later ones need not be kept

    def keeps(self, index: int, name: str) -> bool:
        if self.reached is not None and index >= self.reached:
            return False
        if self.chosen is not None:
            return index in self.chosen
        if self.selection.operators is not None:
            return name in self.selection.operators
        # While a budget is not yet known to hold, keep nothing but attention.
        return name in ATTENTION or (self.selection.budget is None and name in PRODUCTS)

    def learn(self, reached: int) -> None:
        """The region has run again and stopped before call `reached`."""
        self.reached = max(reached, self.reached or 0)
        if self.selection.budget is not None and self.calls is not None and self.chosen is None:
            self.chosen = self._choose()

    def _choose(self) -> frozenset[int]:
        budget = self.selection.budget
        left = int(budget * self.saved_bytes) if isinstance(budget, float) else budget
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
    kept: dict[int, list] = field(default_factory=dict)

    def forward(self) -> TorchDispatchMode:
        return _Note(self)

    def again(self) -> TorchDispatchMode:
        return _HandOut(self)


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]


def _aliases(func: torch._ops.OpOverload) -> bool:
    """Views and operators that write their arguments are done again: they cost nothing, or have to happen."""
    schema = func._schema
    # A fake tensor is asked for its device by an operator, as often as somebody wants to know.
    return func.namespace == "prim" or schema.is_mutable or any(r.alias_info is not None for r in schema.returns)


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
        self.measure = self.plan.selection.budget is not None and self.plan.calls is None
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _aliases(func):
            return func(*args, **(kwargs or {}))
        index, self.index = self.index, self.index + 1
        name = func._schema.name
        if self.measure:
            out = self._timed(name, func, args, kwargs or {})
        else:
            out = func(*args, **(kwargs or {}))
        if self.plan.keeps(index, name):
            self.results.kept[index] = [_keep(t, self.results.saver) for t in _tensors(out)]
        return out

    def _timed(self, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        cuda = any(t.is_cuda for t in _tensors(args))
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        out = func(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
        self.calls.append(_Call(name, time.perf_counter() - begin, sum(t.nbytes for t in _tensors(out))))
        return out

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.measure and error[0] is None:
            self.plan.calls = self.calls


class _HandOut(_Mode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _aliases(func):
            return func(*args, **(kwargs or {}))
        index, self.index = self.index, self.index + 1
        kept = self.results.kept.get(index)
        if kept is None:
            return func(*args, **(kwargs or {}))
        tensors = [_get(k, self.results.saver, func) for k in kept]
        returns = func._schema.returns
        if len(returns) == 1 and len(tensors) == 1:
            return tensors[0]
        # Results that are no tensors (seeds of attention's dropout) are not kept: they are tensors in every operator
        # that is worth keeping.
        return tuple(tensors)

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.plan.learn(self.index)


def _keep(t: Tensor, saver: Saver | None) -> tuple[Any, int]:
    return (t if saver is None else saver.pack(t)), t._version


def _get(kept: tuple[Any, int], saver: Saver | None, func) -> Tensor:
    packed, version = kept
    if saver is not None:
        return saver.unpack(packed)
    if packed._version != version:
        raise RuntimeError(f"bigkernels.checkpoint: a kept result of {func._schema.name}, of shape "
                           f"{tuple(packed.shape)}, was modified in place")  # fmt: skip
    return packed.detach()
