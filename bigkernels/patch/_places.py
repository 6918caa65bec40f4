"""Whether a parameter stays where it is between forward and the end of backward."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def stays(module: nn.Module, weight: Any) -> bool:
    """Whether `weight` of `module` can be read again after the forward pass.

    A view or a result of something else is made for one pass (FSDP with flat parameters, replicas); `fully_shard` frees
    the memory of a parameter and fills it again behind its version counter.
    """
    if not isinstance(weight, Tensor):
        return True
    return weight.is_leaf and not weight._is_view() and not _sharded(module)


def _sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` holds a module that contains this one."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = getattr(fsdp, "FSDPModule", None)
    if cls is None or not cls.__subclasses__():
        return False
    # Which modules there are, torch keeps to itself: where its table is missing, all are taken to be sharded.
    table = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None)
    if table is None:
        return True
    return any(isinstance(m, cls) and any(child is module for child in m.modules()) for m in list(table))
