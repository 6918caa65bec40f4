"""The kernels of decode attention: a few queries a sequence over a long cache, so the keys are split among programs.

All blocks of keys of all sequences form one line, and of `programs` programs a key head each takes an equal part of it,
whatever the lengths are. A program reads the lengths from device memory, finds its part, and walks over the sequences
in it. Where a sequence lies in one part, its result is final. Any other leaves one partial result in each part it has,
which `merge` joins. A part has at most two of those, at its ends: slot 2p + 1 for the sequence that goes on in the next
part, slot 2p for the one that comes from the last. Nothing depends on the order in which programs run.

The queries of all heads on one key head and of all new tokens are the rows of one tile: row (h % G) * queries + i.
Scores and log-sum-exps are in base 2 until they are returned. int8 caches are read as int16, two neighbours at a time:
matrix units take operands apart by 16 bits, so that a byte of the values would have to be fetched by itself. The even
and the odd elements of a head have products of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_entropy import _tanh

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Weights are multiplied by the values' scales before they are rounded: float16 has no small numbers, but these at 2^6
# times their size fit, up to scales that no float16 value has.
_LIFT = tl.constexpr(64.0)


@triton.jit
def _span(SEQLENS, sequence, inside, sizes, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Length of a sequence, the first block of keys that a query sees, and the number of blocks from there on."""
    batches, capacity, queries, programs, left = sizes
    if SEQLENS is None:
        length = tl.where(inside, capacity, 0)
    else:
        length = tl.load(SEQLENS + sequence, mask=inside, other=0)
        length = tl.minimum(tl.maximum(length, 0), capacity)
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - queries - left, 0) // BLOCK
    return length, first, (length + BLOCK - 1) // BLOCK - first


@triton.jit
def _part(SEQLENS, limit, sizes, LEAST: tl.constexpr, SCAN: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """The number of all blocks, how many of them a program takes, and how many come before sequence `limit`."""
    batches, capacity, queries, programs, left = sizes
    total = tl.zeros([SCAN], tl.int32)
    before = tl.zeros([SCAN], tl.int32)
    for start in range(0, batches, SCAN):
        sequence = start + tl.arange(0, SCAN)
        _, _, count = _span(SEQLENS, sequence, sequence < batches, sizes, BLOCK, WINDOW)
        total += count
        before += tl.where(sequence < limit, count, 0)
    total = tl.sum(total, 0)
    return total, tl.maximum((total + programs - 1) // programs, LEAST), tl.sum(before, 0)


@triton.jit
def _locate(SEQLENS, at, sizes, SCAN: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """The sequence that has block `at` of all blocks, and the number of blocks before it."""
    batches, capacity, queries, programs, left = sizes
    found = tl.zeros([SCAN], tl.int32)
    before = tl.zeros([SCAN], tl.int32)
    seen = 0
    for start in range(0, batches, SCAN):
        sequence = start + tl.arange(0, SCAN)
        _, _, count = _span(SEQLENS, sequence, sequence < batches, sizes, BLOCK, WINDOW)
        passed = seen + tl.cumsum(count, 0) <= at
        found += passed.to(tl.int32)
        before += tl.where(passed, count, 0)
        seen += tl.sum(count, 0)
    return tl.sum(found, 0), tl.sum(before, 0)


@triton.jit
def _page(PAGES, block, length, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """The page that has a block of keys, or the page of each key where pages are not multiples of blocks."""
    key = block * BLOCK
    if PAGE % BLOCK:
        key += tl.arange(0, BLOCK)
    return tl.load(PAGES + tl.cast(key, tl.uint32) // PAGE, mask=key < length, other=0)


@triton.jit
def _at(page, start, slot, page_stride, token_stride):
    """Offsets of tokens. What can be large is multiplied in 64 bits; `slot` is a place in a block or a page."""
    return tl.cast(page, tl.int64) * page_stride + tl.cast(start, tl.int64) * token_stride + slot * token_stride


@triton.jit
def _tile(rows, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, STEP: tl.constexpr = 1):
    """Elements FIRST to FIRST + WIDTH, STEP apart, of `rows`; zeros from END on and where `mask` is false."""
    col = FIRST + tl.arange(0, WIDTH)
    mask = mask[:, None]
    if FIRST + WIDTH > END:
        mask = mask & (col < END)[None, :]
    return tl.load(rows[:, None] + (STEP * col)[None, :], mask=mask, other=0)


@triton.jit
def _unpack(x, TYPE: tl.constexpr):
    """The low and the high bytes of int16 elements as TYPE; conversions of integers would take a slow unit."""
    if TYPE == tl.bfloat16:
        # 0x4300 is 128, in steps of 1: 128 + the low 7 bits, less 256 for negative values and 128 for others. In
        # assembly, because the compiler would take the two elements of a register apart.
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 x, bits, sign, base, minus, a, b;
            mov.b32 bits, 0x007f007f;
            mov.b32 sign, 0x00800080;
            mov.b32 base, 0x43004300;
            mov.b32 minus, 0xbf80bf80;
            lop3.b32 a, $2, bits, base, 0xea;
            lop3.b32 b, $2, sign, base, 0xea;
            fma.rn.bf16x2 $0, b, minus, a;
            shr.u32 x, $2, 8;
            lop3.b32 a, x, bits, base, 0xea;
            lop3.b32 b, x, sign, base, 0xea;
            fma.rn.bf16x2 $1, b, minus, a;
            }
            """,
            "=&r,=&r,r",
            [x],
            (tl.bfloat16, tl.bfloat16),
            True,
            2,
        )
    elif TYPE == tl.float16:
        # 0x6400 is 1024, in steps of 1: 1024 + (the value + 128).
        x = x.to(tl.uint16, bitcast=True) ^ 0x8080
        low = ((x & 0xFF) | 0x6400).to(TYPE, bitcast=True) - 1152.0
        high = ((x >> 8) | 0x6400).to(TYPE, bitcast=True) - 1152.0
    else:
        low = ((x << 8) >> 8).to(TYPE)
        high = (x >> 8).to(TYPE)
    return low, high


@triton.jit
def _product(q, q_odd, k, PACK: tl.constexpr, PRECISION: tl.constexpr):
    if PACK == 2:
        k, k_odd = _unpack(k, q.dtype)
        odd = tl.dot(q_odd, tl.trans(k_odd), input_precision=PRECISION)
        return tl.dot(q, tl.trans(k), odd, input_precision=PRECISION)
    else:
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit(do_not_specialize=["batches", "capacity", "queries", "programs", "left", "right", "table_sequence"])
def split(
    Q,
    K,
    V,
    SEQLENS,
    TABLE,
    K_SCALE,
    V_SCALE,
    SLOPES,
    SINKS,
    OUT,
    LSE,
    PART,
    PART_LSE,
    batches,
    capacity,
    queries,
    programs,
    left,
    right,
    scale,
    softcap,
    q_batch,
    q_head,
    q_token,
    k_page,
    k_token,
    k_head,
    v_page,
    v_token,
    v_head,
    ks_page,
    ks_token,
    ks_head,
    vs_page,
    vs_token,
    vs_head,
    table_sequence,
    out_batch,
    out_head,
    out_token,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SCAN: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    TWINS: tl.constexpr,
    PACK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads vary fastest: programs that read neighbouring rows of one page run at the same time.
    row_block = tl.program_id(0) % ROW_BLOCKS
    key_head = tl.program_id(0) // ROW_BLOCKS % HEADS
    program = tl.program_id(0) // (ROW_BLOCKS * HEADS)
    sizes = (batches, capacity, queries, programs, left)
    total, part, _ = _part(SEQLENS, 0, sizes, LEAST, SCAN, BLOCK, WINDOW)
    at = program * part
    end = tl.minimum(at + part, total)
    if at >= end:
        return
    sequence, before = _locate(SEQLENS, at, sizes, SCAN, BLOCK, WINDOW)

    row = row_block * ROWS + tl.arange(0, ROWS)
    exists = row < GROUP * queries
    head = key_head * GROUP + row // queries
    token = row % queries
    wide_head, wide_token = head.to(tl.int64), token.to(tl.int64)
    flat = key_head * GROUP * queries + row
    all_rows = HEADS * GROUP * queries
    K += key_head.to(tl.int64) * k_head
    V += key_head.to(tl.int64) * v_head
    if PACK == 2:
        K_SCALE += key_head.to(tl.int64) * ks_head
        V_SCALE += key_head.to(tl.int64) * vs_head

    while at < end:
        length, first, count = _span(SEQLENS, sequence, at < end, sizes, BLOCK, WINDOW)
        stop = tl.minimum(before + count, end)
        if at < stop:
            batch = sequence.to(tl.int64)
            position = length - queries + token
            lowest = 0
            if WINDOW:
                lowest = tl.maximum(length - queries - left, 0)
            q_rows = Q + batch * q_batch + wide_head * q_head + wide_token * q_token
            q = _tile(q_rows, exists, 0, BLOCK_D, D, PACK)
            q_odd, q_rest, q_rest_odd = q, q, q
            if BLOCK_REST:
                q_rest = _tile(q_rows, exists, BLOCK_D, BLOCK_REST, D, PACK)
            if PACK == 2:
                q_odd = _tile(q_rows + 1, exists, 0, BLOCK_D, D, PACK)
                if BLOCK_REST:
                    q_rest_odd = _tile(q_rows + 1, exists, BLOCK_D, BLOCK_REST, D, PACK)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            # Columns apart: the sum of a row is needed once, and every time it would wait for other warps.
            sums = tl.zeros([ROWS, BLOCK], tl.float32)
            acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
            acc_odd = acc
            # A page's number is fetched one block ahead. Were it fetched with the keys that wait for it, the compiler
            # would spend half of the stages on it; it sees a load that is carried over only where nothing is between.
            next_page = sequence
            PAGES = TABLE
            if TABLE is not None:
                PAGES = TABLE + batch * table_sequence
                next_page = _page(PAGES, first + at - before, length, BLOCK, PAGE)
            for block in tl.range(first + at - before, first + stop - before, num_stages=STAGES):
                key = block * BLOCK + tl.arange(0, BLOCK)
                # What a cache holds beyond the length may be NaN, so weights of zero are not enough to hide it.
                inside = (key >= lowest) & (key < length)
                page = next_page
                start = block * BLOCK
                slot = tl.arange(0, BLOCK)
                if TABLE is not None:
                    next_page = _page(PAGES, block + 1, length, BLOCK, PAGE)
                    if PAGE % BLOCK:
                        start = start * 0
                        slot = (key.to(tl.uint32) % PAGE).to(tl.int32)
                    else:
                        start = tl.cast(start, tl.uint32) % PAGE
                k_at = _at(page, start, slot, k_page, k_token)
                s = _product(q, q_odd, _tile(K + k_at, inside, 0, BLOCK_D, D), PACK, PRECISION)
                if BLOCK_REST:
                    rest = _tile(K + k_at, inside, BLOCK_D, BLOCK_REST, D)
                    s += _product(q_rest, q_rest_odd, rest, PACK, PRECISION)
                if PACK == 2:
                    scale_at = _at(page, start, slot, ks_page, ks_token)
                    s *= tl.load(K_SCALE + scale_at, mask=inside, other=0.0)[None, :]
                s *= scale
                if softcap is not None:
                    s = softcap * _tanh(s)
                if SLOPES is not None:
                    slope = tl.load(SLOPES + head, mask=exists, other=0.0).to(tl.float32) * _LOG2E
                    s -= slope[:, None] * tl.abs(position[:, None] - key[None, :]).to(tl.float32)
                seen = inside[None, :]
                if CAUSAL:
                    seen = seen & (key[None, :] <= position[:, None] + right)
                if WINDOW:
                    seen = seen & (key[None, :] >= position[:, None] - left)
                s = tl.where(seen, s, float("-inf"))

                before_top, top = top, tl.maximum(top, tl.max(s, 1))
                shift = tl.where(top == float("-inf"), 0.0, top)
                weight = tl.exp2(s - shift[:, None])
                decay = tl.exp2(before_top - shift)[:, None]
                sums = sums * decay + weight
                v_at = k_at
                if not TWINS:
                    v_at = _at(page, start, slot, v_page, v_token)
                v = _tile(V + v_at, inside, 0, BLOCK_DV, DV)
                if PACK == 2:
                    if not TWINS:
                        scale_at = _at(page, start, slot, vs_page, vs_token)
                    weight *= (tl.load(V_SCALE + scale_at, mask=inside, other=0.0) * _LIFT)[None, :]
                    weight = weight.to(q.dtype)
                    v, v_odd = _unpack(v, q.dtype)
                    acc_odd = tl.dot(weight, v_odd, acc_odd * decay, input_precision=PRECISION)
                acc = tl.dot(weight.to(q.dtype), v, acc * decay, input_precision=PRECISION)

            total_weight = tl.sum(sums, 1)
            nothing = total_weight == 0.0
            divisor = tl.where(nothing, 1.0, total_weight)
            if PACK == 2:
                acc = tl.reshape(tl.join(acc, acc_odd), [ROWS, PACK * BLOCK_DV])
                divisor *= _LIFT
            acc /= divisor[:, None]
            lse = tl.where(nothing, float("-inf"), top + tl.log2(total_weight))
            if stop - at == count:
                out_rows = OUT + batch * out_batch + wide_head * out_head + wide_token * out_token
                _finish(out_rows, LSE + batch * all_rows + flat, SINKS, acc, lse, head, exists, PACK * DV)
            else:
                place = (2 * program + (at == before).to(tl.int32)).to(tl.int64) * all_rows + flat
                _store(PART + place * (PACK * DV), acc, exists, PACK * DV)
                tl.store(PART_LSE + place, lse, mask=exists)
        at = tl.maximum(at, stop)
        before += count
        sequence += 1


@triton.jit
def _store(rows, x, exists, END: tl.constexpr):
    col = tl.arange(0, x.shape[1])[None, :]
    tl.store(rows[:, None] + col, x.to(rows.dtype.element_ty), mask=exists[:, None] & (col < END))


@triton.jit
def _finish(out_rows, lse_rows, SINKS, acc, lse, head, exists, DV: tl.constexpr):
    """Write normalised rows, after the sinks have taken their weight."""
    if SINKS is not None:
        sink = tl.load(SINKS + head, mask=exists, other=float("-inf")).to(tl.float32) * _LOG2E
        top = tl.maximum(lse, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        both = top + tl.log2(tl.exp2(lse - top) + tl.exp2(sink - top))
        acc *= tl.where(lse == float("-inf"), 0.0, tl.exp2(lse - both))[:, None]
        lse = both
    _store(out_rows, acc, exists, DV)
    tl.store(lse_rows, lse * _LN2, mask=exists)


@triton.jit(do_not_specialize=["batches", "capacity", "queries", "programs", "left", "rows"])
def merge(
    PART,
    PART_LSE,
    SEQLENS,
    SINKS,
    OUT,
    LSE,
    batches,
    capacity,
    queries,
    programs,
    left,
    rows,
    out_batch,
    out_head,
    out_token,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    SCAN: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Results of sequences that lie in several parts, or are empty; `rows` are all heads' queries of a sequence."""
    row_blocks = tl.cdiv(rows, ROWS)
    sequence = tl.program_id(0) // row_blocks
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    sizes = (batches, capacity, queries, programs, left)
    _, part, before = _part(SEQLENS, sequence, sizes, LEAST, SCAN, BLOCK, WINDOW)
    _, _, count = _span(SEQLENS, sequence, sequence < batches, sizes, BLOCK, WINDOW)
    first = before // part
    end = tl.where(count > 0, (before + count - 1) // part + 1, first)
    if end - first == 1:
        return
    exists = row < rows
    col = tl.arange(0, BLOCK_DV)[None, None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for start in range(first, end, SLOTS):
        program = start + tl.arange(0, SLOTS)
        there = (program < end)[:, None] & exists[None, :]
        place = (2 * program + (program == first).to(tl.int32)).to(tl.int64)[:, None] * rows + row[None, :]
        lse = tl.load(PART_LSE + place, mask=there, other=float("-inf"))
        found = tl.load(PART + (place[:, :, None] * DV + col), mask=there[:, :, None] & (col < DV), other=0.0)
        before_top, top = top, tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(lse - shift[None, :])
        decay = tl.exp2(before_top - shift)
        sums = sums * decay + tl.sum(weight, 0)
        acc = acc * decay[:, None] + tl.sum(found * weight[:, :, None], 0)
    nothing = sums == 0.0
    acc /= tl.where(nothing, 1.0, sums)[:, None]
    lse = tl.where(nothing, float("-inf"), top + tl.log2(sums))
    batch = sequence.to(tl.int64)
    head = row // queries
    out_rows = OUT + batch * out_batch + head.to(tl.int64) * out_head + (row % queries).to(tl.int64) * out_token
    _finish(out_rows, LSE + batch * rows + row, SINKS, acc, lse, head, exists, DV)
