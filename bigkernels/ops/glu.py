"""Gated linear units (Shazeer 2020, https://arxiv.org/abs/2002.05202): the activation and the product in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ._derivatives import gradients, is_observed, vjp
from .activations import ACTIVATIONS
from .activations import NAMES as _NAMES
from .activations import NUMBERS as _NUMBERS
from .arguments import check_same_device, check_same_dtype, check_shape, check_tensor, promote
from .registry import REFUSED, Operator, compute_dtype, define, needs_grad


def glu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """``activation(gate) * up``, computed in float32 and rounded once.

    Args:
        gate, up: (..., N), one floating dtype; any strides (the halves of a packed projection need no copy).
        activation: "silu", "gelu" (by the error function), "gelu_tanh", "relu", "relu2" (squared), "sigmoid", "tanh",
            "quick_gelu" (``x * sigmoid(1.702 x)``) or "identity".

    Returns:
        A contiguous (..., N) tensor in the dtype of `gate`.

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ outside autocast.
        ValueError: shapes or devices differ, or the activation is unknown.
    """
    try:
        if gate.dtype != up.dtype:
            gate, up = promote(gate, up)
        if OPERATOR.uses_kernel(gate, up):
            number = _NUMBERS[activation]
            return _GLU.apply(gate, up, number) if needs_grad(gate, up) else _fwd(gate, up, number)
    except REFUSED:
        _check(gate, up, activation)
        raise
    _check(gate, up, activation)
    return _reference(gate, up, activation)


def _check(gate, up, activation):
    check_tensor("functional.glu", "gate", gate)
    check_tensor("functional.glu", "up", up)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"bigkernels.functional.glu: activation is {activation!r}; accepted are {', '.join(ACTIVATIONS)}"
        )
    check_same_device("functional.glu", "gate", gate, up=up)
    check_same_dtype("functional.glu", "gate", gate, up=up)
    check_shape("functional.glu", "up", up, gate.shape, "the shape of gate")


def _reference(gate, up, activation):
    wide = compute_dtype(gate.dtype)
    return (ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(gate.dtype)


def _fwd_fallback(gate, up, activation):
    return _reference(gate, up, _NAMES[activation]).contiguous()


def _bwd_fallback(grad, gate, up, activation):
    wide = compute_dtype(gate.dtype)
    d_gate, d_up = vjp(lambda g, u: _reference(g, u, _NAMES[activation]), (gate.to(wide), up.to(wide)), (grad,))
    return d_gate.to(gate.dtype).contiguous(), d_up.to(gate.dtype).contiguous()


def _fwd_fake(gate, up, activation):
    return gate.new_empty(gate.shape)


def _bwd_fake(grad, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


OPERATOR = Operator("glu")
_fwd = define("glu_fwd(Tensor gate, Tensor up, int activation) -> Tensor", _fwd_fake, _fwd_fallback)
_bwd = define(
    "glu_bwd(Tensor grad, Tensor gate, Tensor up, int activation) -> (Tensor, Tensor)", _bwd_fake, _bwd_fallback
)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _fwd(gate, up, activation)

    @staticmethod
    def recompute_output(ctx):
        return _fwd(*ctx.saved_tensors, ctx.activation)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if is_observed(grad):
            return *gradients(lambda g, u: _reference(g, u, _NAMES[ctx.activation]), (gate, up), (grad,)), None
        return *_bwd(grad, gate, up, ctx.activation), None
