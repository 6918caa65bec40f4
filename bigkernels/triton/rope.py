"""Rotary position embedding on GPUs: one launch rotates the queries and the keys.

A program owns a few tokens of one batch and walks over their heads in blocks, so that it reads the angles once and
keeps them in registers. The backward pass is the same kernel turning the other way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import rope as op
from ._launch import capability, falls_back, launch, power_of_2


@triton.jit
def _load_pairs(X, at, mask, R: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both elements of each rotated pair as (tokens, heads, BLOCK) float32; `at` is the address of each head."""
    if INTERLEAVED:
        # One contiguous load, taken apart in registers.
        col = tl.arange(0, 2 * BLOCK)[None, None, :]
        x = tl.load(X + at + col, mask=mask & (col < R), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], BLOCK, 2]))
    else:
        col = tl.arange(0, BLOCK)[None, None, :]
        mask = mask & (col < R // 2)
        a = tl.load(X + at + col, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(X + at + R // 2 + col, mask=mask, other=0.0).to(tl.float32)
        return a, b


@triton.jit
def _store_pairs(Y, at, mask, a, b, R: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        col = tl.arange(0, 2 * BLOCK)[None, None, :]
        y = tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], 2 * BLOCK])
        tl.store(Y + at + col, y.to(Y.dtype.element_ty), mask=mask & (col < R))
    else:
        col = tl.arange(0, BLOCK)[None, None, :]
        mask = mask & (col < R // 2)
        tl.store(Y + at + col, a.to(Y.dtype.element_ty), mask=mask)
        tl.store(Y + at + R // 2 + col, b.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_heads(
    X,
    Y,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    batch,
    token,
    inside,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    for start in range(0, HEADS, BLOCK_HEADS):
        head = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        mask = inside[:, None, None] & (head < HEADS)[None, :, None]
        x_at = batch * x_batch + (token * x_token)[:, None, None] + (head * x_head)[None, :, None]
        y_at = batch * y_batch + (token * y_token)[:, None, None] + (head * y_head)[None, :, None]
        a, b = _load_pairs(X, x_at, mask, R, BLOCK, INTERLEAVED)
        _store_pairs(Y, y_at, mask, a * cos_a - b * sin_a, b * cos_b + a * sin_b, R, BLOCK, INTERLEAVED)
        if D > R:
            col = R + tl.arange(0, BLOCK_REST)[None, None, :]
            rest = tl.load(X + x_at + col, mask=mask & (col < D))
            tl.store(Y + y_at + col, rest, mask=mask & (col < D))


@triton.jit
def rotate(
    Q,
    K,
    COS,
    SIN,
    Q_OUT,
    K_OUT,
    tokens,
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
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    blocks = tl.cdiv(tokens, TOKENS)
    token = (tl.program_id(0) % blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    inside = token < tokens
    one = inside[:, None, None]
    cos_a, cos_b = _load_pairs(COS, batch * cos_batch + (token * cos_token)[:, None, None], one, R, BLOCK, INTERLEAVED)
    sin_a, sin_b = _load_pairs(SIN, batch * sin_batch + (token * sin_token)[:, None, None], one, R, BLOCK, INTERLEAVED)
    if INVERSE:
        sin_a, sin_b = -sin_b, -sin_a
    _rotate_heads(
        Q,
        Q_OUT,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        batch,
        token,
        inside,
        q_batch,
        q_head,
        q_token,
        q_out_batch,
        q_out_head,
        q_out_token,
        Q_HEADS,
        D,
        R,
        BLOCK_HEADS,
        BLOCK,
        BLOCK_REST,
        INTERLEAVED,
    )
    _rotate_heads(
        K,
        K_OUT,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        batch,
        token,
        inside,
        k_batch,
        k_head,
        k_token,
        k_out_batch,
        k_out_head,
        k_out_token,
        K_HEADS,
        D,
        R,
        BLOCK_HEADS,
        BLOCK,
        BLOCK_REST,
        INTERLEAVED,
    )


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    batch, q_heads, tokens, size = q.shape
    rotary, k_heads = cos.shape[-1], k.shape[1]
    outs = op._empty(q), op._empty(k)
    tensors = tuple(_inner_contiguous(t) for t in (q, k, cos, sin))
    strides = [(t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)) for t in tensors[2:]]
    strides += [t.stride()[:3] for t in (*tensors[:2], *outs)]
    block, rest = power_of_2(rotary // 2), power_of_2(size - rotary)
    # A thread holds 16 pairs, that is two 16-byte loads of 16-bit elements for either half, or 32 elements of the rest.
    tile = max(1, 2048 // max(block, rest // 2))
    block_heads = min(power_of_2(min(q_heads, k_heads)), tile)
    at_once = min(tile // block_heads, power_of_2(tokens))
    # Neighbours are taken apart in registers, more than the assembler gives float32 on the newest GPUs.
    registers = 144 if interleaved and q.dtype == torch.float32 and capability(q) >= 100 else None
    launch(
        rotate,
        (triton.cdiv(tokens, at_once) * batch,),
        *tensors,
        *outs,
        tokens,
        *(s for t in strides for s in t),
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        D=size,
        R=rotary,
        TOKENS=at_once,
        BLOCK_HEADS=block_heads,
        BLOCK=block,
        BLOCK_REST=rest,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        num_warps=4,
        maxnreg=registers,
    )
    return outs


@falls_back(op._fwd_fallback, inputs=3)
def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    op._check(q, k, cos, sin)
    return _run(q, k, cos, sin, interleaved, False)


@falls_back(op._bwd_fallback, inputs=3)
def backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    op._check(grad_q, grad_k, cos, sin)
    return _run(grad_q, grad_k, cos, sin, interleaved, True)


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: usual heads, and whole and partial rotation."""
    for q_heads, k_heads, size, rotary, interleaved in (
        (32, 8, 128, 128, False),
        (32, 32, 80, 32, False),
        (64, 1, 256, 256, False),
        (32, 2, 128, 64, True),
    ):
        q, k = (torch.empty(2, 4096, h, size, dtype=dtype, device="meta").transpose(1, 2) for h in (q_heads, k_heads))
        cos = torch.empty(1, 4096, rotary, dtype=dtype, device="meta")
        yield forward if size == 128 else backward, (q, k, cos, cos, interleaved)
