"""Sequences, experts and sums over several processes, under `torch.distributed`."""

from __future__ import annotations

from ._all_to_all import all_to_all_attention
from ._context import ContextParallel, context_parallel
from ._group import Traffic, count_traffic
from ._ring import ring_attention
from ._shards import gather_sequence, shard_positions, shard_sequence

__all__ = [
    "ContextParallel",
    "Traffic",
    "all_to_all_attention",
    "context_parallel",
    "count_traffic",
    "gather_sequence",
    "ring_attention",
    "shard_positions",
    "shard_sequence",
]
