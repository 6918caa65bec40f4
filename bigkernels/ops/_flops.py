"""How many floating point operations the raw operators stand for, as `torch.utils.flop_counter.FlopCounterMode` asks.

A multiplication and an addition are two. Counted are the products of the mathematics, as of a model without kernels:
masks leave nothing out, and what backward computes once more is not counted.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from torch import Tensor

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def count_as(packet: Any, formula: Callable[..., int]) -> None:
    """Register the formula of a raw operator, which is called with its arguments."""

    def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return int(formula(*args, **kwargs))

    _formulas[packet] = counted
    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].flop_registry[packet] = counted


def attention_flops(q: Tensor, v: Tensor, pairs: int, heads: int, *, backward: bool = False) -> int:
    """Of `pairs` of queries and keys in each head: the scores and the sums of values, or the gradients of both."""
    forward = 2 * pairs * heads * (q.shape[-1] + v.shape[-1])
    return 2 * forward if backward else forward


def values(t: Tensor) -> list | None:
    """What a tensor holds; None where it is fake."""
    return t.tolist() if type(t) is Tensor and not t.is_meta else None


class _Handover(MetaPathFinder):
    """Registers the formulas when the counter is imported: it imports Triton, which importing this package must not."""

    looking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            module.flop_registry.update(_formulas)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Handover())
