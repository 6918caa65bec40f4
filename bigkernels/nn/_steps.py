"""Steps that count as writes: torch's fused optimizers, ours and others update a parameter's memory without saying so,
and a copy made of the parameter before would go on being read.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


@functools.cache
def count_steps() -> None:
    """From now on each step of an optimizer counts as a write to the parameters that have a gradient."""
    register_optimizer_step_post_hook(_count)


def _count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    # Those without a gradient were not stepped, and a graph that has saved one may still be waiting for its backward.
    parameters = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    plain = [p for p in parameters if type(p) in (Tensor, Parameter) and not p.is_inference()]
    torch.autograd.graph.increment_version(plain)
