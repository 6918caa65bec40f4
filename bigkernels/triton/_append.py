"""The kernel behind `append_kv_`: it rotates queries and keys, quantizes keys and values, and writes them to the cache.

A program has one new token and a block of heads of the queries, the keys or the values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rope import _load_pairs, _store_pairs

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer, halves to even


@triton.jit
def _largest(x):
    """The largest magnitude of each head; NaN counts as infinity, because a maximum would pass over it."""
    magnitude = tl.abs(x)
    return tl.max(tl.where(magnitude <= 3.4028235e38, magnitude, float("inf")), 2)[:, :, None]


@triton.jit
def _scale_of(largest):
    return tl.where(largest == float("inf"), float("nan"), tl.div_rn(largest, 127.0))


@triton.jit
def _quantized(x, scale):
    usable = scale > 0.0
    x = tl.where(usable, tl.div_rn(tl.where(usable, x, 0.0), tl.where(usable, scale, 1.0)), 0.0)
    return tl.minimum(tl.maximum((x + _ROUND) - _ROUND, -127.0), 127.0)


@triton.jit
def _copy(
    X,
    Y,
    SCALE,
    COS,
    SIN,
    x_at,
    y_at,
    scale_at,
    cos_at,
    sin_at,
    mask,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Copy heads, rotated where there are angles and quantized where there is a place for the scales."""
    largest = tl.zeros(mask.shape, tl.float32)
    if COS is not None:
        a, b = _load_pairs(X, x_at, mask, R, BLOCK, INTERLEAVED)
        one = tl.full([1, 1, 1], 1, tl.int1)
        cos_a, cos_b = _load_pairs(COS, cos_at, one, R, BLOCK, INTERLEAVED)
        sin_a, sin_b = _load_pairs(SIN, sin_at, one, R, BLOCK, INTERLEAVED)
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
        largest = tl.maximum(_largest(a), _largest(b))
    col = R + tl.arange(0, BLOCK_REST)[None, None, :]
    if D > R:
        rest = tl.load(X + x_at + col, mask=mask & (col < D), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, _largest(rest))
    if SCALE is not None:
        scale = _scale_of(largest)
        tl.store(SCALE + scale_at, scale, mask=mask)
        if COS is not None:
            a, b = _quantized(a, scale), _quantized(b, scale)
        if D > R:
            rest = _quantized(rest, scale)
    if COS is not None:
        _store_pairs(Y, y_at, mask, a, b, R, BLOCK, INTERLEAVED)
    if D > R:
        tl.store(Y + y_at + col, rest.to(Y.dtype.element_ty), mask=mask & (col < D))


@triton.jit(do_not_specialize=["tokens", "table_sequence", "pages", "capacity"])
def append(
    Q,
    K,
    V,
    OUT,
    K_CACHE,
    V_CACHE,
    SEQLENS,
    TABLE,
    COS,
    SIN,
    K_SCALE,
    V_SCALE,
    tokens,
    pages,
    capacity,
    table_sequence,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    kc_page,
    kc_token,
    kc_head,
    vc_page,
    vc_token,
    vc_head,
    ks_page,
    ks_token,
    ks_head,
    vs_page,
    vs_token,
    vs_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    part = tl.program_id(1)
    cos_at = batch * cos_batch + token * cos_token
    sin_at = batch * sin_batch + token * sin_token
    Q_PARTS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    K_PARTS: tl.constexpr = (K_HEADS + HEADS - 1) // HEADS
    if part < Q_PARTS:
        head = (part * HEADS + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
        x_at = batch * q_batch + token * q_token + head * q_head
        y_at = batch * out_batch + token * out_token + head * out_head
        _copy(
            Q,
            OUT,
            None,
            COS,
            SIN,
            x_at,
            y_at,
            x_at,
            cos_at,
            sin_at,
            head < Q_HEADS,
            D,
            R,
            BLOCK,
            BLOCK_REST,
            INTERLEAVED,
        )
    else:
        position = tl.load(SEQLENS + batch).to(tl.int64) - tokens + token
        there = (position >= 0) & (position < capacity)
        if TABLE is None:
            page, slot = batch, position
        else:
            page = tl.load(TABLE + batch * table_sequence + position // PAGE, mask=there, other=-1).to(tl.int64)
            slot = position % PAGE
            # A wrong number must not be written to.
            there = there & (page >= 0) & (page < pages)
        part -= Q_PARTS
        head = (part % K_PARTS * HEADS + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
        mask = (head < K_HEADS) & there
        if part < K_PARTS:
            x_at = batch * k_batch + token * k_token + head * k_head
            y_at = page * kc_page + slot * kc_token + head * kc_head
            scale_at = page * ks_page + slot * ks_token + head * ks_head
            _copy(
                K,
                K_CACHE,
                K_SCALE,
                COS,
                SIN,
                x_at,
                y_at,
                scale_at,
                cos_at,
                sin_at,
                mask,
                D,
                R,
                BLOCK,
                BLOCK_REST,
                INTERLEAVED,
            )
        else:
            x_at = batch * v_batch + token * v_token + head * v_head
            y_at = page * vc_page + slot * vc_token + head * vc_head
            scale_at = page * vs_page + slot * vs_token + head * vs_head
            _copy(
                V,
                V_CACHE,
                V_SCALE,
                None,
                None,
                x_at,
                y_at,
                scale_at,
                cos_at,
                sin_at,
                mask,
                DV,
                0,
                BLOCK,
                BLOCK_DV,
                INTERLEAVED,
            )
