"""What a model's first block reads, by the model's own code."""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import _layers
from ._calls import in_float64
from ._forms import close, constant, plain, random
from ._ir import Stored
from ._replay import refs_of, replay
from ._trace import ModuleCall, Ref, Refused, floating, leaves

if TYPE_CHECKING:
    from ._identify import Builder


@dataclass(frozen=True)
class Positions:
    """Rows of a table that the model keeps, at positions + offset; or one `row` of it for all tokens."""

    table: Stored
    offset: int
    row: int | None = None

    def __call__(self, position_ids: Tensor) -> Tensor:
        table = self.table.get()
        if self.row is not None:
            return table[self.row]
        return torch.nn.functional.embedding(position_ids + self.offset if self.offset else position_ids, table)


@dataclass(frozen=True)
class Embed:
    """Hidden states (B, S, width) of tokens, or of what their embedding module gave, `inputs_embeds`.

    Attributes:
        tokens: the embedding module.
        scale: of what it gives.
        positions: what is added for the positions of tokens.
    """

    tokens: nn.Module
    scale: float = 1.0
    positions: tuple[Positions, ...] = ()

    def __call__(
        self, input_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        hidden = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.scale != 1.0:
            hidden = hidden * self.scale
        for part in self.positions:
            hidden = hidden + part(position_ids)
        return hidden

    def exact(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The same without rounding, in float64."""
        hidden = in_float64(self.tokens, (input_ids,), {}, {id(input_ids): input_ids.dtype}).double() * self.scale
        for part in self.positions:
            hidden = hidden + part(position_ids).double()
        return hidden


def embedding_of(b: Builder, needed: set[int]) -> tuple[Ref, Embed]:
    """(the tensor that it makes, the callable)"""
    recorder = b.recorder
    whole = _whole(b, needed)
    readers = [
        n
        for n in sorted(needed)
        if n not in whole and recorder.steps[n].inputs and all(r.step in whole for r in recorder.steps[n].inputs)
    ]
    if len(readers) != 1:
        raise Refused("(model): its tokens are embedded in more than one place")
    first = Ref(readers[0], 0)
    # The outermost module that makes one tensor of the tokens alone.
    embedding = None
    for call in recorder.calls:
        if (
            len(call.outs) == 1
            and call.begin <= readers[0] < call.end
            and _only_tokens(b, call)
            and not any(_layers.is_linear(m) for m in call.module.modules())
        ):
            embedding = call
            break
    if embedding is None or not isinstance(embedding.outs[0], Ref):
        raise Refused(f"{b.path(first)}: its tokens are embedded by no module")
    token = embedding.outs[0]
    del first
    positions = _with_positions(b, token, needed)
    if positions is None:
        return token, Embed(embedding.module)
    ref, scale, parts = positions
    return ref, Embed(embedding.module, scale, parts)


def _whole(b: Builder, needed: set[int]) -> set[int]:
    """The steps that make whole numbers of whole numbers: still tokens."""
    found: set[int] = set()
    for n in sorted(needed):
        step = b.recorder.steps[n]
        if not any(floating(t) for t in step.outs) and all(r.step in found for r in step.inputs):
            found.add(n)
    return found


def _only_tokens(b: Builder, call: ModuleCall) -> bool:
    given = [*call.args, *call.kwargs.values()]
    if not given or not isinstance(given[0], Ref) or any(v is not None for v in given[1:]):
        return False
    t = b.tensor(given[0])
    return b.recorder.steps[given[0].step].depends and torch.equal(t, b.trace.tokens)


def _with_positions(b: Builder, token: Ref, needed: set[int]) -> tuple[Ref, float, tuple[Positions, ...]] | None:
    """(the sum, the scale of the tokens' part, tables) where positions are embedded and added to the tokens."""
    recorder = b.recorder
    here, tables = token, []
    embedding = None
    for number in sorted(needed):
        step = recorder.steps[number]
        if number <= token.step or here not in step.inputs:
            continue
        if step.module is not None or step.inputs != (here,):
            break
        ref = Ref(number, 0)
        like = b.tensor(token)
        if b.tensor(ref).shape != like.shape:
            break
        zeros = torch.zeros(like.shape, dtype=torch.float64, device=b.device)
        zero, one = (replay(recorder, [ref], {token: zeros + v})[0] for v in (0.0, 1.0))
        scale = constant(one - zero)
        if not scale or not _is_sum(b, ref, token, scale, zero):
            break
        here = ref
        if zero.abs().max() == 0:
            continue
        tables = [t for n in range(token.step + 1, number + 1) for t in _tables(b, n)]
        tables = list(dict.fromkeys(tables))
        total = sum(t(b.trace.positions).double().expand_as(zero) for t in tables) if tables else None
        if total is None or not close(zero, total, 1e-6):
            break
        embedding = ref, plain(scale), tuple(tables)
    return embedding


def _is_sum(b: Builder, ref: Ref, token: Ref, scale: float, rest: Tensor) -> bool:
    x = random(*rest.shape, device=b.device)
    return close(replay(b.recorder, [ref], {token: x})[0], scale * x + rest)


def _tables(b: Builder, number: int):
    """What a step adds that was looked up by position."""
    step = b.recorder.steps[number]
    if not step.depends:
        return
    todo = [r for r in refs_of(step) if not b.recorder.steps[r.step].depends]
    seen = set()
    while todo:
        ref = todo.pop()
        if ref in seen:
            continue
        seen.add(ref)
        other = b.recorder.steps[ref.step]
        tables = (b._parameter(a) for a in other.args if isinstance(a, (Ref, Tensor)))
        stored = next((t for t in tables if t is not None and t.get().is_floating_point()), None)
        given = [b._value(a) for a in leaves(other.args) if isinstance(a, (Ref, Tensor))]
        index = next((t for t in given if not t.dtype.is_floating_point), None)
        if (
            stored is not None
            and index is not None
            and stored.get().dim() == 2
            and other.name in ("embedding", "index_select", "__getitem__")
        ):
            positions = b.trace.positions
            if index.numel() == positions.numel():
                index = index.view(positions.shape)
            elif index.shape[-1:] == positions.shape[-1:]:
                positions = positions[0].expand(index.shape)
            offset = int(index.reshape(-1)[0] - positions.reshape(-1)[0])
            if bool((index == index.reshape(-1)[0]).all()):
                yield Positions(stored, 0, int(index.reshape(-1)[0]))
            elif index.shape == positions.shape and bool((index == positions + offset).all()):
                yield Positions(stored, offset)
        else:
            todo += refs_of(other)
