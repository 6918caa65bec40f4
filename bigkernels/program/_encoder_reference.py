"""What the operations of an encoder's layer mean: an interpreter in plain PyTorch, over a padded batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._encoder_call import HIDDEN_BELOW, Given
from ._encoder_ir import GivenAngles, LayerGraph, Mix, Turn
from ._ir import Activate, Combine, Norm, Product
from ._reference import _pick, of_rows, rotate


def run(graph: LayerGraph, given: Given) -> Tensor:
    """The layer's hidden states (B, S, width) in the dtype of the given ones."""
    hidden = given.hidden
    values: dict[int, Tensor] = {graph.hidden: hidden}
    for op in graph.operations:
        match op:
            case Norm() | Combine() | Activate() | Product():
                values[op.out] = of_rows(op, values, hidden)
            case Turn():
                heads = _pick(op.x, values, op.norm)
                if op.angles is not None:
                    cos, sin = (t.to(hidden.dtype) for t in tables(graph.angles[op.angles], given))
                    heads = rotate(heads, cos, sin, op.rotary, op.interleaved)
                values[op.out] = heads.transpose(1, 2).flatten(2)
            case Mix():
                q, k, v = (_pick(of, values) for of in (op.q, op.k, op.v))
                out = attention(q, k, v, scores_of(graph, given), op)
                values[op.out] = out.transpose(1, 2).flatten(2)
    return values[graph.logits]


def tables(angles: GivenAngles, given: Given) -> tuple[Tensor, Tensor]:
    """(cos, sin), (1, S, rotary), as records have them, of what a layer is given."""
    pair = given.others[angles.name]
    cos, sin = (pair[i] for i in angles.order)
    return _laid_out(cos, angles), _laid_out(angles.sign * sin, angles)


def _laid_out(t: Tensor, angles: GivenAngles) -> Tensor:
    half = angles.rotary // 2
    once = t[..., :half] if angles.layout in ("once", "halves") else t[..., ::2][..., :half]
    return once.repeat_interleave(2, -1) if angles.interleaved else torch.cat((once, once), -1)


def scores_of(graph: LayerGraph, given: Given) -> Tensor:
    """What is added to scores, -inf where a key is not seen: broadcastable to (B, H, S, S)."""
    total = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=given.hidden.device)
    for name in graph.scores:
        t = given.others[name]
        if t.dtype == torch.bool:
            t = torch.zeros(t.shape, dtype=torch.float64, device=t.device).masked_fill(~t, float("-inf"))
        total = total + t.double()
    return total.masked_fill(total <= HIDDEN_BELOW, float("-inf"))


def attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor, op: Mix) -> Tensor:
    """(B, H, S, dv)"""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * op.scale
    if op.softcap:
        scores = op.softcap * torch.tanh(scores / op.softcap)
    scores = scores + added.to(q.dtype)
    if op.causal:
        earlier = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~earlier, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v
