"""The forward kernel of attention for training, and what the backward kernels (`_attention_backward.py`) share with it.

Dense and packed calls share the kernels: a packed call (CU_Q) has a batch stride of zero and finds its tokens by the
ends of the sequences, which the host never reads. Scores are in base 2 within a kernel. A block of keys in which no row
hides a key skips the tests of visibility: `PARTS` says how many kinds of blocks a call has (1: all are tested; 2: those
at one edge; 3: those at both).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_entropy import _tanh

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _span(CU, length, sequence):
    """The first token of a sequence and its length, which is `length` where nothing is packed."""
    first = sequence * 0
    if CU is not None:
        first = tl.load(CU + sequence)
        length = tl.load(CU + sequence + 1) - first
    return first.to(tl.int64), length


@triton.jit
def _block_of(length, BLOCK: tl.constexpr):
    """Which of its blocks of rows or keys a program has, how many there are, and whose. All programs stand in the first
    dimension of the grid: the others end at 65,535, which a batch of windows or of time series passes.
    """
    blocks = tl.cdiv(length, BLOCK)
    return tl.program_id(0) % blocks, blocks, tl.program_id(0) // blocks


@triton.jit
def _sequence(CU_Q, CU_K, queries, keys, owner, HEADS: tl.constexpr):
    """Whose head and sequence a program has, as numbers for addresses (64 bits) too; where the queries and the keys of
    the sequence begin, and how many there are.
    """
    head, sequence = owner % HEADS, owner // HEADS
    q_first, queries = _span(CU_Q, queries, sequence)
    k_first, keys = _span(CU_K, keys, sequence)
    return head, sequence, head.to(tl.int64), sequence.to(tl.int64), q_first, queries, k_first, keys


@triton.jit
def _of_head(X, batch, head, by_batch, by_head, rows=0):
    at = None  # as X is
    if X is not None:
        at = X + (batch * by_batch + head * by_head + rows)
    return at


@triton.jit
def _prefix(PREFIXES, sequence):
    prefix = 0
    if PREFIXES is not None:
        prefix = tl.load(PREFIXES + sequence)
    return prefix


@triton.jit
def _rows(X, at, exists, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    """Elements FIRST to FIRST + WIDTH of rows; zeros from END on, and for rows that do not exist."""
    col = FIRST + tl.arange(0, WIDTH)[None, :]
    mask = exists[:, None]
    if FIRST + WIDTH > END:
        mask = mask & (col < END)
    return tl.load(X + at.to(tl.int64)[:, None] * stride + col, mask=mask, other=0.0)


@triton.jit
def _store(X, at, exists, stride, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    col = FIRST + tl.arange(0, WIDTH)[None, :]
    mask = exists[:, None] & (col < END)
    tl.store(X + at.to(tl.int64)[:, None] * stride + col, x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _add(X, at, exists, stride, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    col = FIRST + tl.arange(0, WIDTH)[None, :]
    mask = exists[:, None] & (col < END)
    tl.atomic_add(X + at.to(tl.int64)[:, None] * stride + col, x, mask=mask, sem="relaxed")


@triton.jit
def _of_scores(X, row, key, queries, keys, by_row, by_key):
    """A mask's or a bias's elements of a tile of scores. Strides of None are those of dimensions that it is the same
    in: a mask of padding then needs an address a key, and not one a score.
    """
    if by_row is None:
        return tl.load(X + key.to(tl.int64) * by_key, mask=key < keys, other=0)
    elif by_key is None:
        return tl.load(X + row.to(tl.int64) * by_row, mask=row < queries, other=0)
    else:
        at = row.to(tl.int64) * by_row + key.to(tl.int64) * by_key
        return tl.load(X + at, mask=(row < queries) & (key < keys), other=0)


@triton.jit
def _seen(
    row,
    key,
    queries,
    keys,
    left,
    right,
    MASK,
    mask_row,
    mask_key,
    prefix,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PREFIX: tl.constexpr,
):
    """Whether rows see keys; `row` and `key` broadcast against each other."""
    inside = (row < queries) & (key < keys)
    seen = inside
    if LEFT:
        seen = seen & (key >= row + (keys - queries) - left)
    if RIGHT:
        seen = seen & (key <= row + (keys - queries) + right)
    if PREFIX:
        seen = seen | (inside & (key < prefix))
    if MASK is not None:
        seen = seen & (_of_scores(MASK, row, key, queries, keys, mask_row, mask_key) != 0)
    return seen


@triton.jit
def _scores(product, row, key, queries, keys, scale, softcap, BIAS, bias_row, bias_key, slope):
    """Scores in base 2 and, with a softcap, the derivative by the product (1 without)."""
    s = product * scale
    derivative = 1.0
    if softcap is not None:
        t = _tanh(s)
        s = softcap * t
        derivative = 1.0 - t * t
    if BIAS is not None:
        s += _of_scores(BIAS, row, key, queries, keys, bias_row, bias_key).to(tl.float32) * _LOG2E
    if slope is not None:
        s -= slope * tl.abs(row + (keys - queries) - key).to(tl.float32)
    return s, derivative


@triton.jit
def _kept(SEED, head, first_row, first_key, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What dropout keeps of a tile (BLOCK_M, BLOCK_N), as `bigkernels.ops._dropout.keep_mask` defines it."""
    seed = tl.load(SEED).to(tl.uint64)
    row = (first_row + tl.arange(0, BLOCK_M))[:, None]
    if BLOCK_N % 64 == 0:  # each of the four words of a random number is used
        lane = tl.arange(0, BLOCK_N // 4)[None, :]
        zero = (row * 0 + lane * 0).to(tl.uint32)
        counter = zero + (first_key // 4 + lane).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, counter, zero + row.to(tl.uint32), zero + tl.cast(head, tl.uint32), zero)
        even = tl.join(w0 >= threshold, w2 >= threshold)
        odd = tl.join(w1 >= threshold, w3 >= threshold)
        words = tl.reshape(tl.join(even, odd).to(tl.int8), [BLOCK_M, BLOCK_N // 64, 16, 4])
        return tl.reshape(tl.permute(words, [0, 1, 3, 2]), [BLOCK_M, BLOCK_N]) != 0
    else:
        key = (first_key + tl.arange(0, BLOCK_N))[None, :]
        zero = (row * 0 + key * 0).to(tl.uint32)
        counter = zero + (key // 64 * 16 + key % 16).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, counter, zero + row.to(tl.uint32), zero + tl.cast(head, tl.uint32), zero)
        word = key % 64 // 16
        return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)) >= threshold


@triton.jit
def _slope(SLOPES, head):
    slope = None
    if SLOPES is not None:
        slope = tl.load(SLOPES + head).to(tl.float32) * _LOG2E
    return slope


@triton.jit
def _limits(
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
    """For rows from `first` to before `end`: where their keys begin, where blocks that all rows see whole begin and
    end, and where keys end. The first three are multiples of BLOCK.
    """
    shift = keys - queries
    low, high = first * 0, keys
    if LEFT:
        low = tl.maximum(first + shift - left, 0) // BLOCK * BLOCK
    if RIGHT:
        high = tl.minimum(tl.maximum(end + shift + right, 0), keys)
    if PREFIX:
        low = tl.where(prefix > 0, 0, low)
        high = tl.maximum(high, tl.minimum(prefix, keys))
    inner_low, inner_high = low, low
    if PARTS > 1:
        if LEFT:
            inner_low = tl.cdiv(tl.maximum(end - 1 + shift - left, 0), BLOCK) * BLOCK
            inner_low = tl.minimum(tl.maximum(inner_low, low), tl.cdiv(high, BLOCK) * BLOCK)
        inner_high = high
        if RIGHT:
            inner_high = tl.minimum(high, tl.maximum(first + shift + right + 1, 0))
        inner_high = tl.maximum(inner_high // BLOCK * BLOCK, inner_low)
    return low, inner_low, inner_high, high


@triton.jit(do_not_specialize=["queries", "keys", "left", "right", "threshold"])
def attend(
    Q, K, V, OUT, LSE, REST, BIAS, MASK, SLOPES, SINKS, PREFIXES, SEED, CU_Q, CU_K,
    queries, keys, left, right, scale, softcap, threshold, kept_scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token,
    lse_batch, lse_head, bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PARTS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and logsumexp of BLOCK_M queries of a head; or, with REST, the logsumexp alone, as backward reads it: in
    base 2, and what its rounding left.
    """
    PREFIX: tl.constexpr = PREFIXES is not None
    block, blocks, owner = _block_of(queries, BLOCK_M)
    head, sequence, wide_head, wide_batch, q_first, queries, k_first, keys = _sequence(
        CU_Q, CU_K, queries, keys, owner, HEADS
    )
    # The last rows first: with causal attention they have the most keys, and the short ones fill what is left.
    first = (blocks - 1 - block) * BLOCK_M
    if first >= queries:
        return
    Q = _of_head(Q, wide_batch, wide_head, q_batch, q_head, q_first * q_token)
    K = _of_head(K, wide_batch, wide_head // GROUP, k_batch, k_head, k_first * k_token)
    V = _of_head(V, wide_batch, wide_head // GROUP, v_batch, v_head, k_first * v_token)
    BIAS = _of_head(BIAS, wide_batch, wide_head, bias_batch, bias_head)
    MASK = _of_head(MASK, wide_batch, wide_head, mask_batch, mask_head)
    slope = _slope(SLOPES, head)
    prefix = _prefix(PREFIXES, sequence)

    at = first + tl.arange(0, BLOCK_M)
    exists = at < queries
    row = at[:, None]
    q = _rows(Q, at, exists, q_token, 0, BLOCK_D, D)
    q_rest = q
    if REST_D:
        q_rest = _rows(Q, at, exists, q_token, BLOCK_D, REST_D, D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, REST_DV if REST_DV else 1], tl.float32)
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
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if REST_D:
                k_rest = _rows(K, key_at, inside, k_token, BLOCK_D, REST_D, D)
                s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
            s, _ = _scores(s, row, key, queries, keys, scale, softcap, BIAS, bias_row, bias_key, slope)
            if PARTS == 1 or part > 0:
                seen = _seen(
                    row, key, queries, keys, left, right, MASK, mask_row, mask_key, prefix, LEFT, RIGHT, PREFIX
                )
                s = tl.where(seen, s, float("-inf"))
            before, top = top, tl.maximum(top, tl.max(s, 1))
            shift = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.exp2(s - shift[:, None])
            decay = tl.exp2(before - shift)
            total = total * decay + tl.sum(weight, 1)
            if DROPOUT:
                weight = tl.where(
                    _kept(SEED, sequence * HEADS + head, first, start, threshold, BLOCK_M, BLOCK_N), weight, 0.0
                )
            weight = weight.to(q.dtype)
            v = _rows(V, key_at, inside, v_token, 0, BLOCK_DV, DV)
            acc = tl.dot(weight, v, acc * decay[:, None], input_precision=PRECISION)
            if REST_DV:
                v_rest = _rows(V, key_at, inside, v_token, BLOCK_DV, REST_DV, DV)
                acc_rest = tl.dot(weight, v_rest, acc_rest * decay[:, None], input_precision=PRECISION)

    if SINKS is not None:
        sink = tl.load(SINKS + head).to(tl.float32) * _LOG2E
        before, top = top, tl.maximum(top, sink)
        shift = tl.where(top == float("-inf"), 0.0, top)
        decay = tl.exp2(before - shift)
        total = total * decay + tl.exp2(sink - shift)
        acc *= decay[:, None]
        acc_rest *= decay[:, None]
    nothing = total == 0.0
    place = wide_batch * lse_batch + wide_head * lse_head + q_first + at
    lse = tl.where(nothing, float("-inf"), top + tl.log2(total))
    if REST is not None:
        tl.store(LSE + place, tl.where(nothing, float("inf"), lse), mask=exists)
        tl.store(REST + place, tl.where(nothing, 0.0, (top - lse) + tl.log2(total)), mask=exists)
    else:
        tl.store(LSE + place, lse * _LN2, mask=exists)
        factor = kept_scale / tl.where(nothing, 1.0, total)
        OUT += wide_batch * out_batch + wide_head * out_head + q_first * out_token
        _store(OUT, at, exists, out_token, acc * factor[:, None], 0, BLOCK_DV, DV)
        if REST_DV:
            _store(OUT, at, exists, out_token, acc_rest * factor[:, None], BLOCK_DV, REST_DV, DV)
