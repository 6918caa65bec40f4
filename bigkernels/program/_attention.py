"""What an attention computes: scale, softcap, window, slopes and sinks, from its weights.

Values that are one at one key make the result of an attention its weights, however it is written; their logarithms are
the scores, but for a constant.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._forms import close, plain_within, random
from ._ir import Attend, Stored
from ._reference import attention
from ._replay import replay
from ._rows import as_heads, from_heads
from ._trace import Ref, Refused

if TYPE_CHECKING:
    from ._identify import Builder


def attention_between(b: Builder, q: Ref, keys: Ref, values: Ref, out: Ref) -> Attend:
    """The attention of `q` that makes `out`; numbers of values and layers are left open.

    Raises:
        Refused: it is another function.
    """
    where = b.path(out)
    batch, length = b.trace.tokens.shape
    q_like, k_like, v_like = b.tensor(q), b.tensor(keys), b.tensor(values)
    q_heads = as_heads(q_like, batch, length)
    o_heads = as_heads(b.tensor(out), batch, length)
    if q_heads is None or o_heads is None or k_like.dim() != 4 or v_like.dim() != 4:
        raise Refused(f"{where}: its heads have no known layout")
    heads, d, groups, dv = q_heads.shape[1], q_heads.shape[3], k_like.shape[1], v_like.shape[3]
    total = k_like.shape[2]
    if o_heads.shape != (batch, heads, length, dv) or k_like.shape[3] != d or heads % groups:
        raise Refused(f"{where}: its heads do not fit each other")

    def compute(q_, k_, v_):
        given = {q: from_heads(q_, q_like, batch, length), keys: k_, values: v_}
        return as_heads(replay(b.recorder, [out], given)[0], batch, length)

    def weights(q_, k_):
        """(B, H, S, keys)"""
        parts = []
        for begin in range(0, total, dv):
            v_ = torch.zeros(batch, groups, total, dv, dtype=torch.float64, device=b.device)
            for i in range(min(dv, total - begin)):
                v_[:, :, begin + i, i] = 1
            parts.append(compute(q_, k_, v_)[..., : min(dv, total - begin)])
        return torch.cat(parts, -1)

    def sample(*shape, seed):
        return random(*shape, seed=seed, device=b.device)

    none = weights(torch.zeros_like(q_heads), torch.zeros_like(k_like))
    if not torch.isfinite(none).all() or none.min() < 0:
        raise Refused(f"{where}: is no attention")
    visible = none > 0
    if not torch.equal(visible, visible[:1, :1].expand_as(visible)):
        raise Refused(f"{where}: heads see different keys")
    visible = visible[:1, :1]
    window = window_of(visible[0, 0], total - length, where)
    spec = Attend(-1, -1, -1, heads, groups, d, dv, 1.0, window)
    bias = none.clamp_min(1e-300).log()
    last = torch.arange(total - length, total, dtype=torch.int64, device=b.device)  # a query's own key
    own = last.view(1, 1, -1, 1)
    bias = torch.where(visible, bias - bias.gather(-1, own.expand(batch, heads, -1, 1)), 0.0)
    spec = replace(spec, alibi=_slopes(bias, visible, last, where), sinks=_sinks(b, none, q, out, heads, keys, where))
    # Scores against that of a key of zeros: the first one that each query sees.
    q_ = sample(*q_heads.shape, seed=1) * (3 / d) ** 0.5
    k_ = sample(*k_like.shape, seed=2)
    first = visible[0, 0].int().argmax(-1)  # (S,)
    scale, softcap = None, 0.0
    for query in range(length):
        k_[:, :, first[query]] = 0
    raw = q_ @ k_.repeat_interleave(heads // groups, 1).transpose(2, 3)
    reference = first.view(1, 1, -1, 1).expand(batch, heads, -1, 1)
    seen = visible & (k_.abs().sum(-1).repeat_interleave(heads // groups, 1).unsqueeze(2) > 0)
    seen = seen.expand_as(raw)

    def scores(factor):
        p = weights(factor * q_, k_).clamp_min(1e-300).log()
        return (p - p.gather(-1, reference) - bias + bias.gather(-1, reference))[seen]

    if bool(seen.any()):
        small = 1e-2 / raw.abs().max().item()
        scale = (scores(small) * raw[seen] * small).sum().item() / (raw[seen] * small).square().sum().item()
        if not math.isfinite(scale) or scale == 0:
            raise Refused(f"{where}: its scores do not depend on queries and keys")
        factor = 25.0 / (abs(scale) * raw.abs().max().item())
        want = scale * factor * raw[seen]
        got = scores(factor)
        if not close(got, want, 1e-6):
            softcap = _softcap(want, got)
            if softcap is None:
                raise Refused(f"{where}: its scores are no scaled products")
    if scale is None:
        raise Refused(f"{where}: each token sees itself alone")
    scale, softcap = plain_within(scale, 1e-9), plain_within(softcap, 1e-7) if softcap else 0.0
    for candidate in _scales(scale, d):
        spec = replace(spec, scale=candidate, softcap=softcap)
        q_, k_, v_ = sample(*q_heads.shape, seed=3), sample(*k_like.shape, seed=4), sample(*v_like.shape, seed=5)
        if close(compute(q_, k_, v_), attention(q_, k_, v_, visible, spec), 1e-7):
            return spec
    raise Refused(f"{where}: computes another attention")


def _scales(found: float, d: int) -> list[float]:
    """The numbers that a measured scale may stand for, the likely first."""
    likely = [s for s in (d**-0.5, 1.0, 1.0 / d, 2.0**-3) if abs(s - found) <= 1e-4 * abs(found)]
    return [*likely, plain_within(found, 1e-5), found]


def _softcap(want: Tensor, got: Tensor) -> float | None:
    """c of got = c tanh(want / c)."""
    i = want.abs().argmax()
    s, g = want[i].abs().item(), got[i].abs().item()
    if not 0 < g < s:
        return None
    low, high = g, 1e6
    for _ in range(200):
        c = (low + high) / 2
        if c * math.tanh(s / c) < g:
            low = c
        else:
            high = c
    return c if close(got, c * torch.tanh(want / c), 1e-4) else None


def window_of(visible: Tensor, past: int, where: str) -> int:
    """Keys that a query sees, itself included; 0 where it sees all before it."""
    length, total = visible.shape
    key = torch.arange(total, dtype=torch.int64, device=visible.device)
    query = key[past:, None]
    if torch.equal(visible, key <= query):
        return 0
    for window in range(1, total):
        if torch.equal(visible, (key <= query) & (key > query - window)):
            return window
    raise Refused(f"{where}: its mask is no causal one")


def _slopes(bias: Tensor, visible: Tensor, last: Tensor, where: str) -> tuple[float, ...] | None:
    if not bias.abs().max().item() > 1e-9:
        return None
    distance = torch.arange(bias.shape[-1], dtype=torch.int64, device=bias.device) - last.view(-1, 1)
    distance = (distance * visible[0, 0]).double()
    slopes = (bias * distance).sum((0, 2, 3)) / (distance.square().sum() * bias.shape[0])
    if not close(bias, (slopes.view(1, -1, 1, 1) * distance).expand_as(bias), 1e-6):
        raise Refused(f"{where}: its scores have a bias that is not known")
    return tuple(plain_within(s, 1e-7) for s in slopes.tolist())


def _sinks(b: Builder, none: Tensor, q: Ref, out: Ref, heads: int, keys: Ref, where: str) -> Stored | None:
    """What is lacking from the sum of weights goes to sinks."""
    lacking = 1 - none.sum(-1)
    if lacking.abs().max() < 1e-9:
        return None
    keys, queries = none.shape[-1], none.shape[2]
    own = torch.arange(keys - queries, keys, dtype=torch.int64, device=none.device)
    own = none.gather(-1, own.view(1, 1, -1, 1).expand(*none.shape[:3], 1))[..., 0]
    sinks = (lacking / own).log()[0, :, 0]
    for vector in b.vectors(out, {q, keys}):
        values = vector.get().detach().double().flatten()
        if values.shape == (heads,) and close(values, sinks, 1e-6):
            return vector
    raise Refused(f"{where}: its weights do not sum to one")


def spelled_out(b: Builder, number: int) -> tuple[Ref, Ref] | None:
    """(query, result) where a softmax is that of an attention: its scores come from the cache's keys."""
    recorder = b.recorder
    keys: set[Ref] = set()
    values: set[Ref] = set()
    for update in b.trace.updates:
        if update.step < number:
            keys.add(Ref(update.step, 0))
            values.add(Ref(update.step, 1))
    # Scores: the step where something of the keys meets something that is not.
    first = min((r.step for r in keys), default=number)
    query = None

    def has(ref: Ref, roots: set[Ref], memo: dict[Ref, bool], stop: int) -> bool:
        """Whether `ref` comes from `roots`, not through a value."""
        if ref in roots:
            return True
        if ref.step < stop or ref in b.values:
            return False
        if ref not in memo:
            memo[ref] = any(has(r, roots, memo, stop) for r in recorder.steps[ref.step].inputs)
        return memo[ref]

    memo_k: dict[Ref, bool] = {}
    here = recorder.steps[number].inputs
    if not any(has(r, keys, memo_k, first) for r in here):
        return None
    seen: set[Ref] = set()
    todo = [r for r in here if has(r, keys, memo_k, first)]
    while todo:
        ref = todo.pop()
        if ref in seen:
            continue
        seen.add(ref)
        step = recorder.steps[ref.step]
        mine = [r for r in step.inputs if has(r, keys, memo_k, first)]
        other = [r for r in step.inputs if r not in mine]
        if mine and other and any(_only(recorder, r, keys) for r in mine):
            if query is not None and other != [query]:
                return None
            query = other[0]
            continue
        todo += mine
    if query is None:
        return None
    # The result: the step where the weights meet the values.
    weights = {Ref(number, 0)}
    memo_v: dict[Ref, bool] = {}
    for later in range(number + 1, len(recorder.steps)):
        step = recorder.steps[later]
        from_weights = [r for r in step.inputs if r in weights]
        if not from_weights:
            continue
        if any(r not in weights and has(r, values, memo_v, first) for r in step.inputs):
            return query, _outlet(b, Ref(later, 0), keys)
        weights |= {Ref(later, i) for i in range(len(step.outs))}
    return None


def _outlet(b: Builder, out: Ref, keys: set[Ref]) -> Ref:
    """The first tensor from `out` on that all that comes from scores goes through: sums of weights may scale it."""
    steps = b.recorder.steps
    first = max(r.step for r in keys if r.step < out.step)
    scores = set()
    for number in range(first, len(steps)):
        step = steps[number]
        if number > out.step and (step.module is not None or step.name == "append"):
            break
        if step.depends and (number in {r.step for r in keys} or any(r.step in scores for r in step.inputs)):
            scores.add(number)
    for candidate in sorted(n for n in scores if n >= out.step):
        later = [n for n in b.needed if n > candidate]
        read = {r.step for n in later for r in steps[n].inputs}
        if not any(n < candidate for n in read & scores):
            return Ref(candidate, 0)
    return out


def _only(recorder, ref: Ref, roots: set[Ref]) -> bool:
    """Whether all of `ref` comes from `roots`."""
    while ref not in roots:
        inputs = recorder.steps[ref.step].inputs
        if len(inputs) != 1:
            return False
        ref = inputs[0]
    return True
