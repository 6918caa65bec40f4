"""Tensors that lie cut over ranks by tokens, and go over them cut by heads, and back (Jacobs et al. 2023,
https://arxiv.org/abs/2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.registry import compute_dtype
from ._group import count

Spans = Sequence[tuple[int, int]]  # of heads, one a rank; they may overlap


def _swap(sent: list[Tensor], sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """`sent[r]`, flat, goes to rank r, and `sizes[r]` elements come from it."""
    rank = dist.get_rank(group)
    flat = torch.cat(sent)
    received = flat.new_empty(sum(sizes))
    others = sum(t.numel() for r, t in enumerate(sent) if r != rank)
    count(others * flat.element_size(), len(sent) - 1)
    dist.all_to_all_single(received, flat, sizes, [t.numel() for t in sent], group=group)
    return list(received.split(sizes))


def _to_heads(tensors, lengths, spans, group):
    """(B, H, S, D) of this rank's tokens each to (B, its heads, all S, D); one message a rank for all of them."""
    rank = dist.get_rank(group)
    sent = [
        torch.cat([t[:, slice(*span[r])].reshape(-1) for t, span in zip(tensors, spans, strict=True)])
        for r in range(len(lengths))
    ]
    shapes = [
        [(t.shape[0], span[rank][1] - span[rank][0], n, t.shape[3]) for t, span in zip(tensors, spans, strict=True)]
        for n in lengths
    ]
    counts = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
    parts = _swap(sent, [sum(c) for c in counts], group)
    pieces = [
        [p.view(shape) for p, shape in zip(part.split(c), of_rank, strict=True)]
        for part, c, of_rank in zip(parts, counts, shapes, strict=True)
    ]
    return [torch.cat([piece[i] for piece in pieces], 2) for i in range(len(tensors))]


def _to_tokens(tensors, lengths, spans, heads, group):
    """The way back. Where several ranks had a head, what they give is added up in float32, in their order."""
    rank = dist.get_rank(group)
    sent = [
        torch.cat([part[r].reshape(-1) for part in [t.split(list(lengths), 2) for t in tensors]])
        for r in range(len(lengths))
    ]
    shapes = [
        [
            (t.shape[0], span[r][1] - span[r][0], lengths[rank], t.shape[3])
            for t, span in zip(tensors, spans, strict=True)
        ]
        for r in range(len(lengths))
    ]
    counts = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
    parts = _swap(sent, [sum(c) for c in counts], group)
    results = []
    for i, t in enumerate(tensors):
        overlap = sum(b - a for a, b in spans[i]) != heads[i]
        dtype = compute_dtype(t.dtype) if overlap else t.dtype
        whole = t.new_zeros(t.shape[0], heads[i], lengths[rank], t.shape[3], dtype=dtype)
        for r, (part, c, of_rank) in enumerate(zip(parts, counts, shapes, strict=True)):
            whole[:, slice(*spans[i][r])] += part.split(c)[i].view(of_rank[i])
        results.append(whole.to(t.dtype))
    return results


class ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lengths, spans, group, *tensors):
        ctx.arguments = lengths, spans, group
        ctx.heads = [t.shape[1] for t in tensors]
        return tuple(_to_heads(tensors, lengths, spans, group))

    @staticmethod
    def backward(ctx, *grads):
        lengths, spans, group = ctx.arguments
        return None, None, None, *_to_tokens(grads, lengths, spans, ctx.heads, group)


class ToTokens(torch.autograd.Function):
    """The spans do not overlap and hold all heads."""

    @staticmethod
    def forward(ctx, lengths, spans, group, *tensors):
        ctx.arguments = lengths, spans, group
        heads = [max(b for _, b in span) for span in spans]
        return tuple(_to_tokens(tensors, lengths, spans, heads, group))

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *_to_heads(grads, *ctx.arguments)
