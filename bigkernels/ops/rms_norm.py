"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), and the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._derivatives import gradients, is_observed
from .arguments import check_same_device, check_same_dtype, check_shape, check_tensor
from .registry import REFUSED, Operator, compute_dtype, define, needs_grad


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Divide each row of `x` by its root mean square and scale it.

    ``y = x / sqrt(mean(x^2, -1) + eps) * (weight + offset)``, computed in float32 and rounded once.

    Args:
        x: (..., D), floating, any strides.
        weight: (D,), any floating dtype; None scales by one, and `offset` then means nothing.
        eps: added to the mean square.
        offset: added to the weight; 1.0 for Gemma, whose checkpoints store weight - 1.
        residual: (..., D) like `x`. If given, `x + residual` is normalised.

    Returns:
        The normalised tensor in `x.dtype`; with `residual` the pair (normalised, x + residual).

    Raises:
        TypeError: `x`, `weight` or `residual` is not a floating tensor, or `residual` has another dtype than `x`.
        ValueError: shapes or devices do not fit.
    """
    try:
        if OPERATOR.uses_kernel(x, weight, residual):
            if needs_grad(x, weight, residual):
                y, total = _RMSNorm.apply(x, weight, residual, eps, offset)
            elif residual is None:
                return _infer(x, weight, eps, offset)
            else:
                y, _, total = _fwd(x, weight, residual, eps, offset)
            return y if residual is None else (y, total)
    except REFUSED:
        _check(x, weight, residual)
        raise
    _check(x, weight, residual)
    return _reference(x, weight, eps, offset, residual)


def _check(x, weight, residual):
    check_tensor("functional.rms_norm", "x", x)
    check_tensor("functional.rms_norm", "weight", weight, optional=True)
    check_tensor("functional.rms_norm", "residual", residual, optional=True)
    if x.dim() == 0:
        raise ValueError("bigkernels.functional.rms_norm: x has no dimensions, expected (..., D)")
    check_same_device("functional.rms_norm", "x", x, weight=weight, residual=residual)
    check_same_dtype("functional.rms_norm", "x", x, residual=residual)
    check_shape("functional.rms_norm", "weight", weight, x.shape[-1:], "the last dimension of x")
    check_shape("functional.rms_norm", "residual", residual, x.shape, "the shape of x")


def _reference(x, weight, eps, offset, residual):
    total = x if residual is None else x + residual
    wide = total.to(compute_dtype(x.dtype))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + offset)
    y = y.to(x.dtype)
    return y if residual is None else (y, total)


def _fwd_fallback(x, weight, residual, eps, offset):
    total = x if residual is None else x + residual
    rstd = torch.rsqrt(total.float().square().mean(-1) + eps)
    y = _reference(total, weight, eps, offset, None)
    return y.contiguous(), rstd.contiguous(), x.new_empty(0) if residual is None else total.contiguous()


def _fwd_fake(x, weight, residual, eps, offset):
    contiguous = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return contiguous, rstd, x.new_empty(0 if residual is None else x.shape)


def _bwd_fallback(grad, x, weight, rstd, grad_total, offset):
    # With rstd given, dx = rstd * (g - xhat * mean(g * xhat)), g the gradient of the normalised row.
    wide = compute_dtype(x.dtype)
    scale = rstd.to(wide).unsqueeze(-1)
    xhat, g = x.to(wide) * scale, grad.to(wide)
    dweight = x.new_empty(0)
    if weight is not None:
        dweight = (g * xhat).flatten(0, -2).sum(0).to(weight.dtype) if x.dim() > 1 else (g * xhat).to(weight.dtype)
        g = g * (weight.to(wide) + offset)
    dx = scale * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    if grad_total is not None:
        dx = dx + grad_total.to(wide)
    return dx.to(x.dtype).contiguous(), dweight


def _bwd_fake(grad, x, weight, rstd, grad_total, offset):
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else torch.empty_like(weight)


OPERATOR = Operator("rms_norm")
_fwd = define(
    "rms_norm_fwd(Tensor x, Tensor? weight, Tensor? residual, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_fallback,
)
_infer = define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
    lambda x, weight, eps, offset: _reference(x, weight, eps, offset, None).contiguous(),
)
_bwd = define(
    "rms_norm_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, Tensor? grad_total, float offset)"
    " -> (Tensor, Tensor)",
    _bwd_fake,
    _bwd_fallback,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps, offset):
        y, rstd, total = _fwd(x, weight, residual, eps, offset)
        ctx.save_for_backward(x if residual is None else total, weight, rstd)
        ctx.eps, ctx.offset = eps, offset
        ctx.fused = residual is not None
        if residual is None:
            ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def recompute_output(ctx):
        x, weight, _ = ctx.saved_tensors
        return _infer(x, weight, ctx.eps, ctx.offset)

    @staticmethod
    def backward(ctx, grad, grad_total):
        x, weight, rstd = ctx.saved_tensors
        if grad is None:  # only x + residual was used
            return grad_total, None, grad_total, None, None
        if is_observed(grad, grad_total):
            dx, dweight = gradients(lambda x, w: _reference(x, w, ctx.eps, ctx.offset, None), (x, weight), (grad,))
            if ctx.fused and grad_total is not None:
                dx = grad_total if dx is None else dx + grad_total
        else:
            dx, dweight = _bwd(grad, x, weight, rstd, grad_total if ctx.fused else None, ctx.offset)
        return dx, dweight if weight is not None else None, dx if ctx.fused else None, None, None
