"""Scaled dot-product attention that never holds the scores (Dao et al. 2022, https://arxiv.org/abs/2205.14135)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import routes
from ._derivatives import gradients, is_observed, vjp
from ._dropout import draw_seed, keep_mask
from ._flops import attention_flops
from .arguments import autocast_dtype, check_same_device, check_same_dtype, check_tensor, own, type_name
from .registry import (
    REFUSED,
    Operator,
    compute_dtype,
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
        q, k, v = lowered(q, k, v)
        options = raw_options("functional.attention", q.shape[-1], causal, scale, window, softcap, dropout_p)
        if bias is not None and bias.dim() != 4:
            bias = _four(bias)
        if mask is not None and mask.dim() != 4:
            mask = _four(mask)
        tensors = (bias, mask, alibi_slopes, sinks, prefix_lengths)
        if OPERATOR.uses_kernel(q, k, v, *tensors) and not needs_grad(alibi_slopes):
            if not return_lse:
                result = _by_torch(q, k, v, *tensors, *options)
                if result is not None:
                    return result
            grad = needs_grad(q, k, v, bias, sinks)
            prefix_lengths = integers(prefix_lengths, grad)
            args = (q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, draw_seed(q, dropout_p), *options)
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
    out, lse = _dense(q, k, v, *tensors, draw_seed(q, dropout_p), *options)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _by_torch(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, left, right, scale, softcap, dropout_p):
    """The result of PyTorch's kernels, where the table of routes sends the call there."""
    if routes.capability_of(q) is None:
        return None
    tensors = (bias, alibi_slopes, sinks, prefix_lengths)
    # Our mask of dropout is a function of a seed and a place, theirs is not.
    others = softcap > 0 or dropout_p > 0 or any(t is not None for t in tensors)
    return routes.by_torch(
        q,
        k,
        v,
        left=left,
        right=right,
        scale=scale,
        masked=mask is not None,
        others=others,
        deterministic=not nondeterministic(),
    )


def _four(t):
    """(..., Sq, Sk) as four dimensions, the missing ones of size 1; more are left to the check."""
    return t.reshape((1,) * (4 - t.dim()) + tuple(t.shape)) if t.dim() < 4 else t


# ---- arguments, of the packed and the cached form too ----------------------------------------------------------------


# Of the raw operators. `left` and `right` are the window's ends, -1 where there is none; causal is right = 0.
OPTIONS = "int left, int right, float scale, float softcap, float dropout_p"


def raw_options(
    op: str,
    size: int,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
) -> tuple[int, int, float, float, float]:
    """The raw operators' options (left, right, scale, softcap, dropout_p) for queries of `size` elements a head."""
    left, right = (-1, -1) if window is None else _window(op, window)
    if causal:
        right = 0
    if softcap is None:
        softcap = 0.0
    elif not 0 < softcap < float("inf"):
        raise ValueError(f"bigkernels.{op}: softcap is {softcap}, expected positive or None")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"bigkernels.{op}: dropout_p is {dropout_p}, expected in [0, 1)")
    return left, right, size**-0.5 if scale is None else scale, softcap, dropout_p


_UNLIMITED = 2**30  # keys; positions plus windows stay in 32 bits, which is what the kernels of GPUs count with


def _window(op, window):
    if isinstance(window, int) or len(window) != 2 or any(not isinstance(w, int) or w < -1 for w in window):
        raise ValueError(f"bigkernels.{op}: window is {window}, expected (left, right), each -1 (unlimited) or more")
    left, right = window
    return left if left < _UNLIMITED else -1, right if right < _UNLIMITED else -1


def integers(t: Tensor | None, copy: bool) -> Tensor | None:
    """Lengths as the kernels read them, int32; a copy where a backward pass reads them again (`own`)."""
    if t is not None and t.dtype == torch.int64:
        return t.clamp(-(2**31), 2**31 - 1).int()  # what does not fit must not wrap around to what does
    return own(t) if copy else t


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inside autocast the queries, keys and values get its dtype, as in `scaled_dot_product_attention`."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def like(x: Tensor, size: int) -> Tensor:
    """An output for queries, keys or values `x`: (B, H, S, size), tokens outside of heads in memory as in `x`.

    The kernels allocate in the same way.
    """
    batch, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, length, heads, size).transpose(1, 2)
    return x.new_empty(batch, heads, length, size)


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, heads: int, **others: Tensor | None) -> None:
    """Dtypes, devices, and that dimension `heads` and the sizes of q, k and v fit; dimensions are checked by then."""
    check_same_device(op, "q", q, k=k, v=v, **others)
    check_same_dtype(op, "q", q, k=k, v=v)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"bigkernels.{op}: k has heads of {k.shape[-1]} elements and q of {q.shape[-1]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"bigkernels.{op}: v has shape {tuple(v.shape)}, expected that of k, {tuple(k.shape)}, "
            "but for the last dimension"
        )
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"bigkernels.{op}: the heads of q, k and v must have at least one element")
    if k.shape[heads] == 0 or q.shape[heads] % k.shape[heads]:
        raise ValueError(f"bigkernels.{op}: q has {q.shape[heads]} heads, not a multiple of k's {k.shape[heads]}")


def check_vectors(op: str, heads: int, **vectors: Tensor | None) -> None:
    """One floating value a query head."""
    for name, value in vectors.items():
        check_tensor(op, name, value, optional=True)
        if value is not None and tuple(value.shape) != (heads,):
            raise ValueError(
                f"bigkernels.{op}: {name} has shape {tuple(value.shape)}, expected ({heads},), one value a query head"
            )


def check_integers(op: str, name: str, value: object, shape: tuple[int, ...], *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"bigkernels.{op}: {name} is {type_name(value)}; accepted are int32 and int64 tensors")
    if tuple(value.shape) != shape:
        raise ValueError(f"bigkernels.{op}: {name} has shape {tuple(value.shape)}, expected {shape}")


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
    check_heads(
        op, q, k, v, 1, bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, prefix_lengths=prefix_lengths
    )
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"bigkernels.{op}: k has a batch of {k.shape[0]} and q of {q.shape[0]}")
    scores = (*q.shape[:3], k.shape[2])
    for name, value in (("bias", bias), ("mask", mask)):
        if value is not None and not _broadcasts(value.shape, scores):
            raise ValueError(
                f"bigkernels.{op}: {name} has shape {tuple(value.shape)}, which does not broadcast to "
                f"(B, H, Sq, Sk) = {scores}"
            )
    check_vectors(op, q.shape[1], alibi_slopes=alibi_slopes, sinks=sinks)
    check_integers(op, "prefix_lengths", prefix_lengths, (q.shape[0],), optional=True)


def _broadcasts(shape, to):
    return len(shape) <= 4 and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


# ---- the reference, which holds all scores ---------------------------------------------------------------------------


def _dense(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, seed, left, right, scale, softcap, dropout_p):
    keep = None
    if dropout_p:
        batches = torch.arange(q.shape[0], device=q.device, dtype=torch.int64)
        keep = keep_mask(seed, batches, q.shape[1], q.shape[2], k.shape[2], dropout_p)
    return attend(
        q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, keep, left, right, scale, softcap, dropout_p
    )


def visible(queries: int, keys: int, left: int, right: int, prefix: Tensor | None, device: torch.device) -> Tensor:
    """Which keys a query sees: (queries, keys), or (B, 1, queries, keys) with prefix lengths (B,)."""
    at = torch.arange(queries, device=device, dtype=torch.int64)[:, None] + (keys - queries)
    key = torch.arange(keys, device=device, dtype=torch.int64)[None, :]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        seen = seen & (key >= at - left)
    if right >= 0:
        seen = seen & (key <= at + right)
    return seen if prefix is None else seen | (key < prefix.view(-1, 1, 1, 1))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The reference, which holds all scores. q (B, H, Sq, D), k and v (B, Hk, Sk, D); (out, lse) in the wide dtype."""
    args = (q, k, v, bias, mask, alibi_slopes, sinks, prefix, keep, left, right, scale, softcap, dropout_p)
    if autocast_dtype(q.device) is None:
        return _attend(*args)
    with torch.autocast(q.device.type, enabled=False):  # it would lower the products
        return _attend(*args)


def _attend(q, k, v, bias, mask, alibi_slopes, sinks, prefix, keep, left, right, scale, softcap, dropout_p):
    wide = compute_dtype(q.dtype)
    batch, heads, queries, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    q = q.to(wide).reshape(batch, groups, heads // groups, queries, size)
    scores = (q @ k.to(wide).unsqueeze(2).transpose(-1, -2)).reshape(batch, heads, queries, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if alibi_slopes is not None:
        at = torch.arange(queries, device=q.device, dtype=torch.int64)[:, None] + (keys - queries)
        distance = (at - torch.arange(keys, device=q.device, dtype=torch.int64)).abs().to(wide)
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance
    seen = visible(queries, keys, left, right, prefix, q.device)
    if mask is not None:
        seen = seen & mask
    scores = scores.masked_fill(~seen, float("-inf"))
    # The shift cancels out, so it takes no part in the gradient. A row that sees nothing has none: its weights are 0.
    nothing = scores.new_full((batch, heads, queries, 1), float("-inf"))
    shift = scores.detach().amax(-1, keepdim=True) if keys else nothing
    if sinks is not None:
        sink = sinks.to(wide)[:, None, None]
        shift = torch.maximum(shift, sink.detach())
    shift = shift.masked_fill(shift == float("-inf"), 0.0)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - shift)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), torch.log(total) + shift)[..., 0]
    weights = weights / total
    if keep is not None:
        weights = torch.where(keep, weights / (1 - dropout_p), 0.0)
    weights = weights.reshape(batch, groups, heads // groups, queries, keys)
    out = (weights @ v.to(wide).unsqueeze(2)).reshape(batch, heads, queries, v.shape[-1])
    return out, lse


# ---- raw operators ---------------------------------------------------------------------------------------------------


def _fwd_fallback(q, k, v, *rest):
    out, lse = _dense(q, k, v, *rest)
    return like(q, v.shape[-1]).copy_(out), lse.float().contiguous()


def _fwd_fake(q, k, v, *rest):
    return like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _bwd_fallback(grad, grad_lse, q, k, v, out, lse, bias, mask, alibi_slopes, sinks, prefix_lengths, seed, *options):
    *more, bias_grad = options

    def call(q, k, v, leaf, sinks):
        used = bias if leaf is None else leaf
        return _dense(q, k, v, used, mask, alibi_slopes, sinks, prefix_lengths, seed, *more)

    leaves = (q, k, v, bias if bias_grad else None, sinks)
    dq, dk, dv, dbias, dsinks = vjp(call, leaves, (grad, grad_lse))
    grads = tuple(like(t, t.shape[-1]).copy_(d) for t, d in ((q, dq), (k, dk), (v, dv)))
    return *grads, *(q.new_empty(0) if d is None else d.contiguous() for d in (dbias, dsinks))


def _bwd_fake(grad, grad_lse, q, k, v, out, lse, bias, mask, alibi_slopes, sinks, *rest):
    grads = tuple(like(t, t.shape[-1]) for t in (q, k, v))
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
    f" Tensor? prefix_lengths, Tensor? seed, {OPTIONS}"
)
_fwd = define(f"attention_fwd({_ARGS.format('')}) -> (Tensor, Tensor)", _fwd_fake, _fwd_fallback, _flops)
_infer = define(
    f"attention({_ARGS.format('')}) -> Tensor", lambda *a: _fwd_fake(*a)[0], lambda *a: _fwd_fallback(*a)[0], _flops
)
_bwd = define(
    f"attention_bwd(Tensor grad, Tensor? grad_lse, {_ARGS.format('Tensor out, Tensor lse, ')}, bool bias_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_fallback,
    lambda grad, grad_lse, *rest: _flops(*rest, backward=True),
)


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
        return (
            dq,
            dk,
            dv,
            dbias if bias_grad else None,
            None,
            None,
            dsinks if rest[2] is not None else None,
            *[None] * 7,
        )
