"""Attention over sequences of different lengths packed one after the other, as `flash_attn_varlen_func`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import attention as shared
from ._derivatives import gradients, is_observed, vjp
from ._dropout import draw_seed, keep_mask
from ._flops import attention_flops, values
from .arguments import check_tensor
from .registry import (
    REFUSED,
    Operator,
    compute_dtype,
    cpu_kernel,
    define,
    gluon_kernel,
    is_readable,
    needs_grad,
    triton_kernel,
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each of N packed sequences; no query sees another sequence.

    Sequence n has the queries ``q[cu_seqlens_q[n] : cu_seqlens_q[n + 1]]`` and the keys and values as
    `cu_seqlens_k` has them. Lengths may differ between queries and keys (the last query is aligned to the last key)
    and may be zero. The options are those of `attention`. On a GPU the lengths are never read by the host.

    Args:
        q: (Tq, H, D), floating.
        k: (Tk, Hk, D), the dtype of `q`, with H a multiple of Hk.
        v: (Tk, Hk, Dv), the dtype of `q`.
        cu_seqlens_q, cu_seqlens_k: (N + 1,), int32 or int64, from 0 up to Tq and Tk, not decreasing.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        prefix_lengths: (N,), int32 or int64.
        alibi_slopes, sinks: (H,), floating.
        return_lse: also return lse, (H, Tq) in float32.

    Returns:
        out (Tq, H, Dv), contiguous, in the dtype of `q`; or (out, lse). Tokens outside of every sequence get zeros.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or option values do not fit, or, on CPU, the lengths are not as described.
    """
    tensors = (cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, prefix_lengths)
    try:
        q, k, v = shared.lowered(q, k, v)
        options = shared.raw_options(
            "functional.varlen_attention", q.shape[-1], causal, scale, window, softcap, dropout_p
        )
        if OPERATOR.uses_kernel(q, k, v, *tensors) and not needs_grad(alibi_slopes):
            grad = needs_grad(q, k, v, sinks)
            cu_q, prefix = shared.integers(cu_seqlens_q, grad), shared.integers(prefix_lengths, grad)
            # The compiler does not take one tensor for two arguments of an autograd function.
            once = cu_seqlens_k is cu_seqlens_q and not is_compiling()
            cu_k = cu_q if once else shared.integers(cu_seqlens_k, grad)
            args = (q, k, v, cu_q, cu_k, alibi_slopes, sinks, prefix, draw_seed(q, dropout_p), max_seqlen_q,
                    max_seqlen_k, *options)  # fmt: skip
            if grad:
                results = _VarlenAttention.apply(*args)
            elif return_lse:
                results = _fwd(*args)
            else:
                return _infer(*args)
            return results if return_lse else results[0]
    except REFUSED:
        _check(q, k, v, *tensors, max_seqlen_q, max_seqlen_k)
        raise
    _check(q, k, v, *tensors, max_seqlen_q, max_seqlen_k)
    out, lse = _packed(q, k, v, *tensors, draw_seed(q, dropout_p), max_seqlen_q, max_seqlen_k, *options)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, prefix_lengths, max_seqlen_q, max_seqlen_k):
    op = "functional.varlen_attention"
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, value)
        if value.dim() != 3:
            raise ValueError(f"bigkernels.{op}: {name} has shape {tuple(value.shape)}, expected (T, H, D)")
    shape = tuple(cu_seqlens_q.shape) if isinstance(cu_seqlens_q, Tensor) else ()
    if isinstance(cu_seqlens_q, Tensor) and (len(shape) != 1 or shape[0] == 0):
        raise ValueError(f"bigkernels.{op}: cu_seqlens_q has shape {shape}, expected (N + 1,)")
    shared.check_integers(op, "cu_seqlens_q", cu_seqlens_q, shape)
    shared.check_integers(op, "cu_seqlens_k", cu_seqlens_k, shape)
    shared.check_integers(op, "prefix_lengths", prefix_lengths, (shape[0] - 1,), optional=True)
    shared.check_heads(
        op,
        q,
        k,
        v,
        1,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        prefix_lengths=prefix_lengths,
    )
    shared.check_vectors(op, q.shape[1], alibi_slopes=alibi_slopes, sinks=sinks)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(value, Tensor):
            raise TypeError(f"bigkernels.{op}: {name} is a tensor; expected an int")
    if is_readable(cu_seqlens_q) and is_readable(cu_seqlens_k):
        _check_lengths(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], max_seqlen_q, max_seqlen_k)


def _check_lengths(cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k, max_seqlen_q, max_seqlen_k):
    # Data-dependent, so on CPU only: on a GPU it would wait for the device.
    for name, cu, tokens, most in (
        ("q", cu_seqlens_q, tokens_q, max_seqlen_q),
        ("k", cu_seqlens_k, tokens_k, max_seqlen_k),
    ):
        ends = cu.tolist()
        lengths = [b - a for a, b in zip(ends, ends[1:], strict=False)]
        if ends[0] != 0 or ends[-1] > tokens or any(n < 0 for n in lengths):
            raise ValueError(
                f"bigkernels.functional.varlen_attention: cu_seqlens_{name} must rise from 0 to at most "
                f"{tokens}, the tokens of {name}; it goes from {ends[0]} to {ends[-1]}"
            )
        if lengths and max(lengths) > most:
            raise ValueError(
                f"bigkernels.functional.varlen_attention: max_seqlen_{name} is {most}, shorter than a "
                f"sequence of {max(lengths)}"
            )


def _packed(
    q, k, v, cu_q, cu_k, alibi_slopes, sinks, prefix_lengths, seed, max_q, max_k, left, right, scale, softcap, dropout_p
):
    """The reference: one sequence after the other. It reads the lengths, so a GPU is waited for."""
    wide = compute_dtype(q.dtype)
    outs, lses = [], []
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    for n in range(len(ends_q) - 1):
        one_q, one_k, one_v = (
            t[a[n] : a[n + 1]].transpose(0, 1)[None] for t, a in ((q, ends_q), (k, ends_k), (v, ends_k))
        )
        keep = None
        if dropout_p:
            batch = torch.tensor([n], device=q.device, dtype=torch.int64)
            keep = keep_mask(seed, batch, q.shape[1], one_q.shape[2], one_k.shape[2], dropout_p)
        prefix = None if prefix_lengths is None else prefix_lengths[n : n + 1]
        out, lse = shared.attend(
            one_q, one_k, one_v, None, None, alibi_slopes, sinks, prefix, keep, left, right, scale, softcap, dropout_p
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = q.shape[0] - ends_q[-1]
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[-1], dtype=wide))
    lses.append(q.new_full((q.shape[1], rest), float("-inf"), dtype=wide))
    return torch.cat(outs), torch.cat(lses, 1)


def _fwd_fallback(*args):
    out, lse = _packed(*args)
    return out.to(args[0].dtype).contiguous(), lse.float().contiguous()


def _fwd_fake(q, k, v, *rest):
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _bwd_fallback(grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, alibi_slopes, sinks, *rest):
    def call(q, k, v, sinks):
        return _packed(q, k, v, cu_q, cu_k, alibi_slopes, sinks, *rest)

    *made, dsinks = vjp(call, (q, k, v, sinks), (grad, grad_lse))
    return *(d.contiguous() for d in made), q.new_empty(0) if dsinks is None else dsinks.contiguous()


def _bwd_fake(grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, alibi_slopes, sinks, *rest):
    return *(t.new_empty(t.shape) for t in (q, k, v)), q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _flops(q, k, v, cu_q, cu_k, alibi_slopes, sinks, prefix, seed, max_q, max_k, *_, backward=False):
    ends_q, ends_k = values(cu_q), values(cu_k)
    if ends_q is None or ends_k is None:
        pairs = (cu_q.shape[0] - 1) * max_q * max_k
    else:
        pairs = sum((b - a) * (d - c) for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False))
    return attention_flops(q, v, pairs, q.shape[1], backward=backward)


def _bwd_flops(grad, grad_lse, q, k, v, out, lse, *rest):
    return _flops(q, k, v, *rest, backward=True)


OPERATOR = Operator("varlen_attention", implementations=(cpu_kernel(), triton_kernel(), gluon_kernel()), in_graphs=True)
_ARGS = (
    "Tensor q, Tensor k, Tensor v, {}Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks,"
    f" Tensor? prefix_lengths, Tensor? seed, SymInt max_seqlen_q, SymInt max_seqlen_k, {shared.OPTIONS}"
)
_fwd = define(f"varlen_attention_fwd({_ARGS.format('')}) -> (Tensor, Tensor)", _fwd_fake, _fwd_fallback, _flops)
_infer = define(
    f"varlen_attention({_ARGS.format('')}) -> Tensor",
    lambda *a: _fwd_fake(*a)[0],
    lambda *a: _fwd_fallback(*a)[0],
    _flops,
)
_bwd = define(
    f"varlen_attention_bwd(Tensor grad, Tensor? grad_lse, {_ARGS.format('Tensor out, Tensor lse, ')})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_fallback,
    _bwd_flops,
)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *rest):
        out, lse = _fwd(q, k, v, *rest)
        tensors, ctx.options = rest[:6], rest[6:]
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if is_observed(grad, grad_lse):
            cu_q, cu_k, alibi_slopes, sinks, *rest = tensors

            def call(q, k, v, sinks):
                return _packed(q, k, v, cu_q, cu_k, alibi_slopes, sinks, *rest, *ctx.options)

            dq, dk, dv, dsinks = gradients(call, (q, k, v, sinks), (grad, grad_lse))
            return dq, dk, dv, None, None, None, dsinks, *[None] * 9
        if grad is None:
            grad = torch.zeros_like(out)
        dq, dk, dv, dsinks = _bwd(grad, grad_lse, q, k, v, out, lse, *tensors, *ctx.options)
        return dq, dk, dv, None, None, None, dsinks if tensors[3] is not None else None, *[None] * 9
