"""What the model's own code is given in the middle of a program besides rows: cache, positions, angles and masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._trace import Ref, leaves, mapped

# What differs between calls of a module that makes angles.
HIDDEN, POSITIONS, SHAPE, PAST = "<hidden states>", "<positions>", "<shape>", "<past>"


@dataclass
class Context:
    """A run, as far as code with a cache of its own has to know it.

    Attributes:
        cache: transformers' `Cache`.
        positions: (B, S).
        starts: (B,) the first token of each sequence that is no padding, or None.
        past: tokens that the cache has seen before the run.
        memory: what several layers are given alike.
    """

    cache: Any
    positions: Tensor
    starts: Tensor | None
    past: int
    memory: dict = field(default_factory=dict)


@dataclass(frozen=True)
class FromContext:
    """In the place of an argument."""

    def get(self, context: Context) -> Any:
        raise NotImplementedError


class CacheOf(FromContext):
    def get(self, context: Context) -> Any:
        return context.cache


class PositionsOf(FromContext):
    def get(self, context: Context) -> Tensor:
        return context.positions


class SlotsOf(FromContext):
    """(S,), the numbers of the new tokens in the cache."""

    def get(self, context: Context) -> Tensor:
        length = context.positions.shape[1]
        return torch.arange(context.past, context.past + length, dtype=torch.int64, device=context.positions.device)


@dataclass(frozen=True)
class AnglesOf(FromContext):
    """Output `number` of a module that is called with positions and hidden states of a dtype."""

    module: nn.Module
    args: tuple
    kwargs: tuple
    number: int
    dtype: torch.dtype

    def get(self, context: Context) -> Tensor:
        key = self.module, self.args, self.kwargs
        if key not in context.memory:
            x = torch.zeros(1, 1, 1, dtype=self.dtype, device=context.positions.device)
            given = {HIDDEN: x, POSITIONS: context.positions, SHAPE: context.positions.shape, PAST: context.past}

            def fill(value: Any) -> Any:
                return given[value] if isinstance(value, str) and value in given else value

            out = self.module(*map(fill, self.args), **{k: fill(v) for k, v in self.kwargs})
            context.memory[key] = [t for t in leaves(out) if isinstance(t, Tensor)]
        return context.memory[key][self.number]


@dataclass(frozen=True, eq=False)
class MadeOf(FromContext):
    """What recorded steps make of positions, constants and what modules make of these.

    Attributes:
        lines: (number, function, args, kwargs) of each step; Refs among the arguments are of earlier ones.
        given: values that are there before them, by their Refs.
        positions: the tensor that stands for positions among the arguments.
    """

    lines: tuple[tuple, ...]
    given: dict[Ref, FromContext]
    positions: Tensor
    out: Ref

    def get(self, context: Context) -> Tensor:
        values = {ref: part.get(context) for ref, part in self.given.items()}

        def fill(leaf: Any) -> Any:
            return context.positions if leaf is self.positions else values[leaf] if isinstance(leaf, Ref) else leaf

        for number, func, args, kwargs in self.lines:
            result = func(*mapped(fill, args), **mapped(fill, kwargs))
            values.update({Ref(number, i): t for i, t in enumerate(t for t in leaves(result) if isinstance(t, Tensor))})
        return values[self.out]


@dataclass(frozen=True)
class MaskOf(FromContext):
    """(B or 1, 1, S, keys) of a layer of the cache: a causal mask with a window, True or 0 for what is seen."""

    dtype: torch.dtype
    window: int
    layer: int

    def get(self, context: Context) -> Tensor | None:
        length, device = context.positions.shape[1], context.positions.device
        layers = context.cache.layers
        keys, first = layers[self.layer].get_mask_sizes(length) if self.layer < len(layers) else (length, 0)
        filled = first + keys == context.past + length  # not so of a cache of a fixed size
        if length == 1 and context.starts is None and filled and (not self.window or keys <= self.window):
            return None
        place = self, keys, first
        if place not in context.memory:
            key = torch.arange(first, first + keys, dtype=torch.int64, device=device)
            query = torch.arange(context.past, context.past + length, dtype=torch.int64, device=device).unsqueeze(1)
            seen = key <= query
            if self.window:
                seen = seen & (key > query - self.window)
            if context.starts is not None:  # padding sees itself: nobody reads what it makes, but it has to be a number
                seen = seen & (key >= context.starts.view(-1, 1, 1)) | (key == query)
            seen = seen.view(-1, 1, length, keys)
            if self.dtype != torch.bool:
                low = torch.finfo(self.dtype).min
                seen = torch.zeros(seen.shape, dtype=self.dtype, device=device).masked_fill_(~seen, low)
            context.memory[place] = seen
        return context.memory[place]
