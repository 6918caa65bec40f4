"""Attention of the newest tokens over a cache of keys and values, contiguous or in pages (Kwon et al. 2023,
https://arxiv.org/abs/2309.06180), and the write of new tokens into it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._deprecated import warn
from . import attention as shared
from . import rope
from ._flops import attention_flops, values
from .arguments import check_same_device, check_same_dtype, check_shape, check_tensor, type_name
from .registry import REFUSED, Operator, compute_dtype, define, is_readable, needs_grad

_DECODE, _APPEND = "functional.decode_attention", "functional.append_kv_"


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of n new tokens a sequence over its cached keys and values, which may be appended first.

    The last new token stands at the last valid key: with L = cache_seqlens[b], query i of sequence b is at position
    ``a = L - n + i`` and sees keys 0 to a, as in `attention` with ``causal=True`` over the first L keys. What lies
    in the cache at and after position L, or before the window of the first query, is not read.

    With `k` and `v` **the caches are written**: first `append_kv_` puts the new tokens at positions L - n to L - 1.

    Args:
        q: (B, H, n, D), floating, any strides. Any n works; the kernels are made for 1 to 16.
        k_cache: (B, N, Hk, D), or (pages, page_size, Hk, D) with `block_table`; the dtype of `q`, or int8 with
            `k_scale`. H is a multiple of Hk: query head h reads head ``h // (H // Hk)``.
        v_cache: (B, N, Hk, Dv), or (pages, page_size, Hk, Dv); the dtype of `k_cache`. It may share memory with
            `k_cache` where nothing is appended.
        cache_seqlens: (B,), int32 or int64: the valid keys, the new ones included: 0, or n to the capacity. A sequence
            of length 0 has no output (zeros), and nothing is appended to it.
        block_table: (B, max_pages), int32 or int64: key j of sequence b is token ``j % page_size`` of page
            ``block_table[b, j // page_size]``. Sequences may share pages; entries of pages not read may be anything.
        k, v: (B, Hk, n, D) and (B, Hk, n, Dv), the dtype of `q`: the keys and values of the new tokens.
        cos, sin: (B, n, R) or (1, n, R), floating: rotate `q` and `k` before, as `rope` does. Only with `k` and `v`.
        interleaved: as in `rope`.
        k_scale, v_scale: of int8 caches, float32, the shape of the cache without its last dimension: a value is
            ``int8 * scale``.
        scale: of the scores; 1 / sqrt(D) by default.
        window: (left, right), how many keys before its position a query sees; -1 is unlimited. `right` has no effect.
        softcap, alibi_slopes, sinks: as in `attention`.
        return_lse: also return the log-sum-exp of the scores, (B, H, n) in float32 (float64 for float64), -inf where
            nothing is seen.

    Returns:
        out (B, H, n, Dv) in the dtype of `q`, with heads inside of tokens in memory where `q` has them so; or
        (out, lse). Inside autocast q, k and v are cast to the dtype of the cache first.

    Gradients reach q, floating caches, alibi_slopes and sinks, through the reference, which holds all scores.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or option values do not fit; on CPU also lengths outside of the cache, or pages.
        RuntimeError: a gradient is wanted where tokens are appended or the cache is int8.
    """
    appends = k is not None or v is not None or cos is not None or sin is not None
    tensors = (block_table, k_scale, v_scale, alibi_slopes, sinks)
    left = -1
    try:
        q, k, v = _as_cache(k_cache, q, k, v)
        left, _, *options = shared.raw_options(_DECODE, q.shape[-1], True, scale, window, softcap, 0.0)[:4]
        grad = needs_grad(q, k_cache, v_cache, k, v, cos, sin, *tensors)
        if OPERATOR.uses_kernel(q, k_cache, v_cache, cache_seqlens, k, v, cos, sin, *tensors) and not grad:
            cache_seqlens, block_table = _int32(cache_seqlens), _int32(block_table)
            if appends:
                q = _appended(
                    q, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, k_scale, v_scale, interleaved
                )
            results = _infer(
                q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, alibi_slopes, sinks, left, *options
            )
            return results if return_lse else results[0]
    except REFUSED:
        _check(_DECODE, q, k_cache, v_cache, cache_seqlens, *tensors, k, v, cos, sin, left=left, appends=appends)
        raise
    _check(_DECODE, q, k_cache, v_cache, cache_seqlens, *tensors, k, v, cos, sin, left=left, appends=appends)
    if appends or k_cache.dtype == torch.int8:
        _refuse_gradient(_DECODE, grad)
    if appends:
        q = _written(q, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, k_scale, v_scale, interleaved)
    out, lse = _reference(q, k_cache, v_cache, cache_seqlens, *tensors, left, *options)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _caches_first(function):
    """Calls in the order that was given up, ``(q, k, v, k_cache, v_cache, cache_seqlens)``."""

    @functools.wraps(function)
    def in_any_order(*args, **kwargs):
        if len(args) > 1 and (
            "k_cache" in kwargs or len(args) > 3 and isinstance(args[3], Tensor) and args[3].dim() == 4
        ):
            warn(
                f"bigkernels.{_APPEND}",
                "the order q, k, v, k_cache, v_cache, cache_seqlens",
                "q, k_cache, v_cache, cache_seqlens, k, v",
            )
            kwargs.update(zip(("q", "k", "v", "k_cache", "v_cache", "cache_seqlens"), args, strict=False))
            args = ()
        return function(*args, **kwargs)

    return in_any_order


@_caches_first
def append_kv_(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Write the keys and values of n new tokens a sequence into the cache, rotating queries and keys on the way.

    Token i of sequence b goes to position ``cache_seqlens[b] - n + i``. For int8 caches each head of each token is
    quantized: ``scale = max|x| / 127`` and ``round(x / scale)``, half to even; a head that is zero gets scale 0, and
    one with an infinity or NaN comes back as NaN. Rotation is in float32, and rounded once.

    Args:
        q: (B, H, n, D): the queries to rotate.
        k_cache, v_cache, cache_seqlens, k, v, block_table, cos, sin, interleaved, k_scale, v_scale: as in
            `decode_attention`. **k_cache, v_cache, k_scale and v_scale are written**, at the new positions only.

    Returns:
        The rotated q, a copy where `cos` is None; strided as by `torch.empty_like`, contiguous where a head's values
        are not. Not differentiable.

    Raises:
        TypeError, ValueError, RuntimeError: as `decode_attention`.
    """
    try:
        q, k, v = _as_cache(k_cache, q, k, v)
        args = (q, k, v, k_cache, v_cache, _int32(cache_seqlens), _int32(block_table), cos, sin, k_scale, v_scale)
        grad = needs_grad(q, k, v, k_cache, v_cache, cos, sin, k_scale, v_scale)
        if OPERATOR.uses_kernel(*args) and not grad:
            return _appended(*args, interleaved)
    except REFUSED:
        _check(_APPEND, q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, None, None, k, v, cos, sin)
        raise
    _check(_APPEND, q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, None, None, k, v, cos, sin)
    _refuse_gradient(_APPEND, grad)
    return _written(*args, interleaved)


def _appended(q, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, k_scale, v_scale, interleaved):
    """The new tokens written by a kernel, or by the reference where it holds too few angles."""
    tensors = (k_cache, v_cache, cache_seqlens, block_table, cos, sin, k_scale, v_scale)
    if cos is not None and cos.shape[-1] > rope.MAX_ROTARY:
        return _written(q, k, v, *tensors, interleaved)
    if not torch.compiler.is_dynamo_compiling():
        # An operator's kernel does not count as a write by itself, and backward could read what it overwrote.
        torch.autograd.graph.increment_version([t for t in (k_cache, v_cache, k_scale, v_scale) if t is not None])
    return _append(q, k, v, *tensors, interleaved)


def _as_cache(k_cache, *new):
    """Inside autocast the new tensors get the cache's dtype: the cache is neither copied nor written in another one."""
    if not torch.is_autocast_enabled(new[0].device.type):
        return new
    dtype = k_cache.dtype if k_cache.is_floating_point() else new[0].dtype
    return tuple(t if t is None else t.to(dtype) for t in new)


def _int32(t):
    return t.int() if t is not None and t.dtype == torch.int64 else t


def _refuse_gradient(op, grad):
    if grad:
        raise RuntimeError(
            f"bigkernels.{op}: appending to a cache and int8 caches have no gradient, and an argument "
            "requires one; call it inside torch.no_grad()"
        )


def _check(
    op,
    q,
    k_cache,
    v_cache,
    cache_seqlens,
    block_table,
    k_scale,
    v_scale,
    alibi_slopes,
    sinks,
    k=None,
    v=None,
    cos=None,
    sin=None,
    *,
    left=-1,
    appends=True,
):
    check_tensor(op, "q", q)
    if q.dim() != 4:
        raise ValueError(f"bigkernels.{op}: q has shape {tuple(q.shape)}, expected (B, H, n, D)")
    batch, _, new, size = q.shape
    _check_cache(op, q, k_cache, v_cache, k_scale, v_scale)
    first, capacity, heads, _ = k_cache.shape
    value_size = v_cache.shape[-1]
    check_same_device(
        op,
        "q",
        q,
        k_cache=k_cache,
        v_cache=v_cache,
        cache_seqlens=cache_seqlens,
        k_scale=k_scale,
        block_table=block_table,
        v_scale=v_scale,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k=k,
        v=v,
        cos=cos,
        sin=sin,
    )
    if heads == 0 or q.shape[1] % heads:
        raise ValueError(f"bigkernels.{op}: q has {q.shape[1]} heads, not a multiple of the cache's {heads}")
    if size == 0 or value_size == 0:
        raise ValueError(f"bigkernels.{op}: the heads of q and v_cache must have at least one element")
    shared.check_integers(op, "cache_seqlens", cache_seqlens, (batch,))
    if block_table is None:
        if first != batch:
            raise ValueError(
                f"bigkernels.{op}: k_cache has a batch of {first} and q of {batch}; a cache of pages "
                "needs a block_table"
            )
    else:
        if not isinstance(block_table, Tensor) or block_table.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"bigkernels.{op}: block_table is {type_name(block_table)}; accepted are int32 and int64 tensors"
            )
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"bigkernels.{op}: block_table has shape {tuple(block_table.shape)}, expected ({batch}, max_pages)"
            )
        if capacity == 0:
            raise ValueError(f"bigkernels.{op}: the pages of k_cache hold no tokens")
    shared.check_vectors(op, q.shape[1], alibi_slopes=alibi_slopes, sinks=sinks)
    if appends:
        _check_new(op, q, k, v, cos, sin, (batch, heads, new, size), (batch, heads, new, value_size))
    # Data-dependent, so on CPU only: on a GPU it would wait for the device.
    if is_readable(cache_seqlens) and (block_table is None or is_readable(block_table)):
        _check_lengths(op, new, cache_seqlens, block_table, first, capacity, left)


def _check_cache(op, q, k_cache, v_cache, k_scale, v_scale):
    for name, cache, scale in (("k", k_cache, k_scale), ("v", v_cache, v_scale)):
        if not isinstance(cache, Tensor) or cache.dtype not in (q.dtype, torch.int8):
            raise TypeError(
                f"bigkernels.{op}: {name}_cache is {type_name(cache)}; accepted are {type_name(q)}, the "
                "dtype of q, and int8"
            )
        if cache.dim() != 4:
            raise ValueError(
                f"bigkernels.{op}: {name}_cache has shape {tuple(cache.shape)}, expected (B, N, H, D) or "
                "(pages, page_size, H, D)"
            )
        if (scale is None) != (cache.dtype != torch.int8):
            given = "not given" if scale is None else "given"
            raise ValueError(
                f"bigkernels.{op}: {name}_cache is {type_name(cache)} and {name}_scale is {given}; int8 "
                "caches have scales, others have none"
            )
        accepted = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
        if scale is not None and (not isinstance(scale, Tensor) or scale.dtype not in accepted):
            raise TypeError(f"bigkernels.{op}: {name}_scale is {type_name(scale)}; accepted is float32")
        check_shape(
            op, f"{name}_scale", scale, cache.shape[:3], f"the shape of {name}_cache without its last dimension"
        )
    check_same_dtype(op, "k_cache", k_cache, v_cache=v_cache)
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"bigkernels.{op}: v_cache has shape {tuple(v_cache.shape)}, expected that of k_cache, "
            f"{tuple(k_cache.shape)}, but for the last dimension"
        )
    if k_cache.shape[-1] != q.shape[-1]:
        raise ValueError(f"bigkernels.{op}: k_cache has heads of {k_cache.shape[-1]} elements and q of {q.shape[-1]}")


def _check_new(op, q, k, v, cos, sin, k_shape, v_shape):
    if k is None or v is None:
        raise ValueError(
            f"bigkernels.{op}: {'k' if k is None else 'v'} is None; k and v are given together, and cos "
            "and sin with them"
        )
    for name, value, expected in (("k", k, k_shape), ("v", v, v_shape)):
        check_tensor(op, name, value)
        check_same_dtype(op, "q", q, **{name: value})
        check_shape(op, name, value, expected, "the new tokens in the cache's heads")
    if cos is not None or sin is not None:
        rope._check(q, k, cos, sin)


def _check_lengths(op, new, cache_seqlens, block_table, first, capacity, left):
    page = capacity
    if block_table is not None:
        capacity *= block_table.shape[1]
        rows = block_table.tolist()
    for n, length in enumerate(cache_seqlens.tolist()):
        if length and not new <= length <= capacity or length < 0:
            raise ValueError(
                f"bigkernels.{op}: cache_seqlens[{n}] is {length}; expected 0, or from {new} (the new "
                f"tokens) to {capacity} (the cache's capacity)"
            )
        if block_table is not None and length:
            oldest = max(0, length - new - left) if left >= 0 else 0
            for i in range(oldest // page, (length - 1) // page + 1):
                if not 0 <= rows[n][i] < first:
                    raise ValueError(
                        f"bigkernels.{op}: block_table[{n}, {i}] is {rows[n][i]}, not one of the {first} pages"
                    )


def _positions(cache_seqlens, new):
    """(B, n): where the new tokens are; negative in empty sequences."""
    return cache_seqlens.long()[:, None] - new + torch.arange(new, device=cache_seqlens.device, dtype=torch.int64)


def _gathered(cache, scale, block_table, live, wide):
    """(B, Hk, N, D): the keys or values of each sequence, zero where they are not to be read."""
    values = cache.to(wide) if scale is None else cache.to(wide) * scale.to(wide).unsqueeze(-1)
    if block_table is not None:
        values = values[block_table.long().clamp(0, cache.shape[0] - 1)].flatten(1, 2)
    return torch.where(live[:, :, None, None], values, 0.0).transpose(1, 2)


def _reference(
    q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, alibi_slopes, sinks, left, scale, softcap
):
    """(out, lse) in the wide dtype. It gathers the cache up to its capacity, so that it need not know the lengths."""
    wide = compute_dtype(q.dtype)
    if block_table is not None and not k_cache.shape[0]:
        block_table = block_table[:, :0]  # no page to gather
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    at = _positions(cache_seqlens, q.shape[2])[:, :, None]
    key = torch.arange(capacity, device=q.device, dtype=torch.int64)
    seen = key <= at
    if left >= 0:
        seen = seen & (key >= at - left)
    live = seen.any(1)
    k, v = (
        _gathered(cache, scales, block_table, live, wide) for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
    )
    bias = None
    if alibi_slopes is not None:
        bias = -alibi_slopes.to(wide)[:, None, None] * (at - key).abs().unsqueeze(1)
    return shared.attend(
        q.to(wide), k, v, bias, seen.unsqueeze(1), None, sinks, None, None, -1, -1, scale, softcap, 0.0
    )


def _sources(positions, block_table, cache):
    """Which of the B * n new tokens each slot of the cache gets, -1 if none: (slots,)."""
    first, size = cache.shape[:2]
    if block_table is None:
        rows = torch.arange(first, device=cache.device, dtype=torch.int64)[:, None]
        slot = rows * size + positions
    else:
        page = positions.clamp_min(0) // size
        slot = block_table.long().gather(1, page) * size + positions % size
    slots = first * size
    tokens = torch.arange(positions.numel(), device=cache.device, dtype=torch.int64)
    # One slot more takes the tokens of empty sequences.
    slot = torch.where(positions >= 0, slot, slots).flatten()
    return torch.full((slots + 1,), -1, device=cache.device, dtype=torch.int64).scatter(0, slot, tokens)[:-1]


def _put(cache, sources, new):
    """Write `new`, (B * n, ...), where `sources` says; all else keeps its value."""
    there = (sources >= 0).view(*cache.shape[:2], *[1] * (cache.dim() - 2))
    cache.copy_(torch.where(there, new[sources.clamp_min(0)].view(cache.shape).to(cache.dtype), cache))


def _quantized(x):
    """int8 values as floats, and their scales. A head of zeros has scale 0; NaN and infinity make it all NaN."""
    scale = x.abs().amax(-1) / 127
    by = scale.unsqueeze(-1)
    values = torch.where((by > 0) & by.isfinite(), x / by, 0.0).round().clamp(-127, 127)
    return values, torch.where(scale.isfinite(), scale, float("nan"))


def _written(q, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, k_scale, v_scale, interleaved):
    """The reference of `append_kv_`. It passes over the whole cache, so that it need not know the lengths."""
    wide = compute_dtype(q.dtype)
    k, v, rotated = k.to(wide), v.to(wide), q
    if cos is not None:
        k = rope._apply(k, cos, sin, interleaved)
        rotated = rope._apply(q, cos, sin, interleaved)
    places = block_table is None or block_table.shape[1]
    if k.shape[0] and k.shape[2] and k_cache.numel() and places:
        sources = _sources(_positions(cache_seqlens, q.shape[2]), block_table, k_cache)
        for cache, scales, new in ((k_cache, k_scale, k), (v_cache, v_scale, v)):
            new = new.transpose(1, 2).flatten(0, 1)
            if scales is not None:
                new, scale = _quantized(new)
                _put(scales, sources, scale)
            _put(cache, sources, new)
    return rope._like(q, rotated)


def _infer_fallback(q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, alibi_slopes, sinks, *options):
    tensors = (q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, alibi_slopes, sinks)
    _check(_DECODE, *tensors, left=options[0], appends=False)
    out, lse = _reference(*tensors, *options)
    return shared.like(q, v_cache.shape[-1]).copy_(out), lse.float().contiguous()


def _infer_fake(q, k_cache, v_cache, *rest):
    return shared.like(q, v_cache.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _append_fallback(q, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, k_scale, v_scale, interleaved):
    _check(_APPEND, q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, None, None, k, v, cos, sin)
    return _written(q, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, k_scale, v_scale, interleaved)


def _append_fake(q, *rest):
    return rope._empty(q)


# A compiler would gather the cache to fuse the reference, so graphs hold the kernels.
OPERATOR = Operator("decode_attention", in_graphs=True)


def _flops(q, k_cache, v_cache, cache_seqlens, block_table, *_):
    lengths = values(cache_seqlens)
    if lengths is None:  # as if every cache were full
        full = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        lengths = [full] * q.shape[0]
    return attention_flops(q, v_cache, q.shape[2] * sum(lengths), q.shape[1])


_infer = define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table,"
    " Tensor? k_scale, Tensor? v_scale, Tensor? alibi_slopes, Tensor? sinks, int left, float scale, float softcap)"
    " -> (Tensor, Tensor)",
    _infer_fake,
    _infer_fallback,
    _flops,
)
_append = define(
    "append_kv_(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens,"
    " Tensor? block_table, Tensor? cos, Tensor? sin, Tensor(c!)? k_scale, Tensor(d!)? v_scale, bool interleaved)"
    " -> Tensor",
    _append_fake,
    _append_fallback,
)
