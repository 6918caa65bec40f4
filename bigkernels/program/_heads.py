"""Queries, keys and values: which columns of a value are which head, and how they are rotated."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._forms import as_norm, close, constant, plain, random
from ._ir import Combine, HeadsOf, NormSpec
from ._reference import rotate
from ._replay import between, refs_of, replay
from ._rotary import Rotary
from ._rows import as_heads
from ._trace import Ref, Refused, floating

if TYPE_CHECKING:
    from ._identify import Builder

_LAYOUTS = ("halves", "pairs", "once")  # how angles are repeated in what the model rotates with


@dataclass(frozen=True)
class Found:
    of: HeadsOf
    angles: tuple[int, int, bool] | None  # index, rotary, interleaved
    scale: float = 1.0
    norm: NormSpec | None = None


class Rotations:
    """The angles of a trace."""

    def __init__(self, builder: Builder):
        self.builder = builder
        self.known: dict[tuple, int] = {}
        self.guess: dict[tuple, tuple] = {}  # what fitted last, by the sources

    def sources(self, steps: list[int]) -> list[Ref]:
        """What steps read that depends on positions alone: outputs of the module that made them, where one did."""
        b = self.builder
        found: dict[Ref, None] = {}
        for number in steps:
            for ref in refs_of(b.recorder.steps[number]):
                if not b.recorder.steps[ref.step].depends:
                    root = self._root(ref)
                    if root is not None:
                        found[root] = None
        return list(found)

    def _root(self, ref: Ref) -> Ref | None:
        """None for what does not differ between tokens."""
        b = self.builder
        outputs = {out: None for call in b.recorder.calls for out in call.outs if isinstance(out, Ref)}
        length = b.trace.tokens.shape[1]
        best = None
        while True:
            t = b.tensor(ref)
            if not floating(t) or length not in t.shape:
                return best
            best = ref
            if ref in outputs and not b.recorder.steps[ref.step].depends:
                return ref
            others = [
                r for r in refs_of(b.recorder.steps[ref.step]) if floating(b.tensor(r)) and length in b.tensor(r).shape
            ]
            if len(others) != 1:
                return best
            ref = others[0]

    def index(self, roots: tuple[Ref, ...], layout: str, sign: int, rotary: int, interleaved: bool) -> int:
        key = (roots, layout, sign, rotary, interleaved)
        if key not in self.known:
            angles = Rotary.of(self.builder, *key)
            for i, other in enumerate(self.builder.graph.angles):
                if other == angles:
                    self.known[key] = i
                    return i
            self.builder.graph.angles.append(angles)
            self.known[key] = len(self.builder.graph.angles) - 1
        return self.known[key]


def heads_between(b: Builder, ref: Ref, plain: bool = False) -> Found:
    """How heads (B, H, S, D) are made of a value. `plain`: a scale is put on the value and not on the scores.

    Raises:
        Refused: they are no columns of one value.
    """
    late, inner = _late_norm(b, ref)
    source, (columns, d, scale, angles) = _farthest(b, inner)
    norm = late
    if norm is None and source not in b.values:
        for before in b._sources(source):
            before_norm = _norm(b, source, before, d)
            if before_norm is not None and before_norm[1] == 1.0:
                try:
                    base, (own, width, factor, rotation) = _farthest(b, before)
                except Refused:
                    break
                order = tuple(c // d for c in columns)  # of the heads that are normed
                if rotation is None and factor == 1.0 and width == d and all(c % d == 0 for c in columns):
                    source, columns, norm = base, tuple(own[i] for i in order), before_norm[0]
                break
    x, before = b.part(source)
    if scale != 1.0 and plain:
        if norm is not None:
            raise Refused(f"{b.path(ref)}: heads are scaled after their norm")
        scaled = b.new(b.graph.widths[x])
        x, scale = b.add(Combine(scaled, ((x, scale, None),)), scaled), 1.0
    return Found(HeadsOf(x, tuple(c + before for c in columns), d), angles, scale, norm)


def _farthest(b: Builder, ref: Ref) -> tuple[Ref, tuple]:
    """The first tensor that heads are columns of, and which."""
    best = None
    for source in [ref, *b._sources(ref)]:
        columns = _columns(b, ref, source)
        if columns is None:
            if best is not None:
                break
            continue
        best = source, columns
        if source in b.values:
            break
    if best is None:
        raise Refused(f"{b.path(ref)}: heads are no columns of one value", ref.step)
    return best


def _norm(b: Builder, ref: Ref, source: Ref, d: int) -> tuple[NormSpec, float] | None:
    """The norm of each head."""
    rows, before = b.rows(b.tensor(ref)), b.rows(b.tensor(source))
    if rows is None or before is None or rows.shape != before.shape or rows.shape[1] % d:
        return None
    return as_norm(b.function(ref, source), d, b.sample(rows.shape[1]), b.vectors(ref, {source}))


def _late_norm(b: Builder, ref: Ref) -> tuple[NormSpec | None, Ref]:
    """A norm after the rotation, which is one before it where it has no weights; and what it is of."""
    steps = between(b.recorder, ref, b.values)
    if not b.rotations.sources(steps):
        return None, ref
    d = b.tensor(ref).shape[-1]
    for source in b._sources(ref):
        if not b.rotations.sources(between(b.recorder, source, b.values)):
            break
        norm = _norm(b, ref, source, d)
        if norm is not None and norm[1] == 1.0 and norm[0].weight is None and norm[0].kind == "rms":
            return norm[0], source
    return None, ref


def _columns(b: Builder, ref: Ref, source: Ref) -> tuple | None:
    """(first column of each head, d, scale, rotation) of heads as rotated columns of `source`."""
    try:
        return None if b.tensor(source).dtype.is_complex else _rotated_columns(b, ref, source)
    except Refused:  # the steps between do not run on other numbers
        return None


def _rotated_columns(b: Builder, ref: Ref, source: Ref) -> tuple | None:
    batch, length = b.trace.tokens.shape
    heads = as_heads(b.tensor(ref), batch, length)
    rows = b.rows(b.tensor(source))
    if heads is None or rows is None:
        return None
    steps = between(b.recorder, ref, {source})
    if source in (ref,):
        steps = []
    roots = b.rotations.sources(steps)
    like = b.tensor(source)

    def compute(x: Tensor, angles: dict[Ref, Tensor]) -> Tensor:
        given = {source: b.unrows(x, like), **angles}
        return as_heads(replay(b.recorder, [ref], given)[0], batch, length)

    if len(roots) > 2:
        return None
    number, d = heads.shape[1], heads.shape[3]
    width = rows.shape[1]
    for order in (roots, roots[::-1]) if len(roots) == 2 else (roots,):
        still = _still(b, order)
        gathered = _gather(compute, still, b, width, number, d)
        if gathered is None:
            continue
        columns, scale = gathered
        x = b.sample(width, 7)
        picked = torch.stack([x.view(batch, length, width)[..., c : c + d] for c in columns], 1) * scale
        if not roots:
            return (columns, d, scale, None) if close(compute(x, {}), picked) else None
        rotation = _rotation(b, tuple(order), compute, x, picked, d)
        if rotation is not None:
            return columns, d, scale, rotation
    return None


def _still(b: Builder, roots: list[Ref]) -> dict[Ref, Tensor]:
    """Angles of zero."""
    given = {}
    for i, root in enumerate(roots):
        t = b.tensor(root)
        kind = torch.complex128 if t.dtype.is_complex else torch.float64
        given[root] = torch.full(t.shape, 1 - i, dtype=kind, device=b.device)
    return given


def _gather(
    compute: Callable, still: dict[Ref, Tensor], b: Builder, width: int, heads: int, d: int
) -> tuple[tuple[int, ...], float] | None:
    """(first column of each head, scale) where heads are columns, times a number."""
    ones = torch.ones(b.trace.rows, width, dtype=torch.float64, device=b.device)
    numbers = torch.arange(1, width + 1, dtype=torch.float64, device=b.device).expand_as(ones)
    scale = constant(compute(ones, still))
    if not scale:
        return None
    coefficients = compute(numbers, still) / scale
    index = coefficients[0, :, 0].round().long()  # (H, D)
    if not close(coefficients, index[None, :, None].expand_as(coefficients).double()):
        return None
    columns = index[:, 0] - 1
    if not torch.equal(index, columns[:, None] + 1 + torch.arange(d, dtype=torch.int64, device=b.device)):
        return None
    return tuple(columns.tolist()), plain(scale)


def _rotation(
    b: Builder, roots: tuple[Ref, ...], compute: Callable, x: Tensor, picked: Tensor, d: int
) -> tuple[int, int, bool] | None:
    batch, length = b.trace.tokens.shape
    likes = [b.tensor(root) for root in roots]
    if any(t.shape[-1] > d for t in likes):
        return None
    size = likes[0].shape[-1]
    options = [(layout, interleaved, sign) for layout in _LAYOUTS for interleaved in (False, True) for sign in (1, -1)]
    known = b.rotations.guess.get(tuple(likes[0].shape))
    for option in ([known] if known else []) + options:
        layout, interleaved, sign = option
        half = size if layout == "once" else size // 2
        if (layout != "once" and size % 2) or 2 * half > d or (likes[0].dtype.is_complex and layout != "once"):
            continue
        tables = [random(length, half, seed=20 + i, device=b.device) for i in range(2)]
        raw = [spread(t, layout) for t in tables]
        if likes[0].dtype.is_complex:
            raw = [torch.complex(*raw)]
        if len(raw) != len(roots):
            return None
        given = {}
        for root, t, like in zip(roots, raw, likes, strict=True):
            shaped = _shaped(t, like, length)
            if shaped is None:
                return None
            given[root] = shaped
        cos, sin = (spread(t, "pairs" if interleaved else "halves")[None] for t in tables)
        want = rotate(picked, cos, sign * sin, 2 * half, interleaved)
        if close(compute(x, given), want):
            b.rotations.guess[tuple(likes[0].shape)] = option
            return b.rotations.index(roots, layout, sign, 2 * half, interleaved), 2 * half, interleaved
    return None


def spread(t: Tensor, layout: str) -> Tensor:
    """Angles (..., n) as a model keeps them."""
    if layout == "halves":
        return torch.cat((t, t), -1)
    return t.repeat_interleave(2, -1) if layout == "pairs" else t


def _shaped(t: Tensor, like: Tensor, length: int) -> Tensor | None:
    """(S, n) in the shape of what the model has."""
    if like.shape[-1] != t.shape[-1]:
        return None
    where = [i for i, n in enumerate(like.shape[:-1]) if n == length]
    if not where:
        return None
    shape = [1] * like.dim()
    shape[where[-1]], shape[-1] = length, t.shape[-1]
    return t.view(shape).expand(like.shape)
