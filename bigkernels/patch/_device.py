"""On which device checks compute: what a kernel gives on one says nothing of the one for another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn

from .._torch_private import FakeTensor

CPU = torch.device("cpu")
_current: ContextVar[torch.device] = ContextVar("device", default=CPU)


def probe_device() -> torch.device:
    return _current.get()


@contextmanager
def probing_on(device: torch.device) -> Iterator[None]:
    token = _current.set(device)
    try:
        yield
    finally:
        _current.reset(token)


def device_of(module: nn.Module, model: nn.Module) -> torch.device:
    """The GPU of a module's first parameter, of the model's where it has none, or else the CPU."""
    first = next(module.parameters(), next(model.parameters(), None))
    return first.device if first is not None and first.is_cuda and not isinstance(first, FakeTensor) else CPU


def once_a_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.cache`, with results of their own for each type of device."""
    cached = functools.cache(lambda kind, *args: function(*args))

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return cached(probe_device().type, *args)

    cast(Any, call).cache_clear = cached.cache_clear
    return call
