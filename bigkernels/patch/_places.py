"""Whether a parameter stays where it is between forward and the end of backward."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def stays(module: nn.Module, weight: Any) -> bool:
    """Whether `weight` of `module` can be read again after the forward pass.

    A view or a result of something else is made for one pass (FSDP with flat parameters, replicas); `fully_shard` may
    free the memory of a parameter behind forward, and fill it again for backward.
    """
    if not isinstance(weight, Tensor):
        return True
    return weight.is_leaf and not weight._is_view() and not _is_freed_after_forward(module)


def is_freed(weight: Any) -> bool:
    """Whether `fully_shard` has freed the memory of a parameter."""
    return isinstance(weight, Tensor) and weight.numel() > 0 and weight.untyped_storage().nbytes() == 0


def _is_freed_after_forward(module: nn.Module) -> bool:
    """Whether `fully_shard` holds the weights of a module, and not until backward, as it does for a model's outermost
    module if not told otherwise.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = getattr(fsdp, "FSDPModule", None)
    if cls is None or not cls.__subclasses__():
        return False
    # Which modules there are, torch keeps to itself: where its table is missing, all are taken to be sharded.
    table = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None)
    if table is None:
        return True
    around = [m for m in list(table) if isinstance(m, cls) and any(child is module for child in m.modules())]
    if not around:
        return False
    innermost = min(around, key=lambda m: sum(1 for _ in m.modules()))
    # So does torch with what becomes of weights: where its names are others, they are taken to be freed.
    state = getattr(innermost, "_get_fsdp_state", lambda: None)()
    group = getattr(state, "_fsdp_param_group", None)
    return getattr(group, "_reshard_after_forward", True) is not False
