"""Which parameters are stepped by which plan of a kernel, and until when that is so."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import optimizer as ops
from ..ops import registry
from ..ops.registry import log
from ._plan import Entry, dense, local
from ._reference import RULES

if TYPE_CHECKING:
    from ._optimizer import Optimizer


class Schedule:
    """The plans for parameters that have a state or need one by now.

    Attributes:
        plans: of the parameters that a kernel steps.
        without: the others, by the reference, with the numbers of their groups.
    """

    def __init__(self, optimizer: Optimizer, params: list[tuple[Tensor, int]], *, whole: bool = False):
        """
        Args:
            params: with the numbers of their groups.
            whole: they are all of the optimizer's, and the schedule ends when the groups have others.
        """
        for o in optimizer.param_groups:
            optimizer._check(o)
        self._members = [list(o["params"]) for o in optimizer.param_groups] if whole else None
        self._waiting: list[Tensor] = []  # without a gradient so far
        self.without: list[tuple[Tensor, int]] = []
        entries: dict[tuple[torch.device, str], list[Entry]] = {}
        reasons: dict[str, int] = {}
        for p, number in params:
            if p.grad is None and p not in optimizer.state:
                self._waiting.append(p)
                continue
            try:
                entry = optimizer._complete(p, number)
            except (RuntimeError, TypeError, ValueError):
                if p.grad is None:  # nothing is done with it
                    self._waiting.append(p)
                    continue
                raise
            device = optimizer._home(p)
            reason = _why_not(p, device)
            if reason is None:
                rule = optimizer._rule_of(p, optimizer.param_groups[number])
                entries.setdefault((device, rule.name), []).append(entry)
            else:
                reasons[reason] = reasons.get(reason, 0) + 1
                self.without.append((p, number))
        for reason, count in reasons.items():
            log.info("optim.%s: %d parameters by the reference (%s)", type(optimizer).__name__, count, reason)
        self.plans = [
            plan
            for (_, name), found in entries.items()
            for number, together in enumerate(_apart(found))
            for plan in optimizer._plans_of(RULES[name], together, follows=number > 0)
        ]
        self._forced, self._options = registry._forced, list(map(optimizer._decides, optimizer.param_groups))
        self._kinds = [_kind(p) for p, _ in self.without]

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether another would be the same, however groups, options, parameters and states were edited meanwhile."""
        return (
            self._forced == registry._forced
            and (self._members is None or self._has(optimizer.param_groups))
            and self._options == list(map(optimizer._decides, optimizer.param_groups))
            and all(p.grad is None for p in self._waiting)
            and self._kinds == [_kind(p) for p, _ in self.without]
            and all(plan.holds(optimizer.state) for plan in self.plans)
        )

    def _has(self, groups: list[dict]) -> bool:
        assert self._members is not None
        return len(groups) == len(self._members) and all(
            len(members) == len(o["params"]) and all(map(operator.is_, members, o["params"]))
            for members, o in zip(self._members, groups, strict=True)
        )


def _apart(entries: list[Entry]) -> list[list[Entry]]:
    """Lists in which no two parameters share memory, or that of their states: such are stepped one after the other."""
    spans = []
    for i, entry in enumerate(entries):
        for t in (entry.param, entry.count, *(entry.state[k] for k in (*entry.keys, "step"))):
            here = t.to_local() if hasattr(t, "to_local") else t
            if here.numel():
                begin = here.data_ptr()
                spans.append((begin, begin + (here.nbytes if dense(here) else here.itemsize), i))
    spans.sort()
    later: set[int] = set()
    end, owner = 0, -1
    for begin, stop, i in spans:
        if begin < end and owner != i:
            later.add(max(i, owner))
        if stop > end:
            end, owner = stop, i
    if not later:
        return [entries]
    first = [entry for i, entry in enumerate(entries) if i not in later]
    return [first, *_apart([entries[i] for i in sorted(later)])]


def _kind(p: Tensor) -> tuple:
    return type(p), p.device, p.dtype, p.shape


def _why_not(p: Tensor, device: torch.device) -> str | None:
    """Why no kernel takes a parameter whose states are on `device`; None where one does."""
    here = local(p)
    if type(here).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(here).__name__} has no memory of its own"
    if here.is_neg() or here.layout != torch.strided:
        return "its numbers are not those in memory"
    return ops.why_not(device.type, here.dtype, registry._forced)
