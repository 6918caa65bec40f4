"""The part of a sequence that a rank holds, and the whole of the parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._group import Group, all_gather_single, count, resolve_group
from ._layout import Placement, check_placement, places, runs, split_length


def shard_sequence(t: Tensor, *, group: Group = None, dim: int = 1, placement: Placement = "contiguous") -> Tensor:
    """This rank's part of `t` along `dim`, which every rank of the group has whole.

    The first ranks hold one token more where they do not divide evenly. Differentiable: the gradient is zero in the
    parts of other ranks.

    Args:
        group: a process group, a device mesh of one dimension, or None: the default group.
        placement: which tokens a rank holds, as in `ring_attention`.

    Raises:
        RuntimeError: there is no process group.
        ValueError: `placement` is not known.
    """
    op = "distributed.shard_sequence"
    members = resolve_group(op, group)
    check_placement(op, placement)
    lengths = split_length(t.shape[dim], dist.get_world_size(members))
    mine = [run for run in runs(lengths, placement)[dist.get_rank(members)]]
    return torch.cat([t.narrow(dim, run.at, run.length) for run in mine], dim)


def shard_positions(
    total: int, *, group: Group = None, placement: Placement = "contiguous", device: torch.device | str = "cpu"
) -> Tensor:
    """The places in a sequence of `total` tokens of those that `shard_sequence` gives this rank: (S,), int64."""
    op = "distributed.shard_positions"
    members = resolve_group(op, group)
    check_placement(op, placement)
    lengths = split_length(total, dist.get_world_size(members))
    return places(runs(lengths, placement)[dist.get_rank(members)], device)


def gather_sequence(t: Tensor, *, group: Group = None, dim: int = 1, placement: Placement = "contiguous") -> Tensor:
    """The whole sequence, in order, of the parts along `dim` that the ranks hold: the opposite of `shard_sequence`.

    Differentiable: as every rank then goes on with all of it, the gradients of its part are added up over ranks. Where
    each rank computes the same loss of the whole, divide that by the number of ranks.

    Raises:
        RuntimeError: there is no process group.
        ValueError: `placement` is not known, or the parts are not those that `shard_sequence` would make.
    """
    op = "distributed.gather_sequence"
    members = resolve_group(op, group)
    check_placement(op, placement)
    own = torch.tensor([t.shape[dim]], dtype=torch.int64, device=t.device)
    everybody = own.new_empty(dist.get_world_size(members))
    all_gather_single(everybody, own, group=members)
    lengths = everybody.tolist()
    if lengths != split_length(sum(lengths), len(lengths)):
        raise ValueError(f"bigkernels.{op}: the ranks hold {lengths} tokens, which is not how shard_sequence cuts")
    whole: Tensor = _Gather.apply(t, members, dim % t.dim(), lengths, placement)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup, dim: int, lengths: Sequence[int], placement: str) -> Any:
        ctx.arguments = group, dim, lengths, placement
        most = max(lengths)
        padded = t.new_zeros((most, *t.movedim(dim, 0).shape[1:]))
        padded[: t.shape[dim]] = t.movedim(dim, 0)
        parts = padded.new_empty((len(lengths), *padded.shape))
        count(padded.numel() * padded.element_size() * (len(lengths) - 1), len(lengths) - 1)
        all_gather_single(parts.flatten(0, 1), padded, group=group)
        whole = padded.new_empty((sum(lengths), *padded.shape[1:]))
        for held, part in zip(runs(lengths, placement), parts, strict=True):
            for run in held:
                whole[run.at : run.at + run.length] = part[run.begin : run.begin + run.length]
        return whole.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        group, dim, lengths, placement = ctx.arguments
        total = grads[0].contiguous()
        total = total.clone() if total is grads[0] else total
        count(total.numel() * total.element_size(), 1)
        dist.all_reduce(total, group=group)
        mine = runs(lengths, placement)[dist.get_rank(group)]
        return torch.cat([total.narrow(dim, run.at, run.length) for run in mine], dim), None, None, None, None
