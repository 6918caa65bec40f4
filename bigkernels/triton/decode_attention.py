"""Decode attention on GPUs: how the keys are split and tiled, and the launches.

**Bytes in flight.** An H100 reads 3.35 TB/s, and under load a read takes about 1 us: by Little's law 3.35 MB must be
under way at any time, 25 KB a multiprocessor. A block of keys is therefore as large as 32 KB of keys and values, and
while a program computes with one block the next is on its way: with two programs a multiprocessor, 64 KB to 128 KB are.
That is 32 KB * 2 of shared memory a program, within what every GPU from sm_80 on gives one.

**Instructions.** 25 KB a us leave 2260 cycles for a block. Per warp the loop takes about 430 instructions for 64 keys
of 128 16-bit elements in pages of 16, and about 1000 for 128 keys of int8 elements, with a warp a scheduler.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import attention as shared
from ..ops import decode_attention as op
from ..ops.registry import KERNEL_DTYPES
from ..ops.rope import _empty
from ._append import append as append_kernel
from ._decode import merge, split
from ._launch import capability, falls_back, launch, power_of_2, processors, since
from .rope import _inner_contiguous

_IN_FLIGHT = 65536  # bytes of shared memory a program for blocks that are read or on their way
_LEAST = 2  # blocks a program: with fewer, partial results would weigh more than what they save
_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class _Tiles:
    """How the kernel cuts heads, keys and rows. Sizes are in the cache's elements as they are read (two int8 at once).

    Attributes:
        d, rest: a head of the keys as two blocks, so that 80 elements are 64 and 16 and not 128.
        dv: a head of the values.
        keys: keys a block.
        stages: of the pipeline; all but one hold a block.
        rows: queries times heads a program.
        warps: 4, or 8 where the tiles need more registers.
        resident: programs that a multiprocessor holds at a time.
    """

    d: int
    rest: int
    dv: int
    keys: int
    stages: int
    rows: int
    warps: int
    resident: int


def _tiles(size: int, value_size: int, element: int, pack: int, rows: int, wide: bool) -> _Tiles:
    """Tiles for heads of `size` and `value_size` elements of `element` bytes; `wide` where queries are float32."""
    d = max(16, 1 << (size.bit_length() - 1))
    rest = max(16, power_of_2(size - d)) if size > d else 0
    dv = max(16, power_of_2(value_size))
    key = (d + rest + dv) * element
    widest = pack * max(size, value_size)
    newer = since(3, 8)  # keeps more of a block in registers: more blocks, of fewer keys and rows, or more warps
    most = 16 if wide or widest > 256 else 32 if widest > (64 if newer else 128) or pack == 2 else 64
    rows = min(most, max(16, power_of_2(rows)))
    # Larger tiles leave registers for fewer keys, and so do products without matrix units, above all with both halves
    # of int16 elements in float32: those forgo bytes in flight.
    both = wide and pack == 2
    share = 16 if both else 4 if wide or rows == 64 or rows == 32 and pack == 2 else 2
    if newer and not both:
        share *= 2 * pack
    keys = min(128, max(16, power_of_2(_IN_FLIGHT // share // key + 1) // 2))
    stages = (1 if newer else 3) if both else 1 + min(4, max(2, _IN_FLIGHT // (keys * key)))
    if newer:
        few = pack == 2 or widest <= 64 and not wide
    else:
        few = widest <= (128 if both else 0 if wide else 256)
    warps = 4 if rows == 16 and few else 8
    return _Tiles(d, rest, dv, keys, stages, rows, warps, 2 if warps == 4 else 1)


def _programs(slots: int, heads: int, most: int) -> int:
    """Programs a key head, at most `most`: the fewest that nearly fill whole waves of `slots` programs."""
    best, best_fill = 1, 0.0
    for waves in range(1, 5):
        programs = min(max(1, waves * slots // heads), most)
        fill = heads * programs / (-(-heads * programs // slots) * slots)
        if fill > best_fill:
            best, best_fill = programs, fill
        if fill >= 0.9:
            break
    return best


def _packed(cache: Tensor) -> Tensor | None:
    """An int8 cache as int16, where its heads, strides and place in memory are even."""
    even = all(n % 2 == 0 for n in (cache.shape[-1], cache.storage_offset(), *cache.stride()[:3]))
    return cache.view(torch.int16) if even else None


def _readable(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes caches like these, which are what it reads: two blocks must fit the shared memory."""
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return False
    tiles = _tiles(k.shape[-1], v.shape[-1], k.element_size(), 1, 1, q.dtype == torch.float32)
    fits = 2 * tiles.keys * (tiles.d + tiles.rest + tiles.dv) * k.element_size() <= 81920
    page = max(k.shape[1] * t.stride(1) for t in (k, v))
    return fits and max(page, *k.stride(), *v.stride()) < 2**31


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """k and v (B or pages, tokens, Hk, size), as the kernel reads them; without `lengths` all keys are valid."""
    batch, heads, queries, _ = q.shape
    key_heads, pack = k.shape[2], q.shape[-1] // k.shape[-1]
    size, value_size = k.shape[-1], v.shape[-1]
    group = heads // key_heads
    out = shared.like(q, pack * value_size)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    q = _inner_contiguous(q)
    lengths, slopes, sinks = (t if t is None else t.contiguous() for t in (lengths, slopes, sinks))
    capacity = k.shape[1]
    if table is not None:
        table = _inner_contiguous(table)
        capacity *= table.shape[1]

    wide = q.dtype == torch.float32
    tiles = _tiles(size, value_size, k.element_size(), pack, group * queries, wide)
    stages = 1 if wide and pack == 2 and capability(q) >= 100 else tiles.stages
    # The assembler would spill some to fit more programs.
    registers = 240 if wide and tiles.warps == 8 else 255 if wide and pack == 2 and since(3, 8) else None
    row_blocks = -(-group * queries // tiles.rows)
    blocks = -(-capacity // tiles.keys)
    if left >= 0:
        blocks = min(blocks, (left + queries) // tiles.keys + 2)
    slots = processors(q.device) * tiles.resident
    programs = _programs(slots, key_heads * row_blocks, max(1, -(-batch * blocks // _LEAST)))
    part = q.new_empty(2 * programs, heads * queries, pack * value_size, dtype=torch.float32)
    part_lse = part.new_empty(2 * programs, heads * queries)
    scales = [(0, 0, 0) if t is None else t.stride() for t in (k_scale, v_scale)]
    twins = k.stride()[:2] == v.stride()[:2] and scales[0][:2] == scales[1][:2]
    common = {"SCAN": 32 if batch <= 32 else 1024, "LEAST": _LEAST, "WINDOW": left >= 0, "BLOCK": tiles.keys}
    launch(
        split,
        (programs * key_heads * row_blocks,),
        q,
        k,
        v,
        lengths,
        table,
        k_scale,
        v_scale,
        slopes,
        sinks,
        out,
        lse,
        part,
        part_lse,
        batch,
        capacity,
        queries,
        programs,
        left,
        right,
        scale / softcap if softcap else scale * _LOG2E,
        softcap * _LOG2E if softcap else None,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *scales[0],
        *scales[1],
        0 if table is None else table.stride(0),
        *out.stride()[:3],
        HEADS=key_heads,
        GROUP=group,
        D=size,
        DV=value_size,
        BLOCK_D=tiles.d,
        BLOCK_REST=tiles.rest,
        BLOCK_DV=tiles.dv,
        PAGE=0 if table is None else k.shape[1],
        ROWS=tiles.rows,
        ROW_BLOCKS=row_blocks,
        STAGES=stages,
        CAUSAL=right >= 0 and queries > 1,
        TWINS=twins,
        PACK=pack,
        PRECISION="ieee" if wide else None,
        num_warps=tiles.warps,
        maxnreg=registers,
        **common,
    )
    if programs == 1 and lengths is None and capacity:
        return out, lse  # no sequence lies in several parts, and none is empty
    rows = 1 if batch * heads * queries <= 4 * processors(q.device) else 4
    width = power_of_2(pack * value_size)
    launch(
        merge,
        (batch * -(-heads * queries // rows),),
        part,
        part_lse,
        lengths,
        sinks,
        out,
        lse,
        batch,
        capacity,
        queries,
        programs,
        left,
        heads * queries,
        *out.stride()[:3],
        DV=pack * value_size,
        BLOCK_DV=width,
        ROWS=rows,
        SLOTS=max(2, min(32, 4096 // (rows * width))),
        num_warps=4,
        **common,
    )
    return out, lse


@falls_back(op._infer_fallback)
def infer(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    tensors = (q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, alibi_slopes, sinks)
    op._check("functional.decode_attention", *tensors, left=left, appends=False)
    k, v = k_cache, v_cache
    if k.dtype == torch.int8:
        k, v = _packed(k), _packed(v)
    if k is None or v is None or not _readable(q, k, v):
        return op._infer_fallback(*tensors, left, scale, softcap)
    return _run(
        q,
        k,
        v,
        op._int32(cache_seqlens),
        op._int32(block_table),
        k_scale,
        v_scale,
        alibi_slopes,
        sinks,
        left,
        0,
        scale,
        softcap,
    )


def serve_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor] | None:
    """`attention` of few queries without gradient, bias, mask, prefix and dropout, arguments checked; None where it
    is faster by the kernel for many queries.

    q (B, H, Sq, D), k (B, Hk, Sk, D) and v (B, Hk, Sk, Dv) give out and lse as `attention_fwd` does.
    """
    if q.dtype not in KERNEL_DTYPES or not q.numel() or q.shape[1] // k.shape[1] * q.shape[2] > 64:
        return None
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if not _readable(q, k, v):
        return None
    return _run(q, k, v, None, None, None, None, alibi_slopes, sinks, left, right, scale, softcap)


@falls_back(op._append_fallback)
def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    interleaved: bool,
) -> Tensor:
    tensors = (k_cache, v_cache, cache_seqlens, block_table)
    op._check("functional.append_kv_", q, *tensors, k_scale, v_scale, None, None, k, v, cos, sin)
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return op._append_fallback(q, k, v, *tensors, cos, sin, k_scale, v_scale, interleaved)
    out = _empty(q)
    q, k, v, cos, sin = (t if t is None else _inner_contiguous(t) for t in (q, k, v, cos, sin))
    batch, heads, tokens, size = q.shape
    lengths, table = op._int32(cache_seqlens).contiguous(), op._int32(block_table)
    capacity = k_cache.shape[1]
    if table is not None:
        table = _inner_contiguous(table)
        capacity *= table.shape[1]
    rotary = 0 if cos is None else cos.shape[-1]
    angles = [(0, 0) if t is None else (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)) for t in (cos, sin)]
    strides = [t.stride()[:3] for t in (q, k, v, out, k_cache, v_cache)]
    strides += [(0, 0, 0) if t is None else t.stride() for t in (k_scale, v_scale)]
    block, rest, dv = power_of_2(rotary // 2), power_of_2(size - rotary), power_of_2(v.shape[-1])
    # A thread holds 8 elements: many programs rather than much work in each, because there are few tokens.
    at_once = min(power_of_2(heads), max(1, 1024 // max(2 * block, rest, dv)))
    parts = -(-heads // at_once) + 2 * -(-k.shape[1] // at_once)
    launch(
        append_kernel,
        (batch * tokens, parts),
        q,
        k,
        v,
        out,
        k_cache,
        v_cache,
        lengths,
        table,
        cos,
        sin,
        k_scale,
        v_scale,
        tokens,
        k_cache.shape[0],
        capacity,
        0 if table is None else table.stride(0),
        *angles[0],
        *angles[1],
        *(n for t in strides for n in t),
        Q_HEADS=heads,
        K_HEADS=k.shape[1],
        D=size,
        DV=v.shape[-1],
        R=rotary,
        PAGE=k_cache.shape[1],
        HEADS=at_once,
        BLOCK=block,
        BLOCK_REST=rest,
        BLOCK_DV=dv,
        INTERLEAVED=interleaved,
        num_warps=4,
    )
    return out


def _cache(dtype: torch.dtype, batch: int, heads: int, size: int, value_size: int, page: int, int8: bool) -> tuple:
    """Meta tensors (k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale)."""
    shape = (4096, page) if page else (batch, 8192)
    kind = torch.int8 if int8 else dtype
    caches = [torch.empty(*shape, heads, n, dtype=kind, device="meta") for n in (size, value_size)]
    scales = [torch.empty(*shape, heads, device="meta", dtype=torch.float32) if int8 else None for _ in range(2)]
    lengths = torch.empty(batch, dtype=torch.int32, device="meta")
    table = torch.empty(batch, 8192 // page, dtype=torch.int32, device="meta") if page else None
    return (*caches, lengths, table, *scales)


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: usual heads, pages, numbers of rows, and all options."""
    for heads, key_heads, queries, size, value_size, page, int8, options in (
        (32, 8, 1, 128, 128, 16, False, False),
        (32, 8, 1, 128, 128, 0, False, True),
        (32, 8, 5, 128, 128, 256, False, False),
        (64, 8, 8, 128, 128, 16, False, True),
        (32, 32, 1, 80, 80, 16, False, False),
        (8, 4, 1, 256, 256, 0, False, True),
        (128, 128, 1, 192, 128, 64, False, False),
        (128, 1, 1, 576, 512, 64, False, False),
        (32, 8, 1, 128, 128, 16, True, False),
        (64, 8, 8, 128, 128, 256, True, True),
        (8, 4, 4, 256, 256, 16, True, False),
    ):
        q = torch.empty(4, queries, heads, size, dtype=dtype, device="meta").transpose(1, 2)
        vector = torch.empty(heads, device="meta", dtype=torch.float32) if options else None
        cache = _cache(dtype, 4, key_heads, size, value_size, page, int8)
        yield infer, (q, *cache, vector, vector, 1024 if options else -1, 0.1, 30.0 if options else 0.0)
        new = [torch.empty(4, key_heads, queries, n, dtype=dtype, device="meta") for n in (size, value_size)]
        rotary = 0 if size == 256 else size if size == 128 else 64
        angles = torch.empty(1, queries, rotary, dtype=dtype, device="meta") if rotary else None
        yield append, (q, *new, *cache[:4], angles, angles, *cache[4:], size == 80)
    q, k = (torch.empty(2, h, n, 128, dtype=dtype, device="meta") for h, n in ((16, 4), (4, 4096)))
    yield serve_attention, (q, k, k, None, None, -1, -1, 0.1, 0.0)
