"""What the operations mean: an interpreter in plain PyTorch, in any floating dtype."""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.activations import ACTIVATIONS
from . import _layers
from ._context import Context
from ._ir import (
    Activate,
    Attend,
    Call,
    Combine,
    Experts,
    ExpertWeights,
    Graph,
    Heads,
    HeadsOf,
    Keep,
    Norm,
    NormSpec,
    Product,
)


class Cache:
    """The keys and values of each layer, (B, Hk, S, D), that `run` appends to; `theirs` is for calls with a cache."""

    def __init__(self, layers: int, theirs: Any = None):
        self.theirs, self.past = theirs, 0
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        for held, new in ((self.keys, k), (self.values, v)):
            held[layer] = new if held[layer] is None else torch.cat([held[layer].to(new.dtype), new], 2)


def of_rows(op: Norm | Combine | Activate | Product, values: dict[int, Tensor], hidden: Tensor) -> Tensor:
    """What an operation gives that takes each token by itself."""
    match op:
        case Norm():
            y = op.scale * norm(values[op.x], op.spec)
            return y if op.residual is None else y + op.residual_scale * values[op.residual]
        case Combine():
            terms = [scale * values[x] * (1 if c is None else _cast(c.get(), hidden)) for x, scale, c in op.terms]
            return sum(terms[1:], terms[0])
        case Activate():
            return activate(op, values)
    width = _layers.shape(op.module)[1]
    return _layers.apply(op.module, values[op.x][..., op.x_column : op.x_column + width])


def run(
    graph: Graph,
    hidden: Tensor,
    positions: Tensor,
    cache: Cache,
    *,
    starts: Tensor | None = None,
    keep: int | None = None,
) -> Tensor:
    """Logits (B, keep, vocabulary) in the dtype of `hidden`, (B, S, width).

    Args:
        positions: (B, S), for the angles.
        starts: (B,) the first token of each sequence, of all that there are, that is no padding.
        keep: how many rows of logits a sequence; all by default.
    """
    values: dict[int, Tensor] = {graph.hidden: hidden}
    angles = [
        tuple(t.to(hidden.dtype) for t in a.module(hidden.to(a.dtype), positions, *a.extra)) for a in graph.angles
    ]
    context = Context(cache.theirs, positions, starts, cache.past)
    cache.past += hidden.shape[1]
    for op in graph.operations:
        match op:
            case Norm() | Combine() | Activate() | Product():
                values[op.out] = of_rows(op, values, hidden)
            case Heads():
                _heads(op, values, cache, angles)
            case Attend():
                values[op.out] = _attend(op, values[op.q], cache, starts)
            case Experts():
                values[op.out] = experts(op, values)
            case Call():
                given = {"context": context} if op.cached else {}
                outs = op.function(*(values[x] for x in op.xs), **given)
                outs = outs if isinstance(outs, (tuple, list)) else (outs,)
                values.update(zip(op.outs, outs, strict=True))
            case Keep():
                values[op.out] = values[op.x] if keep is None else values[op.x][:, -keep:]
    return values[graph.logits]


def _cast(vector: Tensor, like: Tensor) -> Tensor:
    return vector.detach().flatten().to(like.dtype)


def norm(x: Tensor, spec: NormSpec) -> Tensor:
    groups = x.unflatten(-1, (-1, spec.size))
    if spec.kind == "layer":
        groups = groups - groups.mean(-1, keepdim=True)
    y = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + spec.eps)
    if spec.weight is not None:
        y = y * (_cast(spec.weight.get(), x) + spec.offset)
    if spec.bias is not None:
        y = y + _cast(spec.bias.get(), x)
    return y.flatten(-2)


def activate(op: Activate, values: dict[int, Tensor]) -> Tensor:
    x = values[op.x][..., op.x_column : op.x_column + op.width]
    if op.limit:
        x = x.clamp(max=op.limit)
    y = op.scale * (ACTIVATIONS[op.act](x, op.alpha) if op.act == "quick_gelu" else ACTIVATIONS[op.act](x))
    if op.up is not None:
        up = values[op.up][..., op.up_column : op.up_column + op.width]
        y = y * ((up.clamp(-op.limit, op.limit) if op.limit else up) + op.up_offset)
    return op.softcap * torch.tanh(y / op.softcap) if op.softcap else y


def _pick(of: HeadsOf, values: dict[int, Tensor], spec: NormSpec | None = None) -> Tensor:
    x = values[of.x]
    x = torch.stack([x[..., c : c + of.d] for c in of.columns], 1)  # (B, H, S, d)
    return x if spec is None else norm(x, spec)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool) -> Tensor:
    """x (B, H, S, D); cos and sin (B or 1, S, rotary)."""
    a, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        paired = torch.stack((-a[..., 1::2], a[..., ::2]), -1).flatten(-2)
    else:
        first, second = a.chunk(2, -1)
        paired = torch.cat((-second, first), -1)
    return torch.cat((a * cos.unsqueeze(1) + paired * sin.unsqueeze(1), rest), -1)


def _heads(op: Heads, values: dict[int, Tensor], cache: Cache, angles: list) -> None:
    q = _pick(op.q, values, op.q_norm)
    k = None if op.k is None else _pick(op.k, values, op.k_norm)
    if op.angles is not None:
        cos, sin = angles[op.angles]
        q = rotate(q, cos, sin, op.rotary, op.interleaved)
        k = None if k is None else rotate(k, cos, sin, op.rotary, op.interleaved)
    if k is not None:
        cache.append(op.layer, k, _pick(op.v, values))
    values[op.out] = q.transpose(1, 2).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, op: Attend) -> Tensor:
    """(B, H, Sq, dv) of q (B, H, Sq, d), k and v (B, Hk, Sk, .), visible (B or 1, 1, Sq, Sk)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * op.scale
    if op.softcap:
        scores = op.softcap * torch.tanh(scores / op.softcap)
    if op.alibi is not None:
        slopes = torch.tensor(op.alibi, dtype=q.dtype, device=q.device).view(1, -1, 1, 1)
        key = torch.arange(k.shape[2], dtype=torch.int64, device=q.device)
        scores = scores + slopes * (key - key[-q.shape[2] :, None]).to(q.dtype)
    scores = scores.masked_fill(~visible, float("-inf"))
    if op.sinks is not None:
        sinks = _cast(op.sinks.get(), q).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)  # a row of padding sees nothing
    return weights[..., : k.shape[2]] @ v


def _attend(op: Attend, q: Tensor, cache: Cache, starts: Tensor | None) -> Tensor:
    k, v = (t[op.layer].to(q.dtype) for t in (cache.keys, cache.values))
    key = torch.arange(k.shape[2], dtype=torch.int64, device=q.device)
    query = key[-q.shape[1] :, None]
    visible = (key <= query)[None]
    if op.window:
        visible = visible & (key > query - op.window)
    if starts is not None:
        visible = visible & (key >= starts.view(-1, 1, 1))
    out = attention(q.unflatten(-1, (op.heads, op.d)).transpose(1, 2), k, v, visible.unsqueeze(1), op)
    return out.transpose(1, 2).flatten(2)


def choose(op: Experts, values: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """(weights, numbers) of each row's experts, (..., top)."""
    if op.logits is None:
        return values[op.weights], values[op.chosen].round().long()
    logits = values[op.logits]
    weights, chosen = (logits.sigmoid() if op.sigmoid else logits.softmax(-1)).topk(op.top)
    if op.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return op.scale * weights, chosen


def experts(op: Experts, values: dict[int, Tensor]) -> Tensor:
    x, stacked = values[op.x], op.stacked
    weights, chosen = choose(op, values)
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, slot = (chosen == expert).nonzero(as_tuple=True)[:-1], (chosen == expert).nonzero()[:, -1]
        both = _part(stacked, stacked.gate_up, stacked.gate_up_bias, expert, x[rows])
        if stacked.interleaved:
            gate, up = both[..., ::2], both[..., 1::2]
        else:
            gate, up = both.chunk(2, -1)
        if stacked.up_first:
            gate, up = up, gate
        limits = Activate(0, 2, op.act, gate.shape[-1], up=1, limit=op.limit, alpha=op.alpha, up_offset=op.up_offset)
        inner = activate(limits, {0: gate, 1: up})
        y = _part(stacked, stacked.down, stacked.down_bias, expert, inner)
        out.index_put_(rows, weights[(*rows, slot)].unsqueeze(-1) * y, accumulate=True)
    return out


def _part(stacked: ExpertWeights, name: str, bias: str | None, expert: int, x: Tensor) -> Tensor:
    """Rows times one expert's weight."""
    weight = getattr(stacked.module, name)[expert]
    weight = weight.dequantize() if hasattr(weight, "dequantize") and not isinstance(weight, Tensor) else weight
    y = _layers.product(x, weight.T if stacked.transposed else weight)
    return y if bias is None else y + _cast(getattr(stacked.module, bias)[expert], x)
