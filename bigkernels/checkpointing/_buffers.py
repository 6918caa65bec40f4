"""Buffers that a segment writes, such as the statistics of a batch norm: once a step, however often it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Names of the buffers that a module writes in place, in training and not. Missing before it has run.
_written: WeakKeyDictionary[nn.Module, dict[bool, set[str]]] = WeakKeyDictionary()


class Buffers:
    """Those of the modules of a segment, as they were when it began.

    A module's first run copies and compares all of them, to find out which it writes, as not every operator counts what
    it writes in a tensor's version; later runs copy these.
    """

    def __init__(self, fn: Callable, args: tuple):
        self.entries: list[tuple[nn.Module, str, Tensor, int, Tensor | None]] = []
        for module in _modules(fn, args):
            known = _written.get(module, {}).get(module.training)
            for name, t in module._buffers.items():
                if t is not None:
                    copied = known is None or name in known
                    self.entries.append((module, name, t, _version(t), _copy(t) if copied else None))
        self.before: list[tuple[nn.Module, str, Tensor]] = []  # of those that are written, once the segment has run

    def ended(self) -> None:
        for module, name, t, version, copy in self.entries:
            known = _written.setdefault(module, {}).setdefault(module.training, set())
            if _version(t) != version or (copy is not None and (name in known or not torch.equal(copy, t))):
                known.add(name)
                # One that was never written before has no copy: it at least stays what it is now.
                self.before.append((module, name, _copy(t) if copy is None else copy))
            elif module._buffers.get(name) is not t:
                self.before.append((module, name, t))  # another tensor took its place
        self.entries = []

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The segment finds the buffers as it did, and what it does to them is forgotten."""
        copies: dict[int, Tensor] = {}  # by tensor, as modules may share one
        now = []
        for module, name, value in self.before:
            current = module._buffers.get(name)
            now.append((module, name, current))
            copies.setdefault(id(current), _copy(value))
        for module, name, current in now:
            module._buffers[name] = copies[id(current)]
        try:
            yield
        finally:
            for module, name, current in now:
                module._buffers[name] = current


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _copy(t: Tensor) -> Tensor:
    with torch.no_grad():
        return t.detach().clone()


def _modules(fn: Any, args: tuple) -> list[nn.Module]:
    """With buffers, that a function is, is of, is given, or closes over."""
    roots = [a for a in args if isinstance(a, nn.Module)]
    while isinstance(fn, functools.partial):
        roots += [a for a in fn.args if isinstance(a, nn.Module)]
        fn = fn.func
    owner = getattr(fn, "__self__", None)
    roots += [m for m in (fn, owner, getattr(owner, "module", None)) if isinstance(m, nn.Module)]
    for cell in getattr(fn, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # it is not set yet
            continue
        if isinstance(value, nn.Module):
            roots.append(value)
    found, seen = [], set()
    while roots:
        module = roots.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if module._buffers:
            found.append(module)
        if module._modules:
            roots += [m for m in module._modules.values() if m is not None]
    return found
