"""Experts that lie on several ranks: tokens go to the ranks of their experts, and the results come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_private import disable_dynamo
from ._group import Group, agree, count, resolve_group

_OP = "distributed.expert_parallel"


def local_experts(num_experts: int, *, group: Group = None) -> range:
    """The experts of this rank: as many as of every other one, or one more on the first ranks."""
    members = resolve_group("distributed.local_experts", group)
    return _owned(num_experts, dist.get_rank(members), dist.get_world_size(members))


def _owned(num_experts: int, rank: int, ranks: int) -> range:
    begins = [r * (num_experts // ranks) + min(r, num_experts % ranks) for r in (rank, rank + 1)]
    return range(*begins)


@disable_dynamo
def expert_parallel(
    x: Tensor,
    chosen: Tensor,
    routing_weight: Tensor,
    function: Callable[[Tensor, Tensor], Tensor],
    *,
    num_experts: int,
    group: Group = None,
) -> Tensor:
    """``out[t] = sum over i of routing_weight[t, i] * expert[chosen[t, i]](x[t])``, of experts on several ranks.

    Each rank calls `function` once, with the tokens of all ranks for the experts that it has (`local_experts`), sorted
    by expert: what `bigkernels.ops.grouped_linear` takes. A rank sends each of its tokens once a chosen expert of
    another rank, and gets as many results back; backward sends the gradients the same ways.

    Args:
        x: (T, D), floating: this rank's tokens, of another number on each rank, or none.
        chosen: (T, K), integers in [0, num_experts).
        routing_weight: (T, K), floating. Differentiable.
        function: the experts, called with tokens (R, D) and `ends` (E,), int32: the tokens of this rank's expert i end
            at ``ends[i]``; returns (R, N). It is called with R = 0 too, so that all ranks take part in what it reduces.
        num_experts: of all ranks.
        group: a process group, a device mesh of one dimension, or None: the default group.

    Returns:
        (T, N) in the dtype of `x`; summed over the K experts in float32, in the order of `chosen`.

    Raises:
        TypeError: `chosen` holds no integers.
        ValueError: shapes do not fit, an expert does not exist (on CPU), or ranks differ in sizes (then on every rank).
        RuntimeError: there is no process group.
    """
    members = resolve_group(_OP, group)
    ranks, rank = dist.get_world_size(members), dist.get_rank(members)
    if chosen.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"bigkernels.{_OP}: chosen is {chosen.dtype}; accepted are int32 and int64")
    if x.dim() != 2 or chosen.dim() != 2 or chosen.shape != routing_weight.shape or len(chosen) != len(x):
        raise ValueError(
            f"bigkernels.{_OP}: x {tuple(x.shape)}, chosen {tuple(chosen.shape)} and routing_weight "
            f"{tuple(routing_weight.shape)} do not fit; expected (T, D), (T, K) and (T, K)"
        )
    if chosen.is_cpu and chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < num_experts:
        raise ValueError(f"bigkernels.{_OP}: chosen is {int(chosen.min())} to {int(chosen.max())} of {num_experts}")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    named = ("the width of x", "num_experts", "the dtype", "whether gradients are recorded")
    agreed = (x.shape[1], num_experts, dtypes.index(x.dtype), int(torch.is_grad_enabled()))
    said = agree(_OP, members, named, agreed, x.device, (int(x.requires_grad),))
    # All ranks take part in what goes back in backward, those that need nothing of it as well.
    anchor = x.new_zeros(0, requires_grad=True)
    way_there = anchor if any(needs for (needs,) in said) else None
    each = chosen.shape[1]
    flat = chosen.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    spans = [_owned(num_experts, r, ranks) for r in range(ranks)]
    mine = len(spans[rank])
    theirs = counts.new_empty(ranks * mine)
    dist.all_to_all_single(theirs, counts, [mine] * ranks, [len(span) for span in spans], group=members)
    theirs = theirs.view(ranks, mine)
    sent = [int(part.sum()) for part in counts.split([len(span) for span in spans])]
    received = theirs.sum(1).tolist()
    tokens = _Exchange.apply(x.index_select(0, order // each), way_there, sent, received, members)
    # They come rank by rank, and within a rank by expert.
    expert = torch.arange(mine, dtype=torch.int64, device=x.device).repeat(ranks).repeat_interleave(theirs.view(-1))
    by_expert = torch.argsort(expert, stable=True)
    ends = theirs.sum(0).cumsum(0).int()
    results = function(tokens.index_select(0, by_expert), ends)
    if results.dim() != 2 or len(results) != len(tokens):
        raise ValueError(
            f"bigkernels.{_OP}: experts returned {tuple(results.shape)} for {len(tokens)} tokens, expected (R, N)"
        )
    results = _Tie.apply(results, tokens)
    back = _Exchange.apply(results.index_select(0, torch.argsort(by_expert)), anchor, received, sent, members)
    back = back.index_select(0, torch.argsort(order)).view(len(x), each, results.shape[1])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (back.to(wide) * routing_weight.to(wide)[..., None]).sum(1).to(x.dtype)


class _Exchange(torch.autograd.Function):
    """Rows (sum of `sent`, D) to the other ranks, and (sum of `received`, D) from them."""

    @staticmethod
    def forward(
        ctx: Any, t: Tensor, anchor: Tensor | None, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.arguments = sent, received, group
        return _swap(t, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        sent, received, group = ctx.arguments
        return _swap(grads[0], received, sent, group), None, None, None, None


class _Tie(torch.autograd.Function):
    """`results`, whose backward reaches `tokens` even where no expert of this rank got any."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, tokens: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = tokens.shape, tokens.dtype
        return results.view_as(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], grads[0].new_zeros(ctx.shape, dtype=ctx.dtype)


def _swap(t: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = t.new_empty(sum(received), t.shape[1])
    others = sum(n for r, n in enumerate(sent) if r != dist.get_rank(group))
    count(others * t.shape[1] * t.element_size(), len(sent) - 1)
    dist.all_to_all_single(out, t.contiguous(), received, sent, group=group)
    return out
