"""Linear layers: `torch.nn.Linear` itself, whose subclasses may compute anything."""

# mypy: ignore-errors

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import functional
from ...nn.linear import linear_by_packed, may_pay, pays
from ...ops.mlp import linear_of_activation, made_by_linear_activation
from .._rule import Fit, ModuleRule, Plan, Skip, Write
from .._verify import Probes, compare, doubled, gradients, outputs_only, plain

_ORIGINAL, _FUNCTION = nn.Linear.forward, F.linear  # whoever replaces them later is followed


def replaced() -> bool:
    """Whether somebody has put another function into the place of torch's since."""
    return nn.Linear.forward is not _ORIGINAL or F.linear is not _FUNCTION


def _fits(module: nn.Linear, x: Any) -> bool:
    if type(module) is not nn.Linear or replaced():
        return False
    weight, bias = module.weight, module.bias
    if not isinstance(x, Tensor) or not plain(x, weight) or (bias is not None and not plain(bias)):
        return False
    if x.dim() == 0 or not x.is_cpu or not weight.is_cpu or x.shape[-1] != weight.shape[-1]:
        return False
    same = x.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
    return same and (not torch.is_autocast_enabled("cpu") or x.dtype != torch.float64)


def forward(module: nn.Linear, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a linear layer's forward: the kernel where it supports the call, the layer's own elsewhere."""
    if len(args) != 1 or kwargs or not _fits(module, args[0]):
        return _behind_activation(module, *args, **kwargs)
    if made_by_linear_activation(args[0]):
        return linear_of_activation(args[0], module.weight, module.bias)
    return linear_by_packed(args[0], module.weight, module.bias)


def in_inference(module: nn.Linear, *args: Any, **kwargs: Any) -> Any:
    """The same for calls without gradients that the kernel is known to make no slower."""
    if len(args) == 1 and not kwargs and _fits(module, args[0]) and pays(args[0], module.weight, module.bias):
        return linear_by_packed(args[0], module.weight, module.bias)
    return _behind_activation(module, *args, **kwargs)


def _behind_activation(module: nn.Linear, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, but for what `linear_activation` made, which is then not kept for backward."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and made_by_linear_activation(args[0]):
        x, weight, bias = args[0], module.weight, module.bias
        lowered = torch.is_autocast_enabled("cpu") and x.dtype == torch.get_autocast_dtype("cpu")
        same = weight.dtype == x.dtype or (lowered and weight.dtype == torch.float32)
        if type(module) is nn.Linear and same and plain(weight) and weight.is_cpu and x.shape[-1] == weight.shape[-1]:
            if bias is None or (plain(bias) and bias.dtype == weight.dtype):
                return linear_of_activation(x, weight, bias)
    return type(module).forward(module, *args, **kwargs)


WRITTEN = (forward, in_inference)  # what stands for the forward of a layer that computes what its class says


def _plan(module: nn.Module, plan: Plan) -> tuple[Write, Fit] | None:
    if type(module) is not nn.Linear or replaced():
        return None
    weight, bias = module.weight, module.bias
    asked = plan.linear is True
    if not asked and not (plain(weight) and weight.is_cpu and may_pay()):
        return None
    if not plain(weight) or (bias is not None and not plain(bias)):
        raise Skip("its parameters are not plain tensors")
    if weight.is_meta or not weight.is_cpu:
        raise Skip(f"its weight is on {weight.device.type}, where PyTorch's product is as good")
    key = "linear", bias is not None, weight.dtype
    if key not in plan.memory:
        plan.memory[key] = _error(bias is not None, weight.dtype, plan.verify)
    replacement = functools.partial(forward if asked else in_inference, module)
    return Write(module, "forward", replacement), Fit("linear", plan.memory[key], inference=not asked)


def _error(bias: bool, own: torch.dtype, verify: bool) -> float:
    """The kernel against PyTorch's: what this class computes is known, so that a small layer stands for all."""
    worst = 0.0
    for dtype in {torch.float32, own, torch.bfloat16} if verify else (torch.float32,):
        for tokens, scale in ((3, 1.0), (70, 1e-3)):
            probe = Probes("cpu", dtype)
            leaves = [probe(2, tokens, 70, scale=scale), probe(50, 70), probe(50) if bias else None]
            observe = gradients if verify else outputs_only
            tried = ((functional.linear, leaves), (F.linear, leaves), (F.linear, doubled(leaves)))
            results = [observe(f, t) for f, t in tried]
            worst = max(worst, compare(*results, f"in {str(dtype).removeprefix('torch.')}"))
    return worst


RULE = ModuleRule("linear", _plan)
