"""LayerNorm (Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450), and the residual addition before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivatives import gradients, is_observed
from .arguments import check_same_device, check_same_dtype, check_shape, check_tensor
from .registry import REFUSED, Operator, compute_dtype, define, needs_grad


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Subtract each row's mean, divide by its standard deviation, scale and shift.

    ``y = (x - mean(x, -1)) / sqrt(var(x, -1) + eps) * weight + bias``, computed in float32 and rounded once; the
    variance is the biased one, as in `torch.nn.functional.layer_norm`.

    Args:
        x: (..., D), floating, any strides.
        weight: (D,), any floating dtype; None scales by one.
        bias: (D,), any floating dtype; None adds nothing. May be given without `weight`.
        eps: added to the variance.
        residual: (..., D) like `x`. If given, `x + residual` is normalised.

    Returns:
        The normalised tensor in `x.dtype`; with `residual` the pair (normalised, x + residual).

    Raises:
        TypeError: an argument is not a floating tensor, or `residual` has another dtype than `x`.
        ValueError: shapes or devices do not fit.
    """
    try:
        if OPERATOR.uses_kernel(x, weight, bias, residual):
            if needs_grad(x, weight, bias, residual):
                y, total = _LayerNorm.apply(x, weight, bias, residual, eps)
            elif residual is None:
                return _infer(x, weight, bias, eps)
            else:
                y, _, _, total = _fwd(x, weight, bias, residual, eps)
            return y if residual is None else (y, total)
    except REFUSED:
        _check(x, weight, bias, residual)
        raise
    _check(x, weight, bias, residual)
    return _reference(x, weight, bias, eps, residual)


def _check(x, weight, bias, residual):
    check_tensor("functional.layer_norm", "x", x)
    check_tensor("functional.layer_norm", "weight", weight, optional=True)
    check_tensor("functional.layer_norm", "bias", bias, optional=True)
    check_tensor("functional.layer_norm", "residual", residual, optional=True)
    if x.dim() == 0:
        raise ValueError("bigkernels.functional.layer_norm: x has no dimensions, expected (..., D)")
    check_same_device("functional.layer_norm", "x", x, weight=weight, bias=bias, residual=residual)
    check_same_dtype("functional.layer_norm", "x", x, residual=residual)
    check_shape("functional.layer_norm", "weight", weight, x.shape[-1:], "the last dimension of x")
    check_shape("functional.layer_norm", "bias", bias, x.shape[-1:], "the last dimension of x")
    check_shape("functional.layer_norm", "residual", residual, x.shape, "the shape of x")


def _reference(x, weight, bias, eps, residual):
    total = x if residual is None else x + residual
    wide = total.to(compute_dtype(x.dtype))
    weight = None if weight is None else weight.to(wide.dtype)
    bias = None if bias is None else bias.to(wide.dtype)
    # PyTorch has no second derivative of a bias without a weight.
    alone = weight is None and bias is not None
    y = F.layer_norm(wide, x.shape[-1:], weight, None if alone else bias, eps)
    y = (y + bias if alone else y).to(x.dtype)
    return y if residual is None else (y, total)


def _fwd_fallback(x, weight, bias, residual, eps):
    total = x if residual is None else x + residual
    wide = total.float()
    rstd = torch.rsqrt(wide.var(-1, correction=0) + eps)
    y = _reference(total, weight, bias, eps, None)
    total = x.new_empty(0) if residual is None else total.contiguous()
    return y.contiguous(), wide.mean(-1).contiguous(), rstd.contiguous(), total


def _fwd_fake(x, weight, bias, residual, eps):
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd, x.new_empty(0 if residual is None else x.shape)


def _bwd_fallback(grad, x, weight, bias, mean, rstd, grad_total):
    # dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g the gradient of the normalised row.
    wide = compute_dtype(x.dtype)
    scale = rstd.to(wide).unsqueeze(-1)
    xhat, g = (x.to(wide) - mean.to(wide).unsqueeze(-1)) * scale, grad.to(wide)
    rows = (-1, x.shape[-1])
    dweight = x.new_empty(0) if weight is None else (g * xhat).reshape(rows).sum(0).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else g.reshape(rows).sum(0).to(bias.dtype)
    if weight is not None:
        g = g * weight.to(wide)
    dx = scale * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    if grad_total is not None:
        dx = dx + grad_total.to(wide)
    return dx.to(x.dtype).contiguous(), dweight, dbias


def _bwd_fake(grad, x, weight, bias, mean, rstd, grad_total):
    dweight, dbias = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    return x.new_empty(x.shape), dweight, dbias


OPERATOR = Operator("layer_norm")
_fwd = define(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_fallback,
)
_infer = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
    lambda x, weight, bias, eps: _reference(x, weight, bias, eps, None).contiguous(),
)
_bwd = define(
    "layer_norm_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor? grad_total)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_fallback,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps):
        y, mean, rstd, total = _fwd(x, weight, bias, residual, eps)
        ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd)
        ctx.eps = eps
        ctx.fused = residual is not None
        if residual is None:
            ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def recompute_output(ctx):
        x, weight, bias, *_ = ctx.saved_tensors
        return _infer(x, weight, bias, ctx.eps)

    @staticmethod
    def backward(ctx, grad, grad_total):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if grad is None:  # only x + residual was used
            return grad_total, None, None, grad_total, None
        if is_observed(grad, grad_total):
            dx, dweight, dbias = gradients(
                lambda x, w, b: _reference(x, w, b, ctx.eps, None), (x, weight, bias), (grad,)
            )
            if ctx.fused and grad_total is not None:
                dx = grad_total if dx is None else dx + grad_total
        else:
            dx, dweight, dbias = _bwd(grad, x, weight, bias, mean, rstd, grad_total if ctx.fused else None)
        return (
            dx,
            dweight if weight is not None else None,
            dbias if bias is not None else None,
            dx if ctx.fused else None,
            None,
        )
