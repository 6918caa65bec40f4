"""The gradients of attention on Hopper's own instructions, built as `_hopper_attention.attend` is.

Two kernels, seven products in all and no atomics: the same inputs give the same bits. Groups of warps that own keys
compute the transposed scores, so that weights and their gradients are operands of the next products as they lie in
registers, and nothing of a block of scores goes through shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._hopper_attention import (
    _barriers,
    _limits,
    _of_head,
    _ring,
    _row_limits,
    _scores_layout,
    _sequence,
    _tanh,
    _tile,
)


@gluon.jit
def _load_rows_then_blocks(
    descriptors, tiles, barriers, work, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """The copying warp of `backward_queries`."""
    q_desc, grad_desc, k_desc, v_desc = descriptors
    q_tiles, grad_tiles, k_tiles, v_tiles = tiles
    rows_full, k_full, k_empty, v_full, v_empty = barriers
    first, low, count = work
    D: gl.constexpr = k_tiles.shape[2]
    if count > 0:
        mbarrier.expect(rows_full.index(0), 2 * GROUPS * 64 * D * 2)
        for group in gl.static_range(GROUPS):
            tma.async_copy_global_to_shared(q_desc, [first + 64 * group, 0], rows_full.index(0), q_tiles.index(group))
            tma.async_copy_global_to_shared(
                grad_desc, [first + 64 * group, 0], rows_full.index(0), grad_tiles.index(group)
            )
    for i in range(count):
        slot, free = i % STAGES, (i // STAGES & 1) ^ 1
        mbarrier.wait(k_empty.index(slot), free)
        mbarrier.expect(k_full.index(slot), BLOCK_N * D * 2)
        tma.async_copy_global_to_shared(k_desc, [low + i * BLOCK_N, 0], k_full.index(slot), k_tiles.index(slot))
        mbarrier.wait(v_empty.index(slot), free)
        mbarrier.expect(v_full.index(slot), BLOCK_N * D * 2)
        tma.async_copy_global_to_shared(v_desc, [low + i * BLOCK_N, 0], v_full.index(slot), v_tiles.index(slot))


@gluon.jit
def _weights(
    s, lse, start, whole, at, rule, DIM: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr
):
    """The weights of a block of scores, and the derivative of its scores by the products. DIM 1: of rows `at` and keys
    from `start` on; DIM 0: of keys `at` and rows from `start` on. Between the two of `whole`, nothing is hidden.
    """
    queries, keys, left, right, scale, softcap = rule
    whole_begin, whole_end = whole
    derivative = 1.0
    factor = scale
    if SOFTCAP:
        s = _tanh(s * scale)
        derivative = 1.0 - s * s
        factor = softcap
    weight = gl.exp2(s * factor - gl.expand_dims(lse, DIM))
    if (start < whole_begin) | (start + s.shape[1] > whole_end):
        other = (start + gl.arange(0, s.shape[1], gl.SliceLayout(0, _scores_layout(s.shape[1]))))[None, :]
        distance = other - at[:, None] - (keys - queries) if DIM else at[:, None] - other - (keys - queries)
        if LEFT:
            weight = gl.where(distance >= -left, weight, 0.0)
        if RIGHT:
            weight = gl.where(distance <= right, weight, 0.0)
        if DIM:  # rows past the last have gradients of zero, and do no harm
            weight = gl.where(other < keys, weight, 0.0)
    return weight, derivative


@gluon.jit
def _gradients_of_rows(
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
):
    """A computing group of `backward_queries`: 64 rows. The product of a block that makes the gradient runs while the
    weights of the next block are computed.
    """
    dq_desc, LSE, DELTA, q_scale = results
    q_tiles, grad_tiles, k_tiles, v_tiles = tiles
    rows_full, k_full, k_empty, v_full, v_empty = barriers
    first, low, count = work
    queries, keys, left, right, scale, softcap = rule
    D: gl.constexpr = k_tiles.shape[2]
    scores: gl.constexpr = _scores_layout(BLOCK_N)
    sums: gl.constexpr = _scores_layout(D)
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    begin = first + 64 * GROUP
    row = begin + gl.arange(0, 64, gl.SliceLayout(1, scores))
    _, whole_begin, whole_end, _ = _limits(
        begin, gl.minimum(begin + 64, queries), queries, keys, left, right, 0, BLOCK_N, LEFT, RIGHT, False, 3
    )
    whole = (whole_begin, whole_end)
    lse = gl.load(LSE + row, mask=row < queries, other=float("inf"))
    mean = gl.load(DELTA + row, mask=row < queries, other=0.0)
    nothing_yet = gl.zeros([64, BLOCK_N], gl.float32, scores)
    dq = gl.zeros([64, D], gl.float32, sums)
    q, grad = q_tiles.index(GROUP), grad_tiles.index(GROUP)
    if count > 0:
        mbarrier.wait(rows_full.index(0), 0)
        mbarrier.wait(k_full.index(0), 0)
        going_s = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), nothing_yet, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(0), 0)
        going_dp = warpgroup_mma(grad, v_tiles.index(0).permute((1, 0)), nothing_yet, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(going_s,))
        weight, derivative = _weights(s, lse, low, whole, row, rule, 1, LEFT, RIGHT, SOFTCAP)
        dp = warpgroup_mma_wait(0, deps=(going_dp,))
        mbarrier.arrive(v_empty.index(0))
        ds = gl.convert_layout((weight * (dp - mean[:, None]) * derivative).to(q.dtype), operand)
        for i in range(1, count):
            slot, before, phase = i % STAGES, (i - 1) % STAGES, i // STAGES & 1
            mbarrier.wait(k_full.index(slot), phase)
            going_s = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), nothing_yet, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            going_dp = warpgroup_mma(
                grad, v_tiles.index(slot).permute((1, 0)), nothing_yet, use_acc=False, is_async=True
            )
            going = warpgroup_mma(ds, k_tiles.index(before), dq, is_async=True)
            s = warpgroup_mma_wait(2, deps=(going_s,))
            weight, derivative = _weights(s, lse, low + i * BLOCK_N, whole, row, rule, 1, LEFT, RIGHT, SOFTCAP)
            dp = warpgroup_mma_wait(1, deps=(going_dp,))
            mbarrier.arrive(v_empty.index(slot))
            next_ds = (weight * (dp - mean[:, None]) * derivative).to(q.dtype)
            dq = warpgroup_mma_wait(0, deps=(going,))
            mbarrier.arrive(k_empty.index(before))
            ds = gl.convert_layout(next_ds, operand)
        dq = warpgroup_mma(ds, k_tiles.index((count - 1) % STAGES), dq)
    q.store((dq * q_scale).to(q.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq_desc, [begin, 0], q)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "left", "right"])
def backward_queries(
    Q, K, V, GRAD, LSE, DELTA, Q_GRAD, CU_Q, CU_K, queries, keys, left, right, scale, softcap, q_scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head, grad_token,
    dq_batch, dq_head, dq_token, lse_batch, lse_head, HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """The gradient of 64 * GROUPS queries of a head. LSE is in base 2, and infinity for rows that see nothing."""
    BLOCK_M: gl.constexpr = 64 * GROUPS
    blocks = gl.cdiv(queries, BLOCK_M)
    block, owner = gl.program_id(0) % blocks, gl.program_id(0) // blocks
    first = (blocks - 1 - block) * BLOCK_M
    _, _, wide_head, wide_batch, q_first, queries, k_first, keys = _sequence(CU_Q, CU_K, queries, keys, owner, HEADS)
    LSE = _of_head(LSE, wide_batch, wide_head, lse_batch, lse_head, q_first)
    DELTA = _of_head(DELTA, wide_batch, wide_head, lse_batch, lse_head, q_first)
    end = gl.minimum(first + BLOCK_M, queries)
    low, _, _, high = _limits(first, end, queries, keys, left, right, 0, BLOCK_N, LEFT, RIGHT, False, 3)
    count = gl.where(first < queries, gl.cdiv(gl.maximum(high - low, 0), BLOCK_N), 0)

    q_desc = _tile(_of_head(Q, wide_batch, wide_head, q_batch, q_head, q_first * q_token), queries, q_token, 64, D)
    grad_desc = _tile(
        _of_head(GRAD, wide_batch, wide_head, grad_batch, grad_head, q_first * grad_token), queries, grad_token, 64, D
    )
    k_base = _of_head(K, wide_batch, wide_head // GROUP, k_batch, k_head, k_first * k_token)
    k_desc = _tile(k_base, keys, k_token, BLOCK_N, D)
    v_base = _of_head(V, wide_batch, wide_head // GROUP, v_batch, v_head, k_first * v_token)
    v_desc = _tile(v_base, keys, v_token, BLOCK_N, D)
    dq_desc = _tile(
        _of_head(Q_GRAD, wide_batch, wide_head, dq_batch, dq_head, q_first * dq_token), queries, dq_token, 64, D
    )
    q_tiles = _ring(Q.dtype.element_ty, GROUPS, 64, D)
    grad_tiles = _ring(Q.dtype.element_ty, GROUPS, 64, D)
    k_tiles = _ring(Q.dtype.element_ty, STAGES, BLOCK_N, D)
    v_tiles = _ring(Q.dtype.element_ty, STAGES, BLOCK_N, D)
    rows_full = _barriers(1, 1)
    k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, GROUPS)
    v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, GROUPS)
    tiles = (q_tiles, grad_tiles, k_tiles, v_tiles)
    barriers = (rows_full, k_full, k_empty, v_full, v_empty)
    work = (first, low, count)
    results = (dq_desc, LSE, DELTA, q_scale)
    rule = (queries, keys, left, right, scale, softcap)
    descriptors = (q_desc, grad_desc, k_desc, v_desc)
    gl.warp_specialize(
        [
            (
                _gradients_of_rows,
                (results, tiles, barriers, work, rule, gl.constexpr(0), BLOCK_N, STAGES, LEFT, RIGHT, SOFTCAP),
            ),
            (
                _gradients_of_rows,
                (results, tiles, barriers, work, rule, gl.constexpr(1), BLOCK_N, STAGES, LEFT, RIGHT, SOFTCAP),
            ),
            (_load_rows_then_blocks, (descriptors, tiles, barriers, work, GROUPS, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _tile_of_heads(base, heads, rows, head_stride, stride, COUNT: gl.constexpr, D: gl.constexpr):
    """As `_tile`, of several heads."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    return tma.make_tensor_descriptor(
        base, [heads, gl.maximum(rows, 1), D], [head_stride, stride, 1], [1, COUNT, D], layout
    )


@gluon.jit
def _as_block_of_heads(tile):
    """A tile (COUNT, D) as what a descriptor of several heads fills, (1, COUNT, D)."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    return tile._reinterpret(tile.dtype, [1, tile.shape[0], tile.shape[1]], layout)


@gluon.jit
def _load_keys_then_rows(
    descriptors,
    tiles,
    barriers,
    work,
    GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The copying warp of `backward_keys`."""
    k_desc, v_desc, q_desc, grad_desc, LSE, DELTA, lse_head = descriptors
    k_tiles, v_tiles, q_tiles, grad_tiles, lse_tiles, mean_tiles = tiles
    keys_full, q_full, q_empty, grad_full, grad_empty = barriers
    first, low, count, queries = work
    D: gl.constexpr = q_tiles.shape[2]
    lane = gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [1], [0]))
    if count > 0:
        mbarrier.expect(keys_full.index(0), 2 * GROUPS * 64 * D * 2)
        for group in gl.static_range(GROUPS):
            tma.async_copy_global_to_shared(k_desc, [first + 64 * group, 0], keys_full.index(0), k_tiles.index(group))
            tma.async_copy_global_to_shared(v_desc, [first + 64 * group, 0], keys_full.index(0), v_tiles.index(group))
    for i in range(GROUP * count):
        slot, free = i % STAGES, (i // STAGES & 1) ^ 1
        head, row = i // count, low + i % count * BLOCK_M
        mbarrier.wait(q_empty.index(slot), free)
        mbarrier.expect(q_full.index(slot), BLOCK_M * D * 2)
        tma.async_copy_global_to_shared(
            q_desc, [head, row, 0], q_full.index(slot), _as_block_of_heads(q_tiles.index(slot))
        )
        # Rows past the last get zeros: weights of one, for gradients that are zero.
        at, there = head * lse_head + row + lane, row + lane < queries
        async_copy.async_copy_global_to_shared(lse_tiles.index(slot), LSE + at, mask=there)
        async_copy.async_copy_global_to_shared(mean_tiles.index(slot), DELTA + at, mask=there)
        async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
        mbarrier.wait(grad_empty.index(slot), free)
        mbarrier.expect(grad_full.index(slot), BLOCK_M * D * 2)
        tma.async_copy_global_to_shared(
            grad_desc, [head, row, 0], grad_full.index(slot), _as_block_of_heads(grad_tiles.index(slot))
        )


@gluon.jit
def _gradients_of_keys(
    results,
    tiles,
    barriers,
    work,
    rule,
    WHICH: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr,
):
    """A computing group of `backward_keys`: 64 keys and their values."""
    dk_desc, dv_desc, q_scale = results
    k_tiles, v_tiles, q_tiles, grad_tiles, lse_tiles, mean_tiles = tiles
    keys_full, q_full, q_empty, grad_full, grad_empty = barriers
    first, low, count, _ = work
    queries, keys, left, right, scale, softcap = rule
    D: gl.constexpr = q_tiles.shape[2]
    scores: gl.constexpr = _scores_layout(BLOCK_M)
    sums: gl.constexpr = _scores_layout(D)
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    begin = first + 64 * WHICH
    key = begin + gl.arange(0, 64, gl.SliceLayout(1, scores))
    _, whole_begin, whole_end, _ = _row_limits(
        begin, gl.minimum(begin + 64, keys), queries, keys, left, right, 0, BLOCK_M, LEFT, RIGHT, False, 3
    )
    whole = (whole_begin, whole_end)
    nothing_yet = gl.zeros([64, BLOCK_M], gl.float32, scores)
    dk = gl.zeros([64, D], gl.float32, sums)
    dv = gl.zeros([64, D], gl.float32, sums)
    k, v = k_tiles.index(WHICH), v_tiles.index(WHICH)
    if count > 0:
        mbarrier.wait(keys_full.index(0), 0)
    for i in range(GROUP * count):
        slot, phase = i % STAGES, i // STAGES & 1
        start = low + i % count * BLOCK_M
        q, grad = q_tiles.index(slot), grad_tiles.index(slot)
        mbarrier.wait(q_full.index(slot), phase)
        going_s = warpgroup_mma(k, q.permute((1, 0)), nothing_yet, use_acc=False, is_async=True)
        mbarrier.wait(grad_full.index(slot), phase)
        going_dp = warpgroup_mma(v, grad.permute((1, 0)), nothing_yet, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(going_s,))
        lse = lse_tiles.index(slot).load(gl.SliceLayout(0, scores))
        weight, derivative = _weights(s, lse, start, whole, key, rule, 0, LEFT, RIGHT, SOFTCAP)
        going_dv = warpgroup_mma(gl.convert_layout(weight.to(k.dtype), operand), grad, dv, is_async=True)
        weight = weight * derivative
        dp = warpgroup_mma_wait(1, deps=(going_dp,))
        dv = warpgroup_mma_wait(0, deps=(going_dv,))
        mbarrier.arrive(grad_empty.index(slot))
        mean = mean_tiles.index(slot).load(gl.SliceLayout(0, scores))
        ds = gl.convert_layout((weight * (dp - mean[None, :])).to(k.dtype), operand)
        going_dk = warpgroup_mma(ds, q, dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=(going_dk,))
        mbarrier.arrive(q_empty.index(slot))
    v.store(dv.to(v.dtype))
    k.store((dk * q_scale).to(k.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dv_desc, [begin, 0], v)
    tma.async_copy_shared_to_global(dk_desc, [begin, 0], k)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "left", "right"])
def backward_keys(
    Q, K, V, GRAD, LSE, DELTA, K_GRAD, V_GRAD, CU_Q, CU_K, queries, keys, left, right, scale, softcap, q_scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head, grad_token,
    dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token, lse_batch, lse_head, HEADS: gl.constexpr,
    GROUP: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """The gradients of 64 * GROUPS keys and values of a key head, summed over the query heads that read it."""
    BLOCK_N: gl.constexpr = 64 * GROUPS
    KEY_HEADS: gl.constexpr = HEADS // GROUP
    blocks = gl.cdiv(keys, BLOCK_N)
    first, owner = gl.program_id(0) % blocks * BLOCK_N, gl.program_id(0) // blocks
    _, _, wide_head, wide_batch, q_first, queries, k_first, keys = _sequence(
        CU_Q, CU_K, queries, keys, owner, KEY_HEADS
    )
    LSE = _of_head(LSE, wide_batch, wide_head * GROUP, lse_batch, lse_head, q_first)
    DELTA = _of_head(DELTA, wide_batch, wide_head * GROUP, lse_batch, lse_head, q_first)
    end = gl.minimum(first + BLOCK_N, keys)
    low, _, _, high = _row_limits(first, end, queries, keys, left, right, 0, BLOCK_M, LEFT, RIGHT, False, 3)
    count = gl.where(first < keys, gl.cdiv(gl.maximum(high - low, 0), BLOCK_M), 0)

    k_desc = _tile(_of_head(K, wide_batch, wide_head, k_batch, k_head, k_first * k_token), keys, k_token, 64, D)
    v_desc = _tile(_of_head(V, wide_batch, wide_head, v_batch, v_head, k_first * v_token), keys, v_token, 64, D)
    q_desc = _tile_of_heads(
        _of_head(Q, wide_batch, wide_head * GROUP, q_batch, q_head, q_first * q_token),
        GROUP,
        queries,
        q_head,
        q_token,
        BLOCK_M,
        D,
    )
    grad_desc = _tile_of_heads(
        _of_head(GRAD, wide_batch, wide_head * GROUP, grad_batch, grad_head, q_first * grad_token),
        GROUP,
        queries,
        grad_head,
        grad_token,
        BLOCK_M,
        D,
    )
    dk_desc = _tile(
        _of_head(K_GRAD, wide_batch, wide_head, dk_batch, dk_head, k_first * dk_token), keys, dk_token, 64, D
    )
    dv_desc = _tile(
        _of_head(V_GRAD, wide_batch, wide_head, dv_batch, dv_head, k_first * dv_token), keys, dv_token, 64, D
    )
    k_tiles = _ring(Q.dtype.element_ty, GROUPS, 64, D)
    v_tiles = _ring(Q.dtype.element_ty, GROUPS, 64, D)
    q_tiles = _ring(Q.dtype.element_ty, STAGES, BLOCK_M, D)
    grad_tiles = _ring(Q.dtype.element_ty, STAGES, BLOCK_M, D)
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], rows)
    mean_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], rows)
    keys_full = _barriers(1, 1)
    q_full, q_empty = _barriers(STAGES, 1 + 32), _barriers(STAGES, GROUPS)
    grad_full, grad_empty = _barriers(STAGES, 1), _barriers(STAGES, GROUPS)
    tiles = (k_tiles, v_tiles, q_tiles, grad_tiles, lse_tiles, mean_tiles)
    barriers = (keys_full, q_full, q_empty, grad_full, grad_empty)
    work = (first, low, count, queries)
    results = (dk_desc, dv_desc, q_scale)
    rule = (queries, keys, left, right, scale, softcap)
    descriptors = (k_desc, v_desc, q_desc, grad_desc, LSE, DELTA, lse_head)
    gl.warp_specialize(
        [
            (
                _gradients_of_keys,
                (results, tiles, barriers, work, rule, gl.constexpr(0), GROUP, BLOCK_M, STAGES, LEFT, RIGHT, SOFTCAP),
            ),
            (
                _gradients_of_keys,
                (results, tiles, barriers, work, rule, gl.constexpr(1), GROUP, BLOCK_M, STAGES, LEFT, RIGHT, SOFTCAP),
            ),
            (_load_keys_then_rows, (descriptors, tiles, barriers, work, GROUP, GROUPS, BLOCK_M, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
