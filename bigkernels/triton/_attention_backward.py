"""The backward kernels of attention for training, whose gradients each come from one program.

They make the scores again in each kernel, seven products in all and not five, and for that need neither
atomics nor a float32 copy of the queries' gradient: the same inputs give the same bits. Where the caller allows other
bits each time, `backward_keys` adds the queries' gradient up as well, and five products are enough. Programs that own
keys compute the transposed scores, so that these are operands of the next product as they lie in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import (
    _LOG2E,
    _add,
    _block_of,
    _kept,
    _limits,
    _of_head,
    _prefix,
    _rows,
    _scores,
    _seen,
    _sequence,
    _slope,
    _store,
)


@triton.jit
def delta(
    GRAD,
    OUT,
    GRAD_LSE,
    LSE,
    DELTA,
    LSE_2,
    queries,
    grad_batch,
    grad_head,
    grad_token,
    out_batch,
    out_head,
    out_token,
    lse_batch,
    lse_head,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of each row, the part of the scores' gradient that all keys share: grad . out, less the gradient of lse.

    With LSE_2 also the logsumexp in base 2, infinity for rows that see nothing. Float32 gets it from `attend`: rounded,
    a logsumexp of 100 costs every weight of its row 4e-6, which 16-bit products do not notice.
    """
    block, _, owner = _block_of(queries, BLOCK_M)
    head = (owner % HEADS).to(tl.int64)
    batch = (owner // HEADS).to(tl.int64)
    at = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = at < queries
    GRAD += batch * grad_batch + head * grad_head
    OUT += batch * out_batch + head * out_head
    grad = _rows(GRAD, at, exists, grad_token, 0, BLOCK_DV, DV).to(tl.float32)
    out = _rows(OUT, at, exists, out_token, 0, BLOCK_DV, DV).to(tl.float32)
    found = tl.sum(grad * out, 1)
    place = batch * lse_batch + head * lse_head + at
    if GRAD_LSE is not None:
        found -= tl.load(GRAD_LSE + place, mask=exists, other=0.0)
    tl.store(DELTA + place, found, mask=exists)
    if LSE_2 is not None:
        lse = tl.load(LSE + place, mask=exists, other=0.0)
        tl.store(LSE_2 + place, tl.where(lse == float("-inf"), float("inf"), lse * _LOG2E), mask=exists)


@triton.jit
def _statistics(LSE, REST, DELTA, at, exists):
    """A row's logsumexp in base 2 with its rest, and its delta; a logsumexp of infinity makes weights of zero."""
    lse = tl.load(LSE + at, mask=exists, other=float("inf"))
    rest = 0.0
    if REST is not None:
        rest = tl.load(REST + at, mask=exists, other=0.0)
    return lse, rest, tl.load(DELTA + at, mask=exists, other=0.0)


@triton.jit
def _weights(s, lse, rest, REST, DIM: tl.constexpr):
    s -= tl.expand_dims(lse, DIM)
    if REST is not None:
        s -= tl.expand_dims(rest, DIM)
    return tl.exp2(s)


@triton.jit(do_not_specialize=["queries", "keys", "left", "right", "threshold"])
def backward_queries(
    Q, K, V, GRAD, LSE, REST, DELTA, Q_GRAD, BIAS, MASK, SLOPES, PREFIXES, SEED, CU_Q, CU_K,
    queries, keys, left, right, scale, softcap, threshold, kept_scale, q_scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head, grad_token,
    dq_batch, dq_head, dq_token, lse_batch, lse_head, bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head,
    mask_row, mask_key,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PARTS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M queries of a head."""
    PREFIX: tl.constexpr = PREFIXES is not None
    block, blocks, owner = _block_of(queries, BLOCK_M)
    head, sequence, wide_head, wide_batch, q_first, queries, k_first, keys = _sequence(
        CU_Q, CU_K, queries, keys, owner, HEADS
    )
    first = (blocks - 1 - block) * BLOCK_M
    if first >= queries:
        return
    Q = _of_head(Q, wide_batch, wide_head, q_batch, q_head, q_first * q_token)
    K = _of_head(K, wide_batch, wide_head // GROUP, k_batch, k_head, k_first * k_token)
    V = _of_head(V, wide_batch, wide_head // GROUP, v_batch, v_head, k_first * v_token)
    GRAD = _of_head(GRAD, wide_batch, wide_head, grad_batch, grad_head, q_first * grad_token)
    LSE = _of_head(LSE, wide_batch, wide_head, lse_batch, lse_head, q_first)
    DELTA = _of_head(DELTA, wide_batch, wide_head, lse_batch, lse_head, q_first)
    REST = _of_head(REST, wide_batch, wide_head, lse_batch, lse_head, q_first)
    BIAS = _of_head(BIAS, wide_batch, wide_head, bias_batch, bias_head)
    MASK = _of_head(MASK, wide_batch, wide_head, mask_batch, mask_head)
    slope = _slope(SLOPES, head)
    prefix = _prefix(PREFIXES, sequence)

    at = first + tl.arange(0, BLOCK_M)
    exists = at < queries
    row = at[:, None]
    q = _rows(Q, at, exists, q_token, 0, BLOCK_D, D)
    grad = _rows(GRAD, at, exists, grad_token, 0, BLOCK_DV, DV)
    q_rest, grad_rest = q, grad
    if REST_D:
        q_rest = _rows(Q, at, exists, q_token, BLOCK_D, REST_D, D)
    if REST_DV:
        grad_rest = _rows(GRAD, at, exists, grad_token, BLOCK_DV, REST_DV, DV)
    lse, rest, mean = _statistics(LSE, REST, DELTA, at, exists)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq_rest = tl.zeros([BLOCK_M, REST_D if REST_D else 1], tl.float32)
    end = tl.minimum(first + BLOCK_M, queries)
    low, inner_low, inner_high, high = _limits(
        first, end, queries, keys, left, right, prefix, BLOCK_N, LEFT, RIGHT, PREFIX, PARTS
    )
    for part in tl.static_range(PARTS):
        begin, stop = low, high
        if PARTS > 1:
            if part == 0:
                begin, stop = inner_low, inner_high
            elif part == 1:
                begin = inner_high
            else:
                stop = inner_low
        for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
            key_at = start + tl.arange(0, BLOCK_N)
            inside = key_at < keys
            key = key_at[None, :]
            k = _rows(K, key_at, inside, k_token, 0, BLOCK_D, D)
            v = _rows(V, key_at, inside, v_token, 0, BLOCK_DV, DV)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            k_rest = k
            if REST_D:
                k_rest = _rows(K, key_at, inside, k_token, BLOCK_D, REST_D, D)
                s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
            if REST_DV:
                v_rest = _rows(V, key_at, inside, v_token, BLOCK_DV, REST_DV, DV)
                dp = tl.dot(grad_rest, tl.trans(v_rest), dp, input_precision=PRECISION)
            s, derivative = _scores(s, row, key, queries, keys, scale, softcap, BIAS, bias_row, bias_key, slope)
            weight = _weights(s, lse, rest, REST, 1)
            if PARTS == 1 or part > 0:
                seen = _seen(
                    row, key, queries, keys, left, right, MASK, mask_row, mask_key, prefix, LEFT, RIGHT, PREFIX
                )
                weight = tl.where(seen, weight, 0.0)
            if DROPOUT:
                dp = tl.where(
                    _kept(SEED, sequence * HEADS + head, first, start, threshold, BLOCK_M, BLOCK_N),
                    dp * kept_scale,
                    0.0,
                )
            ds = (weight * (dp - mean[:, None]) * derivative).to(q.dtype)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
            if REST_D:
                dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision=PRECISION)
    Q_GRAD += wide_batch * dq_batch + wide_head * dq_head + q_first * dq_token
    _store(Q_GRAD, at, exists, dq_token, dq * q_scale, 0, BLOCK_D, D)
    if REST_D:
        _store(Q_GRAD, at, exists, dq_token, dq_rest * q_scale, BLOCK_D, REST_D, D)


@triton.jit
def _row_limits(
    first,
    end,
    queries,
    keys,
    left,
    right,
    prefix,
    BLOCK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PREFIX: tl.constexpr,
    PARTS: tl.constexpr,
):
    """As `_limits`, with rows and keys exchanged: the rows that see keys from `first` to before `end`."""
    shift = keys - queries
    low, high = first * 0, queries
    if RIGHT:
        low = tl.maximum(first - right - shift, 0) // BLOCK * BLOCK
    if LEFT:
        high = tl.minimum(tl.maximum(end + left - shift, 0), queries)
    if PREFIX:
        low = tl.where(first < prefix, 0, low)
        high = tl.where(first < prefix, queries, high)
    inner_low, inner_high = low, low
    if PARTS > 1:
        if RIGHT:
            inner_low = tl.cdiv(tl.maximum(end - 1 - right - shift, 0), BLOCK) * BLOCK
            inner_low = tl.minimum(tl.maximum(inner_low, low), tl.cdiv(high, BLOCK) * BLOCK)
        inner_high = tl.cdiv(high, BLOCK) * BLOCK  # rows past the last have no weight in any case
        if LEFT:
            inner_high = tl.minimum(inner_high, tl.maximum(first + left - shift + 1, 0))
        inner_high = tl.maximum(inner_high // BLOCK * BLOCK, inner_low)
    return low, inner_low, inner_high, high


@triton.jit(do_not_specialize=["queries", "keys", "left", "right", "threshold"])
def backward_keys(
    Q, K, V, GRAD, LSE, REST, DELTA, Q_SUM, K_GRAD, V_GRAD, BIAS, MASK, SLOPES, PREFIXES, SEED, CU_Q, CU_K,
    queries, keys, left, right, scale, softcap, threshold, kept_scale, q_scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head, grad_token,
    sum_batch, sum_head, sum_token, dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token, lse_batch, lse_head,
    bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PARTS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_N keys and values of a key head, summed over the query heads that read it.

    With Q_SUM, the float32 sum of the queries' gradients (before q_scale), what these keys add to it goes there by
    atomics, in whatever order the programs come.
    """
    PREFIX: tl.constexpr = PREFIXES is not None
    block, _, owner = _block_of(keys, BLOCK_N)
    key_head, sequence, wide_head, wide_batch, q_first, queries, k_first, keys = _sequence(
        CU_Q, CU_K, queries, keys, owner, HEADS // GROUP
    )
    first = block * BLOCK_N
    if first >= keys:
        return
    K = _of_head(K, wide_batch, wide_head, k_batch, k_head, k_first * k_token)
    V = _of_head(V, wide_batch, wide_head, v_batch, v_head, k_first * v_token)
    prefix = _prefix(PREFIXES, sequence)

    key_at = first + tl.arange(0, BLOCK_N)
    inside = key_at < keys
    key = key_at[:, None]
    k = _rows(K, key_at, inside, k_token, 0, BLOCK_D, D)
    v = _rows(V, key_at, inside, v_token, 0, BLOCK_DV, DV)
    k_rest, v_rest = k, v
    if REST_D:
        k_rest = _rows(K, key_at, inside, k_token, BLOCK_D, REST_D, D)
    if REST_DV:
        v_rest = _rows(V, key_at, inside, v_token, BLOCK_DV, REST_DV, DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk_rest = tl.zeros([BLOCK_N, REST_D if REST_D else 1], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dv_rest = tl.zeros([BLOCK_N, REST_DV if REST_DV else 1], tl.float32)
    end = tl.minimum(first + BLOCK_N, keys)
    low, inner_low, inner_high, high = _row_limits(
        first, end, queries, keys, left, right, prefix, BLOCK_M, LEFT, RIGHT, PREFIX, PARTS
    )
    for part in tl.static_range(PARTS):
        begin, stop = low, high
        if PARTS > 1:
            if part == 0:
                begin, stop = inner_low, inner_high
            elif part == 1:
                stop = inner_low
            else:
                begin = inner_high
        # One loop over the blocks of all heads of the group: nested, it would start its loads anew for each head.
        count = tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_M)
        for index in tl.range(0, GROUP * count, num_stages=STAGES):
            head = key_head * GROUP + index // count
            start = begin + index % count * BLOCK_M
            at = start + tl.arange(0, BLOCK_M)
            exists = at < queries
            row = at[None, :]
            wide = head.to(tl.int64)
            Q_HEAD = _of_head(Q, wide_batch, wide, q_batch, q_head, q_first * q_token)
            GRAD_HEAD = _of_head(GRAD, wide_batch, wide, grad_batch, grad_head, q_first * grad_token)
            rows_at = wide_batch * lse_batch + wide * lse_head + q_first
            REST_HEAD = None
            if REST is not None:
                REST_HEAD = REST + rows_at
            BIAS_HEAD = _of_head(BIAS, wide_batch, wide, bias_batch, bias_head)
            MASK_HEAD = _of_head(MASK, wide_batch, wide, mask_batch, mask_head)
            slope = _slope(SLOPES, head)
            q = _rows(Q_HEAD, at, exists, q_token, 0, BLOCK_D, D)
            grad = _rows(GRAD_HEAD, at, exists, grad_token, 0, BLOCK_DV, DV)
            lse, rest, mean = _statistics(LSE + rows_at, REST_HEAD, DELTA + rows_at, at, exists)
            if PRECISION is not None:
                s = tl.trans(tl.dot(q, tl.trans(k), input_precision=PRECISION))
            else:
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            q_rest, grad_rest = q, grad
            if REST_D:
                q_rest = _rows(Q_HEAD, at, exists, q_token, BLOCK_D, REST_D, D)
                s = tl.dot(k_rest, tl.trans(q_rest), s, input_precision=PRECISION)
            if REST_DV:
                grad_rest = _rows(GRAD_HEAD, at, exists, grad_token, BLOCK_DV, REST_DV, DV)
                dp = tl.dot(v_rest, tl.trans(grad_rest), dp, input_precision=PRECISION)
            s, derivative = _scores(s, row, key, queries, keys, scale, softcap, BIAS_HEAD, bias_row, bias_key, slope)
            weight = _weights(s, lse, rest, REST, 0)
            if PARTS == 1 or part > 0:
                seen = _seen(
                    row, key, queries, keys, left, right, MASK_HEAD, mask_row, mask_key, prefix, LEFT, RIGHT, PREFIX
                )
                weight = tl.where(seen, weight, 0.0)
            kept = weight
            if DROPOUT:
                keep = tl.trans(_kept(SEED, sequence * HEADS + head, start, first, threshold, BLOCK_M, BLOCK_N))
                kept = tl.where(keep, weight * kept_scale, 0.0)
                dp = tl.where(keep, dp * kept_scale, 0.0)
            kept = kept.to(q.dtype)
            dv = tl.dot(kept, grad, dv, input_precision=PRECISION)
            ds = (weight * (dp - mean[None, :]) * derivative).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if Q_SUM is not None:
                SUM = Q_SUM + wide_batch * sum_batch + wide * sum_head + q_first * sum_token
                _add(SUM, at, exists, sum_token, tl.dot(tl.trans(ds), k, input_precision=PRECISION), 0, BLOCK_D, D)
                if REST_D:
                    more = tl.dot(tl.trans(ds), k_rest, input_precision=PRECISION)
                    _add(SUM, at, exists, sum_token, more, BLOCK_D, REST_D, D)
            if REST_DV:
                dv_rest = tl.dot(kept, grad_rest, dv_rest, input_precision=PRECISION)
            if REST_D:
                dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)
    K_GRAD += wide_batch * dk_batch + wide_head * dk_head + k_first * dk_token
    V_GRAD += wide_batch * dv_batch + wide_head * dv_head + k_first * dv_token
    _store(K_GRAD, key_at, inside, dk_token, dk * q_scale, 0, BLOCK_D, D)
    _store(V_GRAD, key_at, inside, dv_token, dv, 0, BLOCK_DV, DV)
    if REST_D:
        _store(K_GRAD, key_at, inside, dk_token, dk_rest * q_scale, BLOCK_D, REST_D, D)
    if REST_DV:
        _store(V_GRAD, key_at, inside, dv_token, dv_rest, BLOCK_DV, REST_DV, DV)


@triton.jit(do_not_specialize=["batches", "queries", "keys", "left", "right", "threshold"])
def backward_bias(
    Q,
    K,
    V,
    GRAD,
    LSE,
    REST,
    DELTA,
    BIAS_GRAD,
    BIAS,
    MASK,
    SLOPES,
    PREFIXES,
    SEED,
    batches,
    queries,
    keys,
    left,
    right,
    scale,
    softcap,
    threshold,
    kept_scale,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    grad_batch,
    grad_head,
    grad_token,
    lse_batch,
    lse_head,
    bias_batch,
    bias_head,
    bias_row,
    bias_key,
    mask_batch,
    mask_head,
    mask_row,
    mask_key,
    BATCHED: tl.constexpr,
    HEADED: tl.constexpr,
    ROWED: tl.constexpr,
    KEYED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    REST_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a tile of the bias (contiguous), summed over the dimensions in which the bias has one element."""
    PREFIX: tl.constexpr = PREFIXES is not None
    key_block, _, above = _block_of(keys if KEYED else 1, BLOCK_N)
    row_blocks = tl.cdiv(queries, BLOCK_M) if ROWED else 1
    row_block, owner = above % row_blocks, above // row_blocks
    bias_heads = HEADS if HEADED else 1
    bias_batch_at, bias_head_at = owner // bias_heads, owner % bias_heads
    b_begin, b_end = bias_batch_at * 0, batches
    if BATCHED:
        b_begin, b_end = bias_batch_at, bias_batch_at + 1
    h_begin, h_end = bias_head_at * 0, HEADS
    if HEADED:
        h_begin, h_end = bias_head_at, bias_head_at + 1
    m_begin, m_end = row_block * 0, queries
    if ROWED:
        m_begin, m_end = row_block * BLOCK_M, tl.minimum((row_block + 1) * BLOCK_M, queries)
    n_begin, n_end = key_block * 0, keys
    if KEYED:
        n_begin, n_end = key_block * BLOCK_N, tl.minimum((key_block + 1) * BLOCK_N, keys)
    found = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in range(b_begin, b_end):
        prefix = _prefix(PREFIXES, batch)
        for head in range(h_begin, h_end):
            wide_batch, wide_head = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
            Q_HEAD = _of_head(Q, wide_batch, wide_head, q_batch, q_head)
            K_HEAD = _of_head(K, wide_batch, wide_head // GROUP, k_batch, k_head)
            V_HEAD = _of_head(V, wide_batch, wide_head // GROUP, v_batch, v_head)
            GRAD_HEAD = _of_head(GRAD, wide_batch, wide_head, grad_batch, grad_head)
            BIAS_HEAD = _of_head(BIAS, wide_batch, wide_head, bias_batch, bias_head)
            MASK_HEAD = _of_head(MASK, wide_batch, wide_head, mask_batch, mask_head)
            slope = _slope(SLOPES, head)
            rows_at = wide_batch * lse_batch + wide_head * lse_head
            REST_HEAD = None
            if REST is not None:
                REST_HEAD = REST + rows_at
            for m in range(m_begin, m_end, BLOCK_M):
                at = m + tl.arange(0, BLOCK_M)
                exists = at < queries
                lse, rest, mean = _statistics(LSE + rows_at, REST_HEAD, DELTA + rows_at, at, exists)
                q = _rows(Q_HEAD, at, exists, q_token, 0, BLOCK_D, D)
                grad = _rows(GRAD_HEAD, at, exists, grad_token, 0, BLOCK_DV, DV)
                q_rest, grad_rest = q, grad
                if REST_D:
                    q_rest = _rows(Q_HEAD, at, exists, q_token, BLOCK_D, REST_D, D)
                if REST_DV:
                    grad_rest = _rows(GRAD_HEAD, at, exists, grad_token, BLOCK_DV, REST_DV, DV)
                end = tl.minimum(m + BLOCK_M, queries)
                low, inner_low, inner_high, high = _limits(
                    m, end, queries, keys, left, right, prefix, BLOCK_N, LEFT, RIGHT, PREFIX, 1
                )
                for n in range(tl.maximum(n_begin, low), tl.minimum(n_end, high), BLOCK_N):
                    key_at = n + tl.arange(0, BLOCK_N)
                    inside = key_at < keys
                    row, key = at[:, None], key_at[None, :]
                    k = _rows(K_HEAD, key_at, inside, k_token, 0, BLOCK_D, D)
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    if REST_D:
                        k_rest = _rows(K_HEAD, key_at, inside, k_token, BLOCK_D, REST_D, D)
                        s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
                    v = _rows(V_HEAD, key_at, inside, v_token, 0, BLOCK_DV, DV)
                    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                    if REST_DV:
                        v_rest = _rows(V_HEAD, key_at, inside, v_token, BLOCK_DV, REST_DV, DV)
                        dp = tl.dot(grad_rest, tl.trans(v_rest), dp, input_precision=PRECISION)
                    s, derivative = _scores(
                        s, row, key, queries, keys, scale, softcap, BIAS_HEAD, bias_row, bias_key, slope
                    )
                    seen = _seen(
                        row, key, queries, keys, left, right, MASK_HEAD, mask_row, mask_key, prefix, LEFT, RIGHT, PREFIX
                    )
                    weight = tl.where(seen, _weights(s, lse, rest, REST, 1), 0.0)
                    if DROPOUT:
                        dp = tl.where(
                            _kept(SEED, batch * HEADS + head, m, n, threshold, BLOCK_M, BLOCK_N), dp * kept_scale, 0.0
                        )
                    found += weight * (dp - mean[:, None])
    row_at = tl.arange(0, BLOCK_M)
    key_at = tl.arange(0, BLOCK_N)
    rows, keys_ = queries, keys
    if ROWED:
        row_at += row_block * BLOCK_M
    else:
        found = tl.where(row_at[:, None] == 0, tl.sum(found, 0)[None, :], 0.0)
        rows = 1
    if KEYED:
        key_at += key_block * BLOCK_N
    else:
        found = tl.where(key_at[None, :] == 0, tl.sum(found, 1)[:, None], 0.0)
        keys_ = 1
    place = (owner.to(tl.int64) * rows + row_at[:, None]) * keys_ + key_at[None, :]
    inside = (row_at < rows)[:, None] & (key_at < keys_)[None, :]
    tl.store(BIAS_GRAD + place, found.to(BIAS_GRAD.dtype.element_ty), mask=inside)
