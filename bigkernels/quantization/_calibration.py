"""What the inputs of layers look like on a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BYTES = 2**31  # of second moments held at once


def groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The layers, by name and size of their inputs, in their order: as many at once as the memory for their second
    moments allows, but at least one.
    """
    some: list[str] = []
    size = 0
    for name, k in sizes.items():
        needed = 4 * k**2
        if some and size + needed > _BYTES:
            yield some
            some, size = [], 0
        some.append(name)
        size += needed
    if some:
        yield some


@torch.no_grad()
def hessians(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, Tensor]:
    """The sum of ``x x^T`` over the inputs x (K,) of each layer that the batches reach."""
    statistics: dict[str, Tensor] = {}
    # Layers beside each other read the same input. It may be written in between, and not every write is counted.
    last: list[tuple[Tensor, Tensor]] = []

    def record(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            (x,) = args or kwargs.values()
            if not last or last[0][0].shape != x.shape or not torch.equal(last[0][0], x):
                rows = x.detach().reshape(-1, x.shape[-1]).float()
                last[:] = [(x.detach().clone(), rows.T @ rows)]
            statistics[name] = statistics[name] + last[0][1] if name in statistics else last[0][1].clone()

        return hook

    handles = [layer.register_forward_pre_hook(record(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with _evaluating(model):
            for batch in batches:
                _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
