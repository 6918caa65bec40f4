"""Less kept for backward: recomputed, in 8 bits, or elsewhere; policies say which."""

from ._blocks import apply_checkpointing, remove_checkpointing
from ._checkpoint import checkpoint, saved_activations
from ._policy import Policy, fp8, int8, named, offload, recompute, selective
from ._recompute import CheckpointError

__all__ = [
    "CheckpointError",
    "Policy",
    "apply_checkpointing",
    "checkpoint",
    "fp8",
    "int8",
    "named",
    "offload",
    "recompute",
    "remove_checkpointing",
    "saved_activations",
    "selective",
]
