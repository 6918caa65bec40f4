"""Scaled dot-product attention that never holds the scores (Dao et al. 2022, https://arxiv.org/abs/2205.14135)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention as shared
from . import _routes
from ._arguments import check_tensor
from ._derivatives import gradients, is_observed, vjp
from ._flops import attention_flops
from ._registry import (
    REFUSED,
    Operator,
    cpu_kernel,
    define,
    gluon_kernel,
    needs_grad,
    nondeterministic,
    torch_kernel,
    triton_kernel,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries over keys and values, as `scaled_dot_product_attention` and with more options.

    With query i aligned to position ``a = i + Sk - Sq`` (the last query to the last key)::

        s    = scale * q[i] . k[j]
        s    = softcap * tanh(s / softcap)                             where softcap is given
        s    = s + bias[i, j] - alibi_slopes[h] * |a - j|
        seen = (a - left <= j <= a + right, or j < prefix_lengths[b]) and mask[i, j]
        lse  = log(sum over seen j of exp(s) + exp(sinks[h]))
        out  = sum over seen j of exp(s - lse) * v[j]

    A query that sees no key gives zeros and gets no gradient. Everything is accumulated in float32.

    Args:
        q: (B, H, Sq, D), floating, any strides.
        k: (B, Hk, Sk, D), the dtype of `q`, with H a multiple of Hk: query head h reads head ``h // (H // Hk)``.
        v: (B, Hk, Sk, Dv), the dtype of `q`.
        causal: no query sees keys after its own position: ``right`` becomes 0.
        scale: of the scores; 1 / sqrt(D) by default.
        window: (left, right), how many keys before and after its position a query sees; -1 is unlimited.
        softcap: positive; bounds the scores (Gemma 2, https://arxiv.org/abs/2408.00118).
        bias: floating, broadcastable to (B, H, Sq, Sk): added to the scores; -inf hides a key. Differentiable.
        mask: boolean, broadcastable to (B, H, Sq, Sk): True lets a key be seen.
        alibi_slopes: (H,), floating (Press et al. 2022, https://arxiv.org/abs/2108.12409).
        sinks: (H,), floating: one more logit a head, that takes weight and gives no value (gpt-oss). Differentiable.
        prefix_lengths: (B,), int32 or int64: so many first keys are seen by every query (prefix language models).
        dropout_p: in [0, 1): the chance that a weight is dropped; the others are divided by ``1 - dropout_p``. The mask
            is a function of a seed drawn from torch's generator and of the element's place.
        return_lse: also return lse, (B, H, Sq) in float32 (float64 for float64), -inf where nothing is seen;
            differentiable, not affected by dropout.

    Returns:
        out (B, H, Sq, Dv) in the dtype of `q`, with heads inside of tokens in memory where `q` has them so; or
        (out, lse). Inside autocast q, k and v are cast to its dtype first.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or option values do not fit.
    """
    try:
        q, k, v = shared.lowered(q, k, v)
        options = shared.options("functional.attention", q.shape[-1], causal, scale, window, softcap, dropout_p)
        if bias is not None and bias.dim() != 4:
            bias = _four(bias)
        if mask is not None and mask.dim() != 4:
            mask = _four(mask)
        tensors = (bias, mask, alibi_slopes, sinks, prefix_lengths)
        if OPERATOR.uses_kernel(q, k, v, *tensors) and not needs_grad(alibi_slopes):
            if not return_lse:
                results = _by_torch(q, k, v, *tensors, *options)
                if results is not None:
                    return results
            grad = needs_grad(q, k, v, bias, sinks)
            prefix_lengths = shared.integers(prefix_lengths, grad)
            args = (q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, shared.draw_seed(q, dropout_p), *options)
            if grad:
                results = _Attention.apply(*args)
            elif return_lse:
                results = _fwd(*args)
            else:
                return _infer(*args)
            return results if return_lse else results[0]
    except REFUSED:
        _check(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths)
        raise
    _check(q, k, v, *tensors)
    out, lse = _dense(q, k, v, *tensors, shared.draw_seed(q, dropout_p), *options)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _by_torch(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, left, right, scale, softcap, dropout_p):
    """The result of PyTorch's kernels, where the table of routes sends the call there."""
    if _routes.capability_of(q) is None:
        return None
    tensors = (bias, alibi_slopes, sinks, prefix_lengths)
    # Our mask of dropout is a function of a seed and a place, theirs is not.
    others = softcap > 0 or dropout_p > 0 or any(t is not None for t in tensors)
    return _routes.by_torch(q, k, v, left=left, right=right, scale=scale, masked=mask is not None, others=others,
                            deterministic=not nondeterministic())  # fmt: skip


def _four(t):
    """(..., Sq, Sk) as four dimensions, the missing ones of size 1; more are left to the check."""
    return t.reshape((1,) * (4 - t.dim()) + tuple(t.shape)) if t.dim() < 4 else t


def _check(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths):
    op = "functional.attention"
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, value)
        if value.dim() != 4:
            raise ValueError(f"bigkernels.{op}: {name} has shape {tuple(value.shape)}, expected (B, H, S, D)")
    check_tensor(op, "bias", bias, optional=True)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"bigkernels.{op}: mask is {given}; accepted is torch.bool (additive masks go to bias)")
    shared.check_heads(op, q, k, v, 1, bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks,
                       prefix_lengths=prefix_lengths)  # fmt: skip
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"bigkernels.{op}: k has a batch of {k.shape[0]} and q of {q.shape[0]}")
    scores = (*q.shape[:3], k.shape[2])
    for name, value in (("bias", bias), ("mask", mask)):
        if value is not None and not _broadcasts(value.shape, scores):
            raise ValueError(f"bigkernels.{op}: {name} has shape {tuple(value.shape)}, which does not broadcast to "
                             f"(B, H, Sq, Sk) = {scores}")  # fmt: skip
    shared.check_vectors(op, q.shape[1], alibi_slopes=alibi_slopes, sinks=sinks)
    shared.check_integers(op, "prefix_lengths", prefix_lengths, (q.shape[0],), optional=True)


def _broadcasts(shape, to):
    return len(shape) <= 4 and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _dense(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, seed, left, right, scale, softcap, dropout_p):
    keep = None
    if dropout_p:
        batches = torch.arange(q.shape[0], device=q.device, dtype=torch.int64)
        keep = shared.keep_mask(seed, batches, q.shape[1], q.shape[2], k.shape[2], dropout_p)
    return shared.attend(
        q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, keep, left, right, scale, softcap, dropout_p
    )


def _fwd_fallback(q, k, v, *rest):
    out, lse = _dense(q, k, v, *rest)
    return shared.like(q, v.shape[-1]).copy_(out), lse.float().contiguous()


def _fwd_fake(q, k, v, *rest):
    return shared.like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _bwd_fallback(grad, grad_lse, q, k, v, out, lse, bias, mask, alibi_slopes, sinks, prefix_lengths, seed, *options):
    *options, bias_grad = options

    def call(q, k, v, leaf, sinks):
        used = bias if leaf is None else leaf
        return _dense(q, k, v, used, mask, alibi_slopes, sinks, prefix_lengths, seed, *options)

    leaves = (q, k, v, bias if bias_grad else None, sinks)
    dq, dk, dv, dbias, dsinks = vjp(call, leaves, (grad, grad_lse))
    grads = tuple(shared.like(t, t.shape[-1]).copy_(d) for t, d in ((q, dq), (k, dk), (v, dv)))
    return *grads, *(q.new_empty(0) if d is None else d.contiguous() for d in (dbias, dsinks))


def _bwd_fake(grad, grad_lse, q, k, v, out, lse, bias, mask, alibi_slopes, sinks, *rest):
    grads = tuple(shared.like(t, t.shape[-1]) for t in (q, k, v))
    wanted = (bias if rest[-1] else None, sinks)
    return *grads, *(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in wanted)


def _flops(q, k, v, *_, backward=False):
    return attention_flops(q, v, q.shape[0] * q.shape[2] * k.shape[2], q.shape[1], backward=backward)


# A compiler would hold all scores to fuse the reference, so graphs hold the kernels.
OPERATOR = Operator(
    "attention", implementations=(cpu_kernel(), triton_kernel(), gluon_kernel(), torch_kernel()), in_graphs=True
)
_ARGS = (
    "Tensor q, Tensor k, Tensor v, {}Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks,"
    f" Tensor? prefix_lengths, Tensor? seed, {shared.OPTIONS}"
)
_fwd = define(f"attention_fwd({_ARGS.format('')}) -> (Tensor, Tensor)", _fwd_fake, _fwd_fallback, _flops)
_infer = define(
    f"attention({_ARGS.format('')}) -> Tensor", lambda *a: _fwd_fake(*a)[0], lambda *a: _fwd_fallback(*a)[0], _flops
)
_bwd = define(
    f"attention_bwd(Tensor grad, Tensor? grad_lse, {_ARGS.format('Tensor out, Tensor lse, ')}, bool bias_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake, _bwd_fallback, lambda grad, grad_lse, *rest: _flops(*rest, backward=True),
)  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, seed, *options):
        out, lse = _fwd(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, seed, *options)
        ctx.save_for_backward(q, k, v, out, lse, bias, mask, alibi_slopes, sinks, prefix_lengths, seed)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        q, k, v, out, lse, bias, *rest = ctx.saved_tensors
        if is_observed(grad, grad_lse):
            mask, alibi_slopes, sinks, *others = rest

            def call(q, k, v, bias, sinks):
                return _dense(q, k, v, bias, mask, alibi_slopes, sinks, *others, *ctx.options)

            dq, dk, dv, dbias, dsinks = gradients(call, (q, k, v, bias, sinks), (grad, grad_lse))
            return dq, dk, dv, dbias, None, None, dsinks, *[None] * 7
        if grad is None:
            grad = torch.zeros_like(out)
        bias_grad = bias is not None and ctx.needs_input_grad[3]
        dq, dk, dv, dbias, dsinks = _bwd(grad, grad_lse, q, k, v, out, lse, bias, *rest, *ctx.options, bias_grad)
        return (dq, dk, dv, dbias if bias_grad else None, None, None, dsinks if rest[2] is not None else None,
                *[None] * 7)  # fmt: skip
