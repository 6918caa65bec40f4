"""Attention of some queries over some keys of a longer sequence: a part of the result, and of the gradients.

What a kernel makes of a block of keys is the result over all keys but for one factor a row, ``exp(lse of the block -
lse of all)``; and with the log-sum-exp of all keys in the place of the block's, its backward makes the block's part of
the gradients (Liu et al. 2023, https://arxiv.org/abs/2310.01889). Dropout, float64 and devices without kernels take
plain PyTorch, some queries at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import attention as dense
from ..ops import varlen_attention as packed
from ..ops._derivatives import no_autocast
from ..ops._dropout import dropout_threshold, philox
from ..ops.registry import compute_dtype
from ._layout import Block

_SCORES = 2**24  # elements that plain PyTorch holds at a time


@dataclass
class Options:
    """Of one call, for all of its blocks. `bias` and `mask` have this rank's queries and all keys of the sequence."""

    left: int
    right: int
    scale: float
    softcap: float
    dropout_p: float
    heads: int  # of the whole call: dropout counts by them
    first_head: int = 0
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    prefix_lengths: Tensor | None = None
    seed: Tensor | None = None
    kernel: bool = True  # whether there is one for these tensors
    packed: bool = False

    @property
    def trims(self) -> bool:
        return self.prefix_lengths is None


def add(total: Tensor, lse: Tensor, block: Block, part: Tensor, part_lse: Tensor) -> None:
    """Add a block's result to `total` (B, H, S, Dv) and `lse` (B, H, S) of the blocks before it, in their dtype."""
    rows = slice(*block.q)
    out, old = total[:, :, rows], lse[:, :, rows]
    new = torch.logaddexp(old, part_lse)
    shift = torch.where(new == float("-inf"), 0.0, new)  # nothing seen so far: both weights are 0
    out.mul_(torch.exp(old - shift)[..., None]).addcmul_(part.to(out.dtype), torch.exp(part_lse - shift)[..., None])
    old.copy_(new)


def forward(block: Block, q: Tensor, k: Tensor, v: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of a block; q, k and v are (B, H, S, D) of two ranks, B = 1 where sequences are packed."""
    q, k, v = q[:, :, slice(*block.q)], k[:, :, slice(*block.k)], v[:, :, slice(*block.k)]
    if not o.kernel:
        return _plain_forward(block, q, k, v, o)
    if block.ends is not None:
        out, lse = packed._fwd(*(_tokens(t) for t in (q, k, v)), *_packed_arguments(block, q.device, o))
        return out.transpose(0, 1)[None], lse[None]
    arguments, moved = _arguments(block, o)
    out, lse = dense._fwd(q, k, v, *arguments)
    return out, lse if moved is None else lse + moved


def backward(
    block: Block,
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    o: Options,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What a block adds to the gradients of its queries, keys, values and its part of the bias.

    grad, out, grad_lse and lse are this rank's, of all keys.
    """
    rows = slice(*block.q)
    q, k, v = q[:, :, rows], k[:, :, slice(*block.k)], v[:, :, slice(*block.k)]
    grad, out, lse = grad[:, :, rows], out[:, :, rows], lse[:, :, rows]
    if grad_lse is not None:
        grad_lse = grad_lse[:, :, rows]
    elif o.kernel and _has_one_key(block):
        grad_lse = torch.zeros_like(lse)
    if not o.kernel:
        return _plain_backward(block, grad, grad_lse, q, k, v, out, lse, o, bias_grad)
    if block.ends is not None:
        tensors = (*(_tokens(t) for t in (q, k, v, out)), lse[0].contiguous())
        lse_grad = None if grad_lse is None else grad_lse[0].contiguous()
        made = packed._bwd(_tokens(grad), lse_grad, *tensors, *_packed_arguments(block, q.device, o))
        return *(t.transpose(0, 1)[None] for t in made[:3]), None
    arguments, moved = _arguments(block, o)
    if moved is not None:
        lse = lse - moved
    made = dense._bwd(grad, grad_lse, q, k, v, out, lse.contiguous(), *arguments, bias_grad)
    of_bias = columns(o.bias, block)
    if not bias_grad or of_bias is None:
        return *made[:3], None
    return *made[:3], made[3].sum_to_size(of_bias.shape)


def _has_one_key(block: Block) -> bool:
    """Whether the CPU kernel would take a key for the only one of a sequence, whose weight is 1 and has no gradient. It
    does not where there is a gradient of lse.
    """
    ends = block.ends or (0, block.keys)
    return any(b - a == 1 for a, b in zip(ends, ends[1:], strict=False))


def columns(t: Tensor | None, block: Block) -> Tensor | None:
    """A bias or mask (B or 1, H or 1, queries or 1, keys or 1) of a block."""
    if t is None:
        return None
    if t.shape[2] > 1:
        t = t[:, :, slice(*block.q)]
    return t[..., block.k_at : block.k_at + block.keys] if t.shape[3] > 1 else t


def delta(grad: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """What is taken from the gradient of each weight of a row (B, H, S), in the wide dtype."""
    wide = compute_dtype(out.dtype)
    rows = (grad.to(wide) * out.to(wide)).sum(-1)
    return rows if grad_lse is None else rows - grad_lse.to(wide)


# ---- by kernels ------------------------------------------------------------------------------------------------------


def _tokens(t: Tensor) -> Tensor:
    return t[0].transpose(0, 1)


def _packed_arguments(block: Block, device: torch.device, o: Options) -> tuple:
    assert block.ends is not None
    ends = torch.tensor(block.ends, dtype=torch.int32, device=device)
    most = max(b - a for a, b in zip(block.ends, block.ends[1:], strict=False))
    return (ends, ends, o.alibi_slopes, None, None, None, most, most, o.left, o.right, o.scale, o.softcap, 0.0)


def _arguments(block: Block, o: Options) -> tuple[tuple, Tensor | None]:
    """Of the raw operator from `bias` on; and what its lse (B, H, queries) lacks."""
    bias, mask, slopes, moved = columns(o.bias, block), columns(o.mask, block), o.alibi_slopes, None
    left, right = block.sees(o.left, o.right)
    if o.prefix_lengths is not None:
        seen = _seen(block, o, o.prefix_lengths.device)
        mask = seen if mask is None else seen & mask
        left = right = -1
    if slopes is not None and block.q_at - block.k_at != block.keys - block.queries:
        # The kernel would count distances from another place. As no query lies among the keys, a distance is a sum of
        # one part a key, added to the scores, and one a query, which its lse gets afterwards.
        of_keys, moved = _distances(block, slopes)
        bias, slopes = of_keys if bias is None else bias + of_keys, None
    return (bias, mask, slopes, None, None, None, left, right, o.scale, o.softcap, 0.0), moved


def _distances(block: Block, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """``-slopes * |query - key|`` as a sum: (1, H, 1, keys), at most 0, and (1, H, queries)."""
    at = torch.arange(block.queries, dtype=torch.float32, device=slopes.device) + (block.q_at - block.k_at)
    key = torch.arange(block.keys, dtype=torch.float32, device=slopes.device)
    slopes = slopes.float()[None, :, None]
    if block.q_at >= block.k_at:
        last = block.keys - 1
        return (slopes * (key - last))[:, :, None], slopes * (last - at)
    return (-slopes * key)[:, :, None], slopes * at


# ---- by plain PyTorch ------------------------------------------------------------------------------------------------


def _seen(block: Block, o: Options, device: torch.device) -> Tensor:
    """Which keys of the block a query of it sees by window and prefix: broadcastable to (B, 1, queries, keys)."""
    at = torch.arange(block.q_at, block.q_at + block.queries, dtype=torch.int64, device=device)[:, None]
    key = torch.arange(block.k_at, block.k_at + block.keys, dtype=torch.int64, device=device)[None, :]
    seen = torch.ones(block.queries, block.keys, dtype=torch.bool, device=device)
    if o.left >= 0:
        seen = seen & (key >= at - o.left)
    if o.right >= 0:
        seen = seen & (key <= at + o.right)
    seen = seen[None, None]
    prefix = o.prefix_lengths
    if o.packed and prefix is not None:
        prefix = prefix[block.sequence : block.sequence + 1]
    return seen if prefix is None else seen | (key < prefix.view(-1, 1, 1, 1))


def _kept(block: Block, batch: int, heads: int, o: Options) -> Tensor:
    """What dropout keeps of a block: as `ops._dropout.keep_mask`, for these places of the sequence."""
    assert o.seed is not None
    device = o.seed.device
    j = torch.arange(block.k_at, block.k_at + block.keys, dtype=torch.int64, device=device)
    i = torch.arange(block.q_at, block.q_at + block.queries, dtype=torch.int64, device=device)[:, None]
    b = torch.arange(block.sequence, block.sequence + batch, dtype=torch.int64, device=device)
    h = torch.arange(o.first_head, o.first_head + heads, dtype=torch.int64, device=device)
    bh = (b[:, None] * o.heads + h)[..., None, None]
    shape = torch.broadcast_shapes(bh.shape, i.shape, j.shape)
    counters = (j // 64 * 16 + j % 16, i, bh, torch.zeros_like(bh))
    words = torch.stack(philox(o.seed, *(t.expand(shape) for t in counters)), -1)
    chosen = words.gather(-1, (j % 64 // 16).expand(shape)[..., None])[..., 0]
    return chosen >= dropout_threshold(o.dropout_p)


def _pieces(block: Block, q: Tensor, k: Tensor):
    """Blocks of some of the queries, so that their scores stay small; and the rows of each."""
    rows = max(_SCORES // max(q.shape[0] * q.shape[1] * k.shape[2], 1), 1)
    for begin in range(0, block.queries, rows):
        end = min(begin + rows, block.queries)
        yield slice(begin, end), block._replace(q=(block.q[0] + begin, block.q[0] + end), q_at=block.q_at + begin)


def _scores(q, k, bias, block, o):
    wide = compute_dtype(q.dtype)
    batch, heads, queries, size = q.shape
    groups = k.shape[1]
    grouped = q.to(wide).reshape(batch, groups, heads // groups, queries, size)
    scores = (grouped @ k.to(wide).unsqueeze(2).transpose(-1, -2)).reshape(batch, heads, queries, -1) * o.scale
    if o.softcap:
        scores = o.softcap * torch.tanh(scores / o.softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if o.alibi_slopes is not None:
        at = torch.arange(block.q_at, block.q_at + queries, dtype=torch.int64, device=q.device)[:, None]
        key = torch.arange(block.k_at, block.k_at + block.keys, dtype=torch.int64, device=q.device)
        scores = scores - o.alibi_slopes.to(wide)[:, None, None] * (at - key).abs().to(wide)
    seen = _seen(block, o, q.device)
    mask = columns(o.mask, block)
    return scores.masked_fill(~(seen if mask is None else seen & mask), float("-inf"))


def _weigh(weights, v):
    batch, heads, queries, keys = weights.shape
    grouped = weights.reshape(batch, v.shape[1], heads // v.shape[1], queries, keys)
    return (grouped @ v.to(weights.dtype).unsqueeze(2)).reshape(batch, heads, queries, v.shape[-1])


def _plain_forward(block, q, k, v, o):
    outs, lses = [], []
    with no_autocast(q.device):
        for rows, piece in _pieces(block, q, k):
            scores = _scores(q[:, :, rows], k, columns(o.bias, piece), piece, o)
            lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], float("-inf"))
            weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
            if o.dropout_p:
                weights = torch.where(_kept(piece, len(q), q.shape[1], o), weights / (1 - o.dropout_p), 0.0)
            outs.append(_weigh(weights, v))
            lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _plain_backward(block, grad, grad_lse, q, k, v, out, lse, o, bias_grad):
    wide, all_delta = compute_dtype(q.dtype), delta(grad, out, grad_lse)
    dq, dk, dv = (t.new_zeros(t.shape, dtype=wide) for t in (q, k, v))
    of_bias = columns(o.bias, block)
    dbias = of_bias.new_zeros(of_bias.shape, dtype=wide) if of_bias is not None and bias_grad else None
    with no_autocast(q.device):
        for rows, piece in _pieces(block, q, k):
            bias = columns(o.bias, piece)
            leaves = [t.detach().requires_grad_() for t in (q[:, :, rows], k, *([bias] if bias_grad else []))]
            with torch.enable_grad():
                scores = _scores(leaves[0], leaves[1], leaves[2] if bias_grad else bias, piece, o)
            row_lse = torch.where(lse[:, :, rows] == float("-inf"), float("inf"), lse[:, :, rows]).to(wide)
            weights = torch.exp(scores.detach() - row_lse[..., None])
            kept = weights
            upstream = _weigh_back(grad[:, :, rows].to(wide), v.to(wide))
            if o.dropout_p:
                keep = _kept(piece, len(q), q.shape[1], o)
                kept = torch.where(keep, weights / (1 - o.dropout_p), 0.0)
                upstream = torch.where(keep, upstream / (1 - o.dropout_p), 0.0)
            of_scores = weights * (upstream - all_delta[:, :, rows, None])
            made = torch.autograd.grad(scores, leaves, of_scores)
            dq[:, :, rows] += made[0]
            dk += made[1]
            dv += _of_values(kept, grad[:, :, rows].to(wide), v)
            if dbias is not None:
                (dbias[:, :, rows] if dbias.shape[2] > 1 else dbias).add_(made[2])
    return dq, dk, dv, dbias


def _weigh_back(grad, v):
    batch, heads, queries, size = grad.shape
    grouped = grad.reshape(batch, v.shape[1], heads // v.shape[1], queries, size)
    return (grouped @ v.unsqueeze(2).transpose(-1, -2)).reshape(batch, heads, queries, v.shape[2])


def _of_values(kept, grad, v):
    batch, heads, queries, keys = kept.shape
    shape = (batch, v.shape[1], heads // v.shape[1] * queries)
    return kept.reshape(*shape, keys).transpose(-1, -2) @ grad.reshape(*shape, grad.shape[-1])
