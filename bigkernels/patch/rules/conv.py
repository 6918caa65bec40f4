"""Convolutions in inference, once `bigkernels.pack` has declared that their weights are not written."""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import Tensor, nn

from ...nn._conv import packed_conv2d, packs
from ...nn.linear import forget_packed, packed_copies
from ...ops.registry import needs_grad
from .._rule import Fit, ModuleRule, Plan, Write
from .._verify import plain


def in_inference(module: nn.Conv2d, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a convolution's forward: oneDNN with packed weights where they were declared."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        copies = packed_copies(module.weight)
        if copies is not None and needs_grad(args[0], module.weight, module.bias):
            forget_packed(module.weight)
        elif copies is not None and plain(args[0], module.weight) and packs(module):
            y = packed_conv2d(module, args[0], copies)
            if y is not None:
                return y
    return type(module).forward(module, *args, **kwargs)


def is_patched(conv: Any) -> bool:
    """Whether a module is a convolution whose forward is this rule's."""
    own = conv.__dict__.get("forward") if type(conv) is nn.Conv2d else None
    return type(own) is functools.partial and own.func is in_inference and own.args[0] is conv


def _plan(module: nn.Module, plan: Plan) -> tuple[Write, Fit] | None:
    if not packs(module) or not plain(cast(Tensor, module.weight)) or not module.weight.is_cpu:
        return None
    forward = functools.partial(in_inference, cast(nn.Conv2d, module))
    return Write(module, "forward", forward), Fit("conv2d (packed)", inference=True)


RULE = ModuleRule("linear", _plan)
