"""MLPs without a gate: linear, activation, linear. Backward keeps the first product, and its activation not."""

# mypy: ignore-errors

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch_private import surrounding_hooks
from ._derivatives import gradients, is_observed, no_autocast, vjp
from .activations import ACTIVATIONS
from .activations import NAMES as _NAMES
from .activations import NUMBERS as _NUMBERS
from .arguments import autocast_dtype, check_same_device, check_same_dtype, check_tensor
from .linear import _bwd as _linear_bwd
from .linear import _fwd as _linear_fwd
from .linear import _reads, _rows, sum_rows
from .registry import REFUSED, Operator, compute_dtype, define, needs_grad

_FEW = 4  # tokens up to which our product of float32 is the faster one


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """``activation(x @ weight1.T + bias1) @ weight2.T + bias2``, the MLP of encoders and of GPT-2.

    The activation is made where the first product is written. Backward keeps `x` and the first product, and makes the
    activation again where it multiplies the gradient with the activation's slope: of hidden layers of 4 D it keeps
    5 D a token where PyTorch keeps 9 D. Inside autocast `x` is cast; weights are read as they are.

    Args:
        x: (..., K), floating, any strides.
        weight1, bias1: (N, K) and (N,) or None, of the dtype of `x`.
        weight2, bias2: (M, N) and (M,) or None, of the dtype of `x`.
        activation: "gelu" (by the error function), "gelu_tanh", "quick_gelu" (``x * sigmoid(1.702 x)``), "relu",
            "relu2" (squared), "silu", "sigmoid", "tanh" or "identity".

    Returns:
        (..., M), contiguous, in the dtype of `x`.

    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ outside of autocast.
        ValueError: shapes or devices do not fit, or the activation is unknown.
    """
    lowered, tensors = None, (x, weight1, bias1, weight2, bias2)
    try:
        lowered = autocast_dtype(x.device)
        given, x = x, x if lowered is None or x.dtype == torch.float64 else x.to(lowered)
        tensors = (x, weight1, bias1, weight2, bias2)
        if OPERATOR.uses_kernel(*tensors) and all(
            w.dtype == x.dtype or _reads(x, w, lowered) for w in (weight1, weight2)
        ):
            with no_autocast(x.device):
                number = _NUMBERS[activation]
                if needs_grad(given, *tensors):
                    return _MLP.apply(*tensors, number)
                a, _ = _hidden(x, weight1, bias1, number, False)
                return _product(a, weight2, bias2)
    except REFUSED:
        _check(*tensors, activation, lowered)
        raise
    _check(*tensors, activation, lowered)
    return _reference(*tensors, activation)


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str = "gelu") -> Tensor:
    """``activation(x @ weight.T + bias)``: the first half of `mlp`, with its arguments and errors.

    What backward keeps is the product, for `linear_of_activation` too, which takes the result.
    """
    lowered = autocast_dtype(x.device)
    x = x if lowered is None or x.dtype == torch.float64 else x.to(lowered)
    reads = weight.dtype == x.dtype or _reads(x, weight, lowered)
    if OPERATOR.uses_kernel(x, weight, bias) and reads:
        with no_autocast(x.device):
            number = _NUMBERS[activation]
            if needs_grad(x, weight, bias):
                return _Hidden.apply(x, weight, bias, number)
            return _hidden(x, weight, bias, number, False)[0]
    _check(x, weight, bias, None, None, activation, lowered, half=True)
    return _half(x, weight, bias, activation)


def made_by_linear_activation(a: Tensor) -> bool:
    """Whether a tensor is what `linear_activation` gave for backward, unwritten since, so that `linear_of_activation`
    may take it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    # With hooks around them saved tensors are something else, which is not asked for before backward.
    return isinstance(a.grad_fn, _Hidden._backward_cls) and a._version == 0 and surrounding_hooks(False) is None


def linear_of_activation(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``a @ weight.T + bias`` for a tensor that `linear_activation` made: it is not kept for backward, which makes it
    again.
    """
    with no_autocast(a.device):
        node = a.grad_fn
        x, weight1, before, bias1 = node.saved_tensors
        return _LinearOfHidden.apply(a, weight, bias, before, x, weight1, bias1, node.activation)


def _check(x, weight1, bias1, weight2, bias2, activation, lowered, half=False):
    check_tensor("functional.mlp", "x", x)
    check_tensor("functional.mlp", "weight1", weight1)
    check_tensor("functional.mlp", "bias1", bias1, optional=True)
    check_tensor("functional.mlp", "weight2", weight2, optional=half)
    check_tensor("functional.mlp", "bias2", bias2, optional=True)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"bigkernels.functional.mlp: activation is {activation!r}; accepted are {', '.join(ACTIVATIONS)}"
        )
    width, names = (x.shape[-1] if x.dim() else None), ("x", "the rows of weight1")
    for number, (weight, bias) in enumerate(((weight1, bias1), (weight2, bias2)), 1):
        if weight is None:
            continue
        if weight.dim() != 2:
            raise ValueError(
                f"bigkernels.functional.mlp: weight{number} has shape {tuple(weight.shape)}, expected (N, K)"
            )
        rows, columns = weight.shape
        if width != columns:
            shape = tuple(weight.shape)
            raise ValueError(
                f"bigkernels.functional.mlp: weight{number} has shape {shape}, expected (N, {width}), "
                f"by {names[number - 1]}"
            )
        if bias is not None and bias.shape != (rows,):
            raise ValueError(
                f"bigkernels.functional.mlp: bias{number} has shape {tuple(bias.shape)}, expected ({rows},)"
            )
        width = rows
    if lowered is None:
        check_same_dtype("functional.mlp", "x", x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    check_same_device("functional.mlp", "x", x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)


def _half(x, weight, bias, activation):
    wide = compute_dtype(x.dtype)
    before = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return ACTIVATIONS[activation](before.to(wide)).to(x.dtype)


def _reference(x, weight1, bias1, weight2, bias2, activation):
    a = _half(x, weight1, bias1, activation)
    return F.linear(a, weight2.to(x.dtype), None if bias2 is None else bias2.to(x.dtype))


def _multiplies(x, count):
    """Whether products with `x` (count tokens) are ours, which have a pass over their results, or PyTorch's: of float32
    its own are the faster ones, and on GPUs.
    """
    if not x.is_cpu or OPERATOR.choose(x) != "cpu":
        return False
    return x.dtype != torch.float32 or count <= _FEW


def _tokens(x):
    return math.prod(x.shape[:-1])


def _plain(x, weight, bias):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _hidden(x, weight, bias, activation, keep):
    """The activation of the first product, and that product where it is kept."""
    if _multiplies(x, _tokens(x)):
        return _fwd(x, weight, bias, activation, keep)
    before = _plain(x, weight, bias)
    return _fwd(before, None, None, activation, False)[0], before


def _product(a, weight, bias):
    return _linear_fwd(a, weight, bias, None) if _multiplies(a, _tokens(a)) else _plain(a, weight, bias)


def _through(grad, weight, before, activation, again):
    """The gradient of the first product from that of the output, and the activation where it is wanted."""
    if _multiplies(grad, 0 if weight.dtype != grad.dtype else _tokens(grad)):
        return _bwd(grad, weight, before, activation, again)
    return _bwd(grad @ weight.to(grad.dtype), None, before, activation, again)


def _gradients_of_product(grad, x, weight, of_x, of_weight):
    """Those of the input and the weight of one product; None where they are not wanted."""
    if not of_x and not of_weight:
        return None, None
    if _multiplies(grad, _tokens(grad)):
        dx, dw = _linear_bwd(grad, x if of_weight else None, weight, of_x)
        return (dx if of_x else None), (dw if of_weight else None)
    dx = grad @ weight.to(grad.dtype) if of_x else None
    return dx, (_rows(grad).T @ _rows(x)).to(weight.dtype) if of_weight else None


def _fwd_fallback(x, weight, bias, activation, keep):
    if weight is None:
        wide = compute_dtype(x.dtype)
        return ACTIVATIONS[_NAMES[activation]](x.to(wide)).to(x.dtype).contiguous(), x.new_empty(0)
    before = _plain(x, weight, bias)
    return _fwd_fallback(before, None, None, activation, False)[0], before.contiguous() if keep else x.new_empty(0)


def _bwd_fallback(grad, weight, before, activation, again):
    wide = compute_dtype(before.dtype)
    name = _NAMES[activation]
    if weight is not None:
        grad = grad.to(wide) @ weight.to(grad.dtype).to(wide)
    (out,) = vjp(lambda h: ACTIVATIONS[name](h), (before.to(wide),), (grad.to(wide),))
    value = ACTIVATIONS[name](before.to(wide)).to(before.dtype).contiguous() if again else before.new_empty(0)
    return out.to(before.dtype).contiguous(), value


def _fwd_fake(x, weight, bias, activation, keep):
    if weight is None:
        return x.new_empty(x.shape), x.new_empty(0)
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


def _bwd_fake(grad, weight, before, activation, again):
    return before.new_empty(before.shape), before.new_empty(before.shape if again else 0)


OPERATOR = Operator("mlp")
_fwd = define(
    # Without a weight, x is the first product already.
    "mlp_fwd(Tensor x, Tensor? weight, Tensor? bias, int activation, bool keep) -> (Tensor, Tensor)",
    _fwd_fake,
    _fwd_fallback,
    lambda x, weight, *_: 0 if weight is None else 2 * x.numel() * weight.shape[0],
)
_bwd = define(
    # Without a weight, grad is the gradient of the activation already.
    "mlp_bwd(Tensor grad, Tensor? weight, Tensor before, int activation, bool again) -> (Tensor, Tensor)",
    _bwd_fake,
    _bwd_fallback,
    lambda grad, weight, *_: 0 if weight is None else 2 * grad.numel() * weight.shape[1],
)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, activation):
        trains = any(ctx.needs_input_grad[:3])
        if not trains and not ctx.needs_input_grad[3]:  # a bias alone
            a, before = _hidden(x, weight1, bias1, activation, False)[0], None
        else:
            a, before = _hidden(x, weight1, bias1, activation, True)
        ctx.activation = activation
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, before)
        return _product(a, weight2, bias2)

    @staticmethod
    def backward(ctx, grad):
        x, weight1, bias1, weight2, bias2, before = ctx.saved_tensors
        of_x, of_weight1, of_bias1, of_weight2, of_bias2, _ = ctx.needs_input_grad
        name = _NAMES[ctx.activation]
        with no_autocast(grad.device):
            if is_observed(grad):
                saved = (x, weight1, bias1, weight2, bias2)
                return *gradients(lambda *t: _reference(*t, name), saved, (grad,)), None
            dx = dw1 = db1 = dw2 = None
            db2 = sum_rows(grad, bias2.dtype) if of_bias2 else None
            if of_x or of_weight1 or of_bias1:
                inner, a = _through(grad, weight2, before, ctx.activation, of_weight2)
                if of_weight2:
                    _, dw2 = _gradients_of_product(grad, a, weight2, False, True)
                del a  # as large as what backward kept
                db1 = sum_rows(inner, bias1.dtype) if of_bias1 else None
                dx, dw1 = _gradients_of_product(inner, x, weight1, of_x, of_weight1)
            elif of_weight2:
                a, _ = _fwd(before, None, None, ctx.activation, False)
                _, dw2 = _gradients_of_product(grad, a, weight2, False, True)
            return dx, dw1, db1, dw2, db2, None


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        a, before = _hidden(x, weight, bias, activation, True)
        ctx.activation = activation
        ctx.save_for_backward(x, weight, before, bias)
        return a

    @staticmethod
    def backward(ctx, grad):
        x, weight, before, bias = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        with no_autocast(grad.device):
            if is_observed(grad):
                name = _NAMES[ctx.activation]
                return *gradients(lambda *t: _half(*t, name), (x, weight, bias), (grad,)), None
            inner, _ = _bwd(grad, None, before, ctx.activation, False)
            dx, dw = _gradients_of_product(inner, x, weight, of_x, of_weight)
            return dx, dw, sum_rows(inner, bias.dtype) if of_bias else None, None


class _LinearOfHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, weight, bias, before, x, weight1, bias1, activation):
        ctx.activation = activation
        # What made `a` is for second derivatives alone; it is kept by `a` itself.
        kept = (before, x, weight1, bias1) if ctx.needs_input_grad[1] else (None,) * 4
        ctx.save_for_backward(weight, bias, *kept)
        return _product(a, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        weight, bias, before, x, weight1, bias1 = ctx.saved_tensors
        of_a, of_weight, of_bias, *_ = ctx.needs_input_grad
        nothing = (None,) * 5
        with no_autocast(grad.device):
            if is_observed(grad):
                name = _NAMES[ctx.activation]
                da = grad @ weight.to(grad.dtype) if of_a else None
                dw = db = None
                if of_weight:
                    a = _half(x, weight1, bias1, name)
                    dw = (_rows(grad).T @ _rows(a)).to(weight.dtype)
                if of_bias:
                    db = _rows(grad).sum(0).to(bias.dtype)
                return da, dw, db, *nothing
            a = _fwd(before, None, None, ctx.activation, False)[0] if of_weight else None
            da, dw = _gradients_of_product(grad, a, weight, of_a, of_weight)
            return da, dw, sum_rows(grad, bias.dtype) if of_bias else None, *nothing
