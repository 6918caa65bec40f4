"""Gradients by autograd of an operator's reference: where there is no kernel, and for derivatives of gradients.

A backward kernel is no part of a graph: what it returns is a constant to autograd, and a batch of upstream gradients is
none to it. Where something looks at the operations of backward (`create_graph=True`, as gradient penalties and Hessian
products need it; `is_grads_batched`; forward-mode differentiation of a gradient), backward differentiates the reference
in its place, and is then plain PyTorch, which can be differentiated as often as one likes. Each backward asks
`is_observed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .._torch_private import forward_ad as _forward_ad
from .._torch_private import is_batched as _is_batched
from .._torch_private import transforms as _transforms

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def is_observed(*grads: Tensor | None) -> bool:
    """Inside of a backward: whether its operations will be differentiated, or are seen by a transform.

    Args:
        grads: the upstream gradients.

    The compiler differentiates what it has traced by means of its own, and refuses to do so twice.
    """
    if _is_dynamo_compiling():
        return False
    if torch.is_grad_enabled() or _transforms() is not None or _forward_ad._current_level >= 0:
        return True
    for g in grads:
        if g is not None and _is_batched(g):
            return True
    return False


def gradients(fn: Callable, tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of `fn(*tensors)` for an observed backward: differentiable by `tensors` and by `grads`.

    Args:
        fn: plain PyTorch, by which only `tensors` are differentiated; returns a tensor or a tuple.
        tensors: as they were saved, with the graph behind them.
        grads: of each output; None where it is zero.

    Returns:
        One a tensor; None where it needs no gradient.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view each: one tensor may be given twice, or be computed from another one.
        leaves = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
        return _pull(fn, leaves, grads, create_graph)


def vjp(fn: Callable, tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of `fn(*tensors)` as constants, for the backward fallbacks: None where an input is None."""
    return _pull(fn, [t if t is None else t.detach().requires_grad_() for t in tensors], grads)


def no_autocast(device: torch.device) -> AbstractContextManager:
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _pull(fn, leaves, grads, create_graph=False):
    wanted = [t is not None and t.requires_grad for t in leaves]
    inputs = [t for t, w in zip(leaves, wanted, strict=True) if w]
    if not inputs:
        return (None,) * len(leaves)
    with torch.enable_grad(), no_autocast(inputs[0].device):
        out = fn(*leaves)
        out = out if isinstance(out, (tuple, list)) else (out,)
        pairs = [(o, g) for o, g in zip(out, grads, strict=True) if g is not None and o.requires_grad]
        if not pairs:  # outputs without elements may not depend on the inputs
            return tuple(torch.zeros_like(t) if w else None for t, w in zip(leaves, wanted, strict=True))
        outputs, upstream = [o for o, _ in pairs], [g.to(o.dtype) for o, g in pairs]
        derivatives = iter(
            torch.autograd.grad(
                outputs, inputs, upstream, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        )
    return tuple(next(derivatives) if w else None for w in wanted)
