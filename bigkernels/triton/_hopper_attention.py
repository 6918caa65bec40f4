"""Attention on Hopper's own instructions, in Gluon: warps that load, and groups of warps that compute.

One warp copies tiles by the tensor memory accelerator into a ring in shared memory and knows of nothing else; each
group of four warps owns 64 rows (or keys) and multiplies what is there. Two barriers a slot carry the word: `full`,
the bytes are there, and `empty`, every group has read them. Slot and phase of a tile follow from its number alone: tile
i is in slot i % STAGES for the (i // STAGES)-th time.

Descriptors are made by each program for its own sequence and head, so that rows past the end of a packed sequence are
zeros and are not written, whatever follows it in memory. Scores are in base 2. `bigkernels.triton._attention` is the
same arithmetic on any GPU, with what is left out here: biases, masks, slopes, prefixes, dropout, float32, other heads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import _attention, _attention_backward, cross_entropy

_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)

_span = gluon.jit(_attention._span.fn)
_sequence = gluon.jit(_attention._sequence.fn)
_of_head = gluon.jit(_attention._of_head.fn)
_limits = gluon.jit(_attention._limits.fn)
_tanh = gluon.jit(cross_entropy._tanh.fn)
_row_limits = gluon.jit(_attention_backward._row_limits.fn)


@gluon.jit
def _tile(base, rows, stride, COUNT: gl.constexpr, D: gl.constexpr):
    """A descriptor of rows (rows, D) of 16-bit elements, read and written COUNT at a time."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return tma.make_tensor_descriptor(base, [gl.maximum(rows, 1), D], [stride, 1], [COUNT, D], layout)


@gluon.jit
def _ring(DTYPE: gl.constexpr, SLOTS: gl.constexpr, COUNT: gl.constexpr, D: gl.constexpr):
    """SLOTS tiles (COUNT, D) in shared memory."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return gl.allocate_shared_memory(DTYPE, [SLOTS, COUNT, D], layout)


@gluon.jit
def _barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.constexpr_function
def _scores_layout(COLUMNS):
    """Of 64 rows among four warps, in the results of products that are COLUMNS wide."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])


@gluon.jit
def _load_rows_then_blocks(
    descriptors, tiles, barriers, work, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """The copying warp of `attend`."""
    q_desc, k_desc, v_desc = descriptors
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_empty, v_full, v_empty = barriers
    first, low, count = work
    D: gl.constexpr = k_tiles.shape[2]
    if count > 0:
        mbarrier.expect(q_full.index(0), GROUPS * 64 * D * 2)
        for group in gl.static_range(GROUPS):
            tma.async_copy_global_to_shared(q_desc, [first + 64 * group, 0], q_full.index(0), q_tiles.index(group))
    for i in range(count):
        slot, free = i % STAGES, (i // STAGES & 1) ^ 1
        mbarrier.wait(k_empty.index(slot), free)
        mbarrier.expect(k_full.index(slot), BLOCK_N * D * 2)
        tma.async_copy_global_to_shared(k_desc, [low + i * BLOCK_N, 0], k_full.index(slot), k_tiles.index(slot))
        mbarrier.wait(v_empty.index(slot), free)
        mbarrier.expect(v_full.index(slot), BLOCK_N * D * 2)
        tma.async_copy_global_to_shared(v_desc, [low + i * BLOCK_N, 0], v_full.index(slot), v_tiles.index(slot))


@gluon.jit
def _keys_of(row, queries, keys, left, right, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """The keys that rows see: from the first to before the second."""
    begin, end = row * 0, row * 0 + keys
    if LEFT:
        begin = gl.maximum(begin, row + (keys - queries) - left)
    if RIGHT:
        end = gl.minimum(end, row + (keys - queries) + right + 1)
    return begin, end


@gluon.jit
def _hidden(s, start, begin, end, LEFT: gl.constexpr):
    """Scores of keys from `start` on, minus infinity where a row does not see them."""
    key = (start + gl.arange(0, s.shape[1], gl.SliceLayout(0, _scores_layout(s.shape[1]))))[None, :]
    seen = key < end[:, None]
    if LEFT:
        seen = seen & (key >= begin[:, None])
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _softmax(s, top, total, start, view, scale, softcap, LEFT: gl.constexpr, SOFTCAP: gl.constexpr):
    """Weights of a block of scores, and the rows' largest score and sum with them. Scores stay as products gave them
    (with a softcap, its tangent), so that scaling is part of the exponent's multiply-add.
    """
    inner_low, inner_high, begin, end = view
    factor = scale
    if SOFTCAP:
        s = _tanh(s * scale)
        factor = softcap
    if (start < inner_low) | (start + s.shape[1] > inner_high):
        s = _hidden(s, start, begin, end, LEFT)
    found = gl.maximum(top, gl.max(s, 1))
    shift = gl.where(found == float("-inf"), 0.0, found * factor)
    weight = gl.exp2(s * factor - shift[:, None])
    decay = gl.exp2(top * factor - shift)
    return weight, found, total * decay + gl.sum(weight, 1), decay


@gluon.jit
def _attend_rows(
    results,
    tiles,
    barriers,
    work,
    rule,
    GROUP: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr,
    SINK: gl.constexpr,
):
    """A computing group of `attend`: 64 rows. While it takes the exponentials of a block of scores, the products of the
    block before with the values run, and the other group's products.
    """
    out_desc, LSE, sink = results
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_empty, v_full, v_empty = barriers
    first, low, count = work
    queries, keys, left, right, scale, softcap = rule
    D: gl.constexpr = k_tiles.shape[2]
    scores: gl.constexpr = _scores_layout(BLOCK_N)
    sums: gl.constexpr = _scores_layout(D)
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    begin = first + 64 * GROUP
    row = begin + gl.arange(0, 64, gl.SliceLayout(1, scores))
    _, inner_low, inner_high, _ = _limits(
        begin, gl.minimum(begin + 64, queries), queries, keys, left, right, 0, BLOCK_N, LEFT, RIGHT, False, 3
    )
    view = (inner_low, inner_high) + _keys_of(row, queries, keys, left, right, LEFT, RIGHT)
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, scores))
    acc = gl.zeros([64, D], gl.float32, sums)
    nothing_yet = gl.zeros([64, BLOCK_N], gl.float32, scores)
    q = q_tiles.index(GROUP)
    if count > 0:
        mbarrier.wait(q_full.index(0), 0)
        mbarrier.wait(k_full.index(0), 0)
        s = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), nothing_yet, use_acc=False)
        mbarrier.arrive(k_empty.index(0))
        weight, top, total, unused = _softmax(s, top, total, low, view, scale, softcap, LEFT, SOFTCAP)
        p = gl.convert_layout(weight.to(q.dtype), operand)
        for i in range(1, count):
            slot, before = i % STAGES, (i - 1) % STAGES
            mbarrier.wait(k_full.index(slot), i // STAGES & 1)
            going_s = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), nothing_yet, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)
            going = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(going_s,))
            mbarrier.arrive(k_empty.index(slot))
            weight, top, total, decay = _softmax(s, top, total, low + i * BLOCK_N, view, scale, softcap, LEFT, SOFTCAP)
            acc = warpgroup_mma_wait(0, deps=(going,))
            mbarrier.arrive(v_empty.index(before))
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, sums))[:, None]
            p = gl.convert_layout(weight.to(q.dtype), operand)
        last = count - 1
        mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
        acc = warpgroup_mma(p, v_tiles.index(last % STAGES), acc)
    top = top * (softcap if SOFTCAP else scale)
    if SINK:
        before, top = top, gl.maximum(top, sink)
        decay = gl.exp2(before - top)
        total = total * decay + gl.exp2(sink - top)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, sums))[:, None]
    nothing = total == 0.0
    lse = gl.where(nothing, float("-inf"), (top + gl.log2(total)) * _LN2)
    gl.store(LSE + row, lse, mask=row < queries)
    inverse = gl.convert_layout(1.0 / gl.where(nothing, 1.0, total), gl.SliceLayout(1, sums))
    q.store((acc * inverse[:, None]).to(q.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [begin, 0], q)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "left", "right"])
def attend(
    Q, K, V, OUT, LSE, SINKS, CU_Q, CU_K, queries, keys, left, right, scale, softcap,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token,
    lse_batch, lse_head, HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Output and logsumexp of 64 * GROUPS queries of a head."""
    BLOCK_M: gl.constexpr = 64 * GROUPS
    SINK: gl.constexpr = SINKS is not None
    blocks = gl.cdiv(queries, BLOCK_M)
    block, owner = gl.program_id(0) % blocks, gl.program_id(0) // blocks
    first = (blocks - 1 - block) * BLOCK_M  # the last rows first: with causal attention they have the most keys
    head, _, wide_head, wide_batch, q_first, queries, k_first, keys = _sequence(CU_Q, CU_K, queries, keys, owner, HEADS)
    LSE = _of_head(LSE, wide_batch, wide_head, lse_batch, lse_head, q_first)
    sink = scale  # not read
    if SINKS is not None:
        sink = gl.load(SINKS + head).to(gl.float32) * _LOG2E
    end = gl.minimum(first + BLOCK_M, queries)
    low, _, _, high = _limits(first, end, queries, keys, left, right, 0, BLOCK_N, LEFT, RIGHT, False, 3)
    count = gl.where(first < queries, gl.cdiv(gl.maximum(high - low, 0), BLOCK_N), 0)

    q_desc = _tile(_of_head(Q, wide_batch, wide_head, q_batch, q_head, q_first * q_token), queries, q_token, 64, D)
    k_base = _of_head(K, wide_batch, wide_head // GROUP, k_batch, k_head, k_first * k_token)
    k_desc = _tile(k_base, keys, k_token, BLOCK_N, D)
    v_base = _of_head(V, wide_batch, wide_head // GROUP, v_batch, v_head, k_first * v_token)
    v_desc = _tile(v_base, keys, v_token, BLOCK_N, D)
    out_base = _of_head(OUT, wide_batch, wide_head, out_batch, out_head, q_first * out_token)
    out_desc = _tile(out_base, queries, out_token, 64, D)
    q_tiles = _ring(Q.dtype.element_ty, GROUPS, 64, D)
    k_tiles = _ring(Q.dtype.element_ty, STAGES, BLOCK_N, D)
    v_tiles = _ring(Q.dtype.element_ty, STAGES, BLOCK_N, D)
    q_full = _barriers(1, 1)
    k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, GROUPS)
    v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, GROUPS)
    tiles = (q_tiles, k_tiles, v_tiles)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    work = (first, low, count)
    results = (out_desc, LSE, sink)
    rule = (queries, keys, left, right, scale, softcap)
    gl.warp_specialize(
        [
            (
                _attend_rows,
                (results, tiles, barriers, work, rule, gl.constexpr(0), BLOCK_N, STAGES, LEFT, RIGHT, SOFTCAP, SINK),
            ),
            (
                _attend_rows,
                (results, tiles, barriers, work, rule, gl.constexpr(1), BLOCK_N, STAGES, LEFT, RIGHT, SOFTCAP, SINK),
            ),
            (_load_rows_then_blocks, ((q_desc, k_desc, v_desc), tiles, barriers, work, GROUPS, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
