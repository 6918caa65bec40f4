"""BatchNorm (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167), the residual and the activation behind it."""

# mypy: ignore-errors

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._derivatives import gradients, is_observed
from .arguments import check_same_device, check_same_dtype, check_shape, check_tensor
from .images import (
    NAMES,
    NUMBERS,
    activate,
    arranged,
    check_images,
    empty,
    gradients_of_sums,
    has_rows,
    over,
    per_channel,
)
from .registry import REFUSED, Operator, compute_dtype, define, needs_grad


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalise each channel over the batch, scale and shift it, add a residual, and activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, computed in float32 and rounded once.
    Where the moments are those of the batch, the variance is the biased one, and the running statistics are updated as
    `torch.nn.functional.batch_norm` does it, with the unbiased one. Backward keeps `x` (behind a residual, the result
    of "relu" too), and not what lies between.

    Args:
        x: (N, C, ...), floating, contiguous or channels-last (others are copied).
        running_mean, running_var: (C,), floating. In training they are updated, where they are given; else they are the
            moments.
        weight, bias: (C,), any floating dtype, or None.
        training: whether the moments are those of the batch.
        momentum: the share of the batch in the running statistics after it.
        eps: added to the variance.
        activation: "silu", "gelu", "gelu_tanh", "relu" or None; behind a residual "relu" or None.
        residual: like `x`.

    Returns:
        A tensor of the shape, dtype and memory format of `x`.

    Raises:
        TypeError: an argument is not a floating tensor, or `residual` has another dtype than `x`.
        ValueError: shapes or devices do not fit, the activation is unknown, there are no running statistics without
            training, or one value a channel with it.
    """
    given = (x, running_mean, running_var, weight, bias, training, activation, residual)
    try:
        supported = OPERATOR.uses_kernel(x, weight, bias, residual, running_mean, running_var) and x.dim() > 1
        if supported and (residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)):
            number = NUMBERS[activation]
            moments = (None, None) if training else (running_mean, running_var)
            if (training and x.numel() <= x.shape[1]) or (not training and None in (running_mean, running_var)):
                _check(*given)
            if residual is not None and activation not in (None, "relu"):
                _check(*given)
            if needs_grad(x, weight, bias, residual):
                # Within the function, lest a checkpoint that runs it again stops behind it and before the update. The
                # compiler takes no function that writes to what it is given, and has no such stop.
                inside = training and not torch.compiler.is_compiling()
                running = (running_mean, running_var, momentum) if inside else None
                y, mean, var = _BatchNorm.apply(x, weight, bias, residual, *moments, eps, number, running)
                if running is not None:
                    return y
            else:
                rows = has_rows(x)
                other = None if residual is None else arranged(residual, rows)
                y, mean, var = _fwd(arranged(x, rows), weight, bias, other, *moments, eps, number, rows)
            if training:
                _update(running_mean, running_var, mean, var, x, momentum)
            return y
    except REFUSED:
        _check(*given)
        raise
    _check(*given)
    if training and (running_mean is not None or running_var is not None):
        with torch.no_grad():
            wide = x.to(compute_dtype(x.dtype))
            var, mean = torch.var_mean(wide, over(x), correction=0)
            _update(running_mean, running_var, mean, var, x, momentum)
    moments = (None, None) if training else (running_mean, running_var)
    return _reference(x, weight, bias, residual, *moments, eps, activation)


def _update(running_mean, running_var, mean, var, x, momentum):
    with torch.no_grad():
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
        if running_var is not None:
            count = math.prod(x.shape) // x.shape[1]
            running_var.mul_(1 - momentum).add_(var.to(running_var.dtype), alpha=momentum * count / (count - 1))


def _check(x, running_mean, running_var, weight, bias, training, activation, residual):
    check_images("functional.batch_norm", x, weight, bias, activation, 2)
    check_tensor("functional.batch_norm", "running_mean", running_mean, optional=True)
    check_tensor("functional.batch_norm", "running_var", running_var, optional=True)
    check_tensor("functional.batch_norm", "residual", residual, optional=True)
    running = {"running_mean": running_mean, "running_var": running_var}
    check_same_device("functional.batch_norm", "x", x, residual=residual, **running)
    for name, value in running.items():
        check_shape("functional.batch_norm", name, value, x.shape[1:2], "the channels of x")
    check_same_dtype("functional.batch_norm", "x", x, residual=residual)
    check_shape("functional.batch_norm", "residual", residual, x.shape, "the shape of x")
    if residual is not None and activation not in (None, "relu"):
        raise ValueError(
            f"bigkernels.functional.batch_norm: activation is {activation!r}; behind a residual are None and relu"
        )
    if not training and (running_mean is None or running_var is None):
        raise ValueError(
            "bigkernels.functional.batch_norm: without training running_mean and running_var must be given"
        )
    if training and x.numel() == x.shape[1]:
        raise ValueError(
            f"bigkernels.functional.batch_norm: x has shape {tuple(x.shape)}; "
            "in training expected more than one value a channel"
        )
    if training and x.numel() == 0:
        raise ValueError(
            f"bigkernels.functional.batch_norm: x has shape {tuple(x.shape)}; in training expected some values"
        )


def _reference(x, weight, bias, residual, mean, var, eps, activation):
    # Not by `F.batch_norm`, whose backward some transforms do not know.
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    if mean is None:
        var, mean = torch.var_mean(wide, over(x), correction=0)
    y = (wide - per_channel(mean.to(dtype), x)) * per_channel(torch.rsqrt(var.to(dtype) + eps), x)
    y = y if weight is None else y * per_channel(weight.to(dtype), x)
    y = y if bias is None else y + per_channel(bias.to(dtype), x)
    return activate(y if residual is None else y + residual.to(dtype), activation).to(x.dtype)


def _fwd_fallback(x, weight, bias, residual, mean, var, eps, activation, rows):
    y = empty(x, rows).copy_(_reference(x, weight, bias, residual, mean, var, eps, NAMES[activation]))
    if mean is not None:
        return y, x.new_empty(0), x.new_empty(0)
    if x.numel() == 0:
        return y, *(x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
    found, at = torch.var_mean(x.to(compute_dtype(x.dtype)), over(x), correction=0)
    return y, at.float(), found.float()


def _fwd_fake(x, weight, bias, residual, mean, var, eps, activation, rows):
    if mean is not None:
        return empty(x, rows), x.new_empty(0), x.new_empty(0)
    moments = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return empty(x, rows), *moments


def _bwd_fallback(grad, x, weight, bias, result, mean, var, eps, activation, rows, training, residual):
    wide = compute_dtype(x.dtype)
    means, rstds = mean.to(wide), torch.rsqrt(var.to(wide) + eps)
    g, xhat, dweight, dbias = gradients_of_sums(
        grad.to(wide), x.to(wide), means, rstds, weight, bias, activation, result
    )
    of_residual = empty(x, rows).copy_(g) if residual else x.new_empty(0)
    if weight is not None:
        g = g * per_channel(weight.to(wide), x)
    if training and x.numel():
        g = g - g.mean(over(x), keepdim=True) - xhat * (g * xhat).mean(over(x), keepdim=True)
    return empty(x, rows).copy_(g * per_channel(rstds, x)), dweight, dbias, of_residual


def _bwd_fake(grad, x, weight, bias, result, mean, var, eps, activation, rows, training, residual):
    dweight, dbias = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    return empty(x, rows), dweight, dbias, empty(x, rows) if residual else x.new_empty(0)


OPERATOR = Operator("batch_norm")
_fwd = define(
    # x is contiguous, or with rows has its channels innermost; so are the others like it, and the results. Given
    # moments are used, and then none are returned.
    "batch_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? var, float eps,"
    " int activation, bool rows) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_fallback,
)
_bwd = define(
    # `result`: of ReLU, which stands for what it was computed from. `training`: whether mean and var are those of x.
    "batch_norm_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? result, Tensor mean, Tensor var,"
    " float eps, int activation, bool rows, bool training, bool residual) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_fallback,
)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, mean, var, eps, activation, running=None):
        rows = has_rows(x)
        other = None if residual is None else arranged(residual, rows)
        training = mean is None
        y, *statistics = _fwd(arranged(x, rows), weight, bias, other, mean, var, eps, activation, rows)
        if training:
            mean, var = statistics
            if running is not None:
                _update(running[0], running[1], mean, var, x, running[2])
        elif x.requires_grad or weight is not None:
            mean, var = mean.clone(), var.clone()  # a later step in training updates them
        masked = residual is not None and activation == NUMBERS["relu"]
        ctx.save_for_backward(x, weight, bias, mean, var, y if masked else None)
        ctx.options = eps, activation, training, residual is not None
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return y, *statistics

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, bias, mean, var, result = ctx.saved_tensors
        eps, activation, training, added = ctx.options
        nothing = (None,) * 5
        if grad is None:
            return (None,) * 4 + nothing
        if is_observed(grad):
            return *_observed(grad, x, weight, bias, mean, var, result, ctx.options), *nothing
        rows = has_rows(x)
        dx, dweight, dbias, dresidual = _bwd(
            arranged(grad, rows),
            arranged(x, rows),
            weight,
            bias,
            None if result is None else arranged(result, rows),
            mean,
            var,
            eps,
            activation,
            rows,
            training,
            added and ctx.needs_input_grad[3],
        )
        dresidual = dresidual if added and ctx.needs_input_grad[3] else None
        return (dx, dweight if weight is not None else None, dbias if bias is not None else None, dresidual, *nothing)


def _observed(grad, x, weight, bias, mean, var, result, options):
    eps, activation, training, added = options
    moments = (None, None) if training else (mean, var)
    name = NAMES[activation]
    if not added:
        grads = gradients(lambda *t: _reference(*t, None, *moments, eps, name), (x, weight, bias), (grad,))
        return *grads, None
    # The slope of ReLU is a constant to every derivative, and the residual behind it has the gradient in front.
    g = grad if result is None else torch.where(result.detach() <= 0, 0.0, grad)
    grads = gradients(lambda *t: _reference(*t, None, *moments, eps, None), (x, weight, bias), (g,))
    return *grads, g
