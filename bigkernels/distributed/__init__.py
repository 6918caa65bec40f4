"""Sequences, experts and sums over several processes, under `torch.distributed`.

Importing this registers the backend "shared_memory".
"""

from __future__ import annotations

from ._all_to_all import all_to_all_attention
from ._checkpoint import load_checkpoint, save_checkpoint
from ._compress import Int8Gradients, int8_gradients_hook
from ._context import ContextParallel, context_parallel
from ._experts import expert_parallel, local_experts
from ._group import Traffic, count_traffic
from ._ring import ring_attention
from ._shards import gather_sequence, shard_positions, shard_sequence
from ._shared_memory import SharedMemoryGroup, register_backend

__all__ = [
    "ContextParallel",
    "Int8Gradients",
    "SharedMemoryGroup",
    "Traffic",
    "all_to_all_attention",
    "context_parallel",
    "count_traffic",
    "expert_parallel",
    "gather_sequence",
    "int8_gradients_hook",
    "load_checkpoint",
    "local_experts",
    "ring_attention",
    "save_checkpoint",
    "shard_positions",
    "shard_sequence",
]

register_backend()
