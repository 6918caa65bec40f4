"""Which tokens of a sequence a rank holds, and which of its queries see which keys of another rank.

A rank holds runs of neighbouring tokens: one of them ("contiguous"), or an early and a late one ("zigzag"), which under
a causal mask is as much work for every rank (Brandon et al. 2023, https://arxiv.org/abs/2311.09431).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Placement = Literal["contiguous", "zigzag"]
PLACEMENTS = ("contiguous", "zigzag")


class Run(NamedTuple):
    """Neighbouring tokens of a rank."""

    begin: int  # place of the first one among the rank's tokens
    at: int  # its place in the sequence
    length: int


def check_placement(op: str, placement: str) -> None:
    if placement not in PLACEMENTS:
        raise ValueError(f"bigkernels.{op}: placement is {placement!r}, accepted are 'contiguous' and 'zigzag'")


def split_length(total: int, ranks: int) -> list[int]:
    """How many tokens each rank holds of `total`: the first ones hold one more where they do not divide evenly."""
    return [total // ranks + (r < total % ranks) for r in range(ranks)]


def runs(lengths: Sequence[int], placement: str) -> list[list[Run]]:
    """The runs of each rank, of which rank r holds ``lengths[r]`` tokens in all."""
    if placement == "contiguous":
        starts = [0, *accumulate(lengths)]
        return [[Run(0, starts[r], n)] for r, n in enumerate(lengths)]
    early = [(n + 1) // 2 for n in lengths]
    late = [n // 2 for n in lengths]
    firsts = [0, *accumulate(early)]
    lasts = list(accumulate(reversed(late), initial=firsts[-1]))[:-1][::-1]
    return [[Run(0, firsts[r], early[r]), Run(early[r], lasts[r], late[r])] for r in range(len(lengths))]


def places(mine: Sequence[Run], device: torch.device | str) -> Tensor:
    """The place in the sequence of each token of a rank, int64."""
    return torch.cat([torch.arange(run.at, run.at + run.length, dtype=torch.int64, device=device) for run in mine])


class Block(NamedTuple):
    """Queries of one rank and keys of another, of one sequence: all that is computed in one call of a kernel.

    `q` and `k` are places among the ranks' tokens; `q_at` and `k_at` those of their first ones in the sequence, which
    begins at token `start` of all and is number `sequence`. `ends` are given where queries and keys are the same tokens
    of several packed sequences: where these end, counted from the first token, with 0 before them.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    q_at: int
    k_at: int
    start: int = 0
    sequence: int = 0
    ends: tuple[int, ...] | None = None

    @property
    def queries(self) -> int:
        return self.q[1] - self.q[0]

    @property
    def keys(self) -> int:
        return self.k[1] - self.k[0]

    def sees(self, left: int, right: int) -> tuple[int, int]:
        """The window for a kernel, which aligns the last query to the last key."""
        moved = self.keys - self.queries - (self.q_at - self.k_at)
        return left + moved if left >= 0 else -1, right - moved if right >= 0 else -1


def blocks(
    queries: Sequence[Run],
    keys: Sequence[Run],
    left: int,
    right: int,
    cu_seqlens: Sequence[int] | None,
    *,
    trim: bool = True,
    separate: bool = False,
) -> list[Block]:
    """What queries of one rank and keys of another (or the same) have to compute.

    Args:
        left, right: the window, -1 where it has no end.
        cu_seqlens: where packed sequences end, with 0 before them; None for one sequence.
        trim: leave out queries and keys that the window keeps from seeing each other.
        separate: a block a sequence, none with `ends`.
    """
    found = []
    for q in queries:
        for k in keys:
            if not q.length or not k.length:
                continue
            if cu_seqlens is None:
                block: Block | None = Block((q.begin, q.begin + q.length), (k.begin, k.begin + k.length), q.at, k.at)
            elif q.at == k.at:
                found.extend(_own(q, cu_seqlens, separate))
                continue
            else:
                block = _shared(q, k, cu_seqlens)
            if block is not None and trim:
                block = _trimmed(block, left, right)
            if block is not None:
                found.append(block)
    return found


def _own(run: Run, cu_seqlens: Sequence[int], separate: bool) -> list[Block]:
    """The packed sequences, or parts of them, that lie in one run of tokens."""
    parts = []
    for n, (begin, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        first, last = max(begin, run.at), min(end, run.at + run.length)
        if first < last:
            span = (run.begin + first - run.at, run.begin + last - run.at)
            parts.append(Block(span, span, first - begin, first - begin, begin, n))
    if separate or len(parts) < 2:
        return parts
    span = (parts[0].q[0], parts[-1].q[1])
    ends = (0, *(part.q[1] - span[0] for part in parts))
    return [parts[0]._replace(q=span, k=span, ends=ends)]


def _shared(q: Run, k: Run, cu_seqlens: Sequence[int]) -> Block | None:
    """The one sequence that has tokens in two runs, which have none in common."""
    low, high = (k.at + k.length - 1, q.at) if k.at < q.at else (q.at + q.length - 1, k.at)
    for n, (begin, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        if begin <= low and high < end:
            q0, q1 = max(q.at, begin), min(q.at + q.length, end)
            k0, k1 = max(k.at, begin), min(k.at + k.length, end)
            return Block(
                (q.begin + q0 - q.at, q.begin + q1 - q.at),
                (k.begin + k0 - k.at, k.begin + k1 - k.at),
                q0 - begin,
                k0 - begin,
                begin,
                n,
            )
    return None


def _trimmed(block: Block, left: int, right: int) -> Block | None:
    """The least queries and keys with all pairs that see each other; None where there are none."""
    shift, queries, keys = block.q_at - block.k_at, block.queries, block.keys
    q0 = max(0, -shift - right) if right >= 0 else 0
    q1 = min(queries, keys + left - shift) if left >= 0 else queries
    if q0 >= q1:
        return None
    k0 = max(0, q0 + shift - left) if left >= 0 else 0
    k1 = min(keys, q1 + shift + right) if right >= 0 else keys
    if k0 >= k1:
        return None
    return block._replace(
        q=(block.q[0] + q0, block.q[0] + q1),
        k=(block.k[0] + k0, block.k[0] + k1),
        q_at=block.q_at + q0,
        k_at=block.k_at + k0,
    )
