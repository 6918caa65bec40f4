"""Saved tensors that are cheap results of others that are saved too: they need not be kept at all.

Norms and gated units save their own inputs, so that what they hand on to a matrix product, which saves its input, can
be computed from them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _layer_norm(node) -> Tensor:
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    y = (x.to(mean.dtype) - mean) * rstd
    for combine, parameter in ((torch.mul, node._saved_weight), (torch.add, node._saved_bias)):
        y = y if parameter is None else combine(y, parameter)
    return y.to(x.dtype)


# Operators of one pass over memory whose nodes save all their inputs.
_ATEN: dict[str, Callable] = {
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "SiluBackward0": lambda node: torch.nn.functional.silu(node._saved_self),
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": lambda node: torch.nn.functional.gelu(node._saved_self, approximate=node._saved_approximate),
}


def recipe(t: Tensor) -> Callable[[], Tensor] | None:
    """How to compute a contiguous tensor, or the one that it is a view of, from what its node saves; or None.

    A `torch.autograd.Function` takes part by a static method `recompute_output(ctx)`: its first output from
    `ctx.saved_tensors`.
    """
    whole = t if t._base is None else t._base
    node = whole.grad_fn
    if node is None or not whole.is_contiguous() or whole.numel() != t.numel() or whole.output_nr != 0:
        return None
    function = getattr(node, "_forward_cls", None)
    compute = getattr(function, "recompute_output", None) if function is not None else _ATEN.get(node.name())
    if compute is None or (function is None and not _saves_all(node)):
        return None

    def run() -> Tensor:
        with torch.no_grad():
            return compute(node).contiguous()

    return run


def _saves_all(node) -> bool:
    """An operand of a product is saved only where the other one needs a gradient."""
    return node.name() != "MulBackward0" or all(e[0] is not None for e in node.next_functions)
