"""Neighbours in an `nn.Sequential`: a norm of images and the activation behind it, a convolution and the BatchNorm."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .._own import Known
from .._rule import Fit, ModuleRule, Plan, Skip, Write
from .conv_norm import before_norm, folds
from .image_norm import KEY, activation_name, error_of, is_patched, name_of, normed
from .mlp import is_pointwise

_SEQUENTIAL = nn.Sequential.forward


def sequence(module: nn.Sequential, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of the forward of `nn.Sequential`."""
    if len(args) != 1 or kwargs or type(module).forward is not _SEQUENTIAL:
        return type(module).forward(module, *args, **kwargs)
    (x,) = args
    layers = list(module._modules.values())
    at = 0
    while at < len(layers):
        if at + 1 < len(layers) and is_patched(layers[at]) and name_of(layers[at + 1]) is not None:
            x = normed(layers[at + 1], layers[at], x)
            at += 2
        elif at + 1 < len(layers) and type(layers[at]) is nn.Conv2d:
            x = before_norm(layers[at], layers[at + 1], x, layers[at + 2] if at + 2 < len(layers) else None)
            at += 1
        else:
            x = layers[at](x)
            at += 1
    return x


def _plan_sequence(module: nn.Module, plan: Plan) -> tuple[Write, Fit] | None:
    if not isinstance(module, nn.Sequential) or type(module).forward is not _SEQUENTIAL:
        return None
    layers = list(module._modules.values())
    extra, names, error, folded = [], [], 0.0, None
    for norm, act in zip(layers, layers[1:], strict=False):
        folded = folds(norm, act, plan) or folded
        own = error_of(norm, plan) if isinstance(norm, nn.Module) else None
        if own is None or not isinstance(act, nn.Module) or not is_pointwise(act):
            continue
        try:
            name, by_act = activation_name(act, None, plan)
        except Skip:
            continue
        extra.append(Write(act, KEY, Known(act, name)))
        names.append(f"{'group_norm' if type(norm) is nn.GroupNorm else 'batch_norm'} + {name}")
        error = max(error, own, by_act)
    if not names and folded is None:
        return None
    write = Write(module, "forward", functools.partial(sequence, module))
    if folded is not None and not names:
        return write, folded
    return write, Fit(", ".join(sorted(set(names))), error, tuple(extra))


RULE = ModuleRule("norm", _plan_sequence)
