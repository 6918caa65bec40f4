"""Recorded steps as a function of rows, where nobody knows what they compute and no module holds them.

They are run on as many rows as were recorded, again and again: shapes are written in them. What they read of parameters
is computed anew each time.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._forms import close
from ._ir import Call
from ._layers import is_linear
from ._replay import between, is_in_place, laid_out, refs_of
from ._rows import as_rows, from_rows
from ._trace import Ref, Refused, leaves, mapped

if TYPE_CHECKING:
    from ._identify import Builder

_LONGEST = 40  # steps


@dataclass(frozen=True)
class Line:
    """A step: what it makes, and whether it writes to its first argument."""

    number: int
    func: Callable
    args: tuple
    kwargs: dict
    in_place: bool
    name: str


@dataclass(frozen=True, eq=False)
class StepsCode:
    """`out`, (B, S, width), from the rows of `inputs`: their tensors' shapes and strides, as they were recorded."""

    lines: tuple[Line, ...]
    inputs: tuple[tuple[Ref, Tensor], ...]
    out: Ref
    tokens: tuple[int, int]

    def __call__(self, *values: Tensor) -> Tensor:
        batch, length = values[0].shape[:2]
        rows = self.tokens[0] * self.tokens[1]
        given = [v.reshape(batch * length, -1) for v in values]
        parts = []
        for begin in range(0, batch * length, rows):
            piece = [v[begin : begin + rows] for v in given]
            count = piece[0].shape[0]
            if count < rows:
                piece = [torch.cat([p, p[:1].expand(rows - count, -1)]) for p in piece]
            parts.append(self._run(piece)[:count])
        return torch.cat(parts).view(batch, length, -1)

    def _run(self, rows: list[Tensor]) -> Tensor:
        dtype = rows[0].dtype
        pairs = zip(self.inputs, rows, strict=True)
        values = {ref: laid_out(from_rows(r, like, *self.tokens), like) for (ref, like), r in pairs}

        def fill(leaf: Any) -> Any:
            leaf = values[leaf] if isinstance(leaf, Ref) else leaf
            if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point:
                return leaf.detach().to(dtype)
            return dtype if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf

        with torch.no_grad():
            for line in self.lines:
                args, kwargs = mapped(fill, line.args), mapped(fill, line.kwargs)
                if line.in_place:
                    args = (args[0].clone(), *args[1:])
                out = line.func(*args, **kwargs)
                tensors = [args[0]] if line.name == "__setitem__" else [t for t in leaves(out) if isinstance(t, Tensor)]
                values.update({Ref(line.number, i): t for i, t in enumerate(tensors)})
        return as_rows(values[self.out], *self.tokens)


def add_steps(b: Builder, ref: Ref) -> int | None:
    """The value of `ref` by the steps that made it from values; None where they are no function of rows."""
    width = b._width(ref)
    numbers = between(b.recorder, ref, b.values)
    if not width or len(numbers) > _LONGEST:
        return None
    steps = [b.recorder.steps[n] for n in numbers]
    if any(s.name in _STOPS or not s.inputs or (s.module is not None and not is_linear(s.module)) for s in steps):
        return None
    inside = set(numbers)
    sources = list(dict.fromkeys(r for s in steps for r in s.inputs if r.step not in inside or r in b.values))
    if any(r not in b.values or not b.tensor(r).dtype.is_floating_point for r in sources):
        return None
    constants = _of_parameters(b, steps)
    lines = []
    for number in sorted({*inside, *constants}):
        step = b.recorder.steps[number]
        args, kwargs = mapped(lambda v: _constant(b, v, inside, sources, constants), (step.args, step.kwargs))
        lines.append(Line(number, step.func, args, kwargs, is_in_place(step), step.name))
    inputs = tuple(
        (r, torch.empty_strided(b.tensor(r).shape, b.tensor(r).stride(), dtype=torch.float64, device="meta"))
        for r in sources
    )
    code = StepsCode(tuple(lines), inputs, ref, tuple(b.trace.tokens.shape))
    if not _by_row(b, code, sources, ref):
        return None
    out = b.new(width)
    b.graph.operations.append(Call(tuple(b.values[r] for r in sources), (out,), code, b.path(ref)))
    return out


_STOPS = {"append", "scaled_dot_product_attention", "softmax", "embedding"}


def _constant(b: Builder, leaf: Any, inside: set[int], sources: list[Ref], constants: set[int]) -> Any:
    if not isinstance(leaf, Ref) or leaf in sources or leaf.step in inside or leaf.step in constants:
        return leaf
    return b.tensor(leaf)


def _of_parameters(b: Builder, steps: list) -> set[int]:
    """The steps that make something of parameters that `steps` read."""
    found: dict[int, bool] = {}

    def visit(number: int) -> bool:
        if number not in found:
            step = b.recorder.steps[number]
            if step.depends:
                return False
            own = any(isinstance(v, Tensor) and id(v) in b.trace.stored for v in leaves((step.args, step.kwargs)))
            found[number] = any([visit(r.step) for r in refs_of(step)]) or own
        return found[number]

    for step in steps:
        for r in refs_of(step):
            visit(r.step)
    return {n for n, of_parameters in found.items() if of_parameters}


def _by_row(b: Builder, code: StepsCode, sources: list[Ref], ref: Ref) -> bool:
    """Whether it gives what was recorded, and rows that were changed about the same, changed about."""
    batch, length = b.trace.tokens.shape
    given = [b.rows(b.tensor(r)).double().view(batch, length, -1) for r in sources]
    try:
        whole = code(*given)
        if not close(b.rows(b.tensor(ref)).view_as(whole), whole, 1e-7):
            return False
        order = torch.arange(batch * length, dtype=torch.int64, device=b.device).flip(0)
        moved = code(*(g.flatten(0, 1)[order].view_as(g) for g in given))
        alone = code(*(g[1:, 2:3] for g in given))
    except (RuntimeError, Refused):
        return False
    return close(moved.flatten(0, 1)[order].view_as(whole), whole, 1e-7) and close(alone, whole[1:, 2:3], 1e-7)
