"""Less kept for backward: recomputed, in 8 bits, or elsewhere; policies say which.

A *checkpointed segment*, a segment for short, is what a policy is applied to: a call of a function, or of a module.
"""

from .._deprecated import renamed_functions
from ._blocks import apply_checkpointing, checkpointed, remove_checkpointing
from ._checkpoint import checkpoint, saved_activations
from ._policy import Policy, fp8, int8, offload, recompute, resolve_policy, selective
from ._recompute import CheckpointError

__all__ = [
    "CheckpointError",
    "Policy",
    "apply_checkpointing",
    "checkpoint",
    "checkpointed",
    "fp8",
    "int8",
    "offload",
    "recompute",
    "remove_checkpointing",
    "resolve_policy",
    "saved_activations",
    "selective",
]

__getattr__ = renamed_functions(__name__, globals(), named="resolve_policy")
