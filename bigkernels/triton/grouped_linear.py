"""Products of tokens with their experts' weights on GPUs, plain and quantized: all experts in one launch.

Where an expert's tokens end is known on the device alone. The grid has room for as many blocks of rows as there can be,
one more an expert than all tokens together fill; each program adds up how many blocks the experts before have, finds
its own, and ends if it has none.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import codes as kinds
from ..ops import grouped_linear as op
from ._launch import falls_back, launch, power_of_2, rows, since
from .quantized_linear import _FP8, _INT8, _decode, _tile, _warps_back, round_tokens

_NUMBERS = tl.constexpr(kinds.NUMBERS)


@triton.jit
def _limits(ENDS, tokens, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Where each expert's tokens begin and end; nothing outside of the tokens, whatever the ends say."""
    expert = tl.arange(0, BLOCK_E)
    inside = expert < EXPERTS
    begin = tl.load(ENDS + expert - 1, mask=inside & (expert > 0), other=0).to(tl.int32)
    end = tl.load(ENDS + expert, mask=inside, other=0).to(tl.int32)
    begin = tl.minimum(tl.maximum(begin, 0), tokens)
    return expert, begin, tl.where(inside, tl.minimum(end, tokens), 0)


@triton.jit
def _place(ENDS, block, tokens, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr):
    """The expert that has a block of rows, its first row there, and where the expert's rows end."""
    expert, begin, end = _limits(ENDS, tokens, EXPERTS, BLOCK_E)
    count = (tl.maximum(end - begin, 0) + BM - 1) // BM
    after = tl.cumsum(count, 0)
    found = tl.sum((after <= block).to(tl.int32), 0)
    mine = expert == found
    first = tl.sum(tl.where(mine, begin + (block - after + count) * BM, 0), 0)
    return found, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _weight(
    CODES,
    SCALE,
    ZERO,
    ROW_SCALE,
    BOOK,
    n,
    k,
    N,
    K,
    groups,
    stride,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    if KIND == _NUMBERS:
        at = k + tl.arange(0, BK)
        mask = (n < N)[:, None] & (at < K)[None, :]
        values = tl.load(CODES + n.to(tl.int64)[:, None] * stride + at[None, :], mask=mask, other=0.0)
    else:
        values = _decode(CODES, SCALE, ZERO, ROW_SCALE, BOOK, n, k, N, K, groups, stride, KIND, GROUP, SCALED, BN, BK)
    return values


@triton.jit
def multiply_groups(
    X,
    TOKEN_SCALE,
    ENDS,
    CODES,
    SCALE,
    ZERO,
    ROW_SCALE,
    BOOK,
    OUT,
    M,
    N,
    K,
    groups,
    blocks,
    stride_x,
    stride,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out = x @ w.T by experts; with TOKEN_SCALE, of tokens in integers."""
    expert, first, end = _place(ENDS, tl.program_id(0) % blocks, M, EXPERTS, BLOCK_E, BM)
    if expert >= EXPERTS:
        return
    m = first + tl.arange(0, BM)
    n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    each = N if KIND == _INT8 or KIND == _FP8 else N * groups
    wide = expert.to(tl.int64)
    CODES += wide * N * stride
    if SCALE is not None:
        SCALE += wide * each
    if ZERO is not None:
        ZERO += wide * each
    if ROW_SCALE is not None:
        ROW_SCALE += wide * N
    acc = tl.zeros((BM, BN), tl.float32 if TOKEN_SCALE is None else tl.int32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        x = tl.load(
            X + m[:, None].to(tl.int64) * stride_x + at[None, :], mask=(m < end)[:, None] & (at < K)[None, :], other=0
        )
        if TOKEN_SCALE is None:
            w = _weight(CODES, SCALE, ZERO, ROW_SCALE, BOOK, n, k, N, K, groups, stride, KIND, GROUP, False, BN, BK)
            acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="tf32x3")
        else:
            w = tl.load(
                CODES + n[:, None].to(tl.int64) * stride + at[None, :],
                mask=(n < N)[:, None] & (at < K)[None, :],
                other=0,
            )
            acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    y = acc.to(tl.float32)
    if TOKEN_SCALE is not None:
        y = y * tl.load(TOKEN_SCALE + m, mask=m < end, other=0.0)[:, None]
    if KIND == _INT8 or KIND == _FP8:
        y = y * tl.load(SCALE + n, mask=n < N, other=0.0)[None, :]
    tl.store(
        OUT + m[:, None].to(tl.int64) * N + n[None, :],
        y.to(OUT.dtype.element_ty),
        mask=(m < end)[:, None] & (n < N)[None, :],
    )


@triton.jit
def multiply_groups_back(
    GRAD,
    ENDS,
    CODES,
    SCALE,
    ZERO,
    ROW_SCALE,
    BOOK,
    OUT,
    M,
    N,
    K,
    groups,
    blocks,
    stride_grad,
    stride,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out (M, K) = grad (M, N) @ w by experts."""
    expert, first, end = _place(ENDS, tl.program_id(0) % blocks, M, EXPERTS, BLOCK_E, BM)
    if expert >= EXPERTS:
        return
    m = first + tl.arange(0, BM)
    k = tl.program_id(0) // blocks * BK
    each = N if KIND == _INT8 or KIND == _FP8 else N * groups
    wide = expert.to(tl.int64)
    CODES += wide * N * stride
    if SCALE is not None:
        SCALE += wide * each
    if ZERO is not None:
        ZERO += wide * each
    if ROW_SCALE is not None:
        ROW_SCALE += wide * N
    acc = tl.zeros((BM, BK), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        grad = tl.load(
            GRAD + m[:, None].to(tl.int64) * stride_grad + n[None, :],
            mask=(m < end)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        w = _weight(CODES, SCALE, ZERO, ROW_SCALE, BOOK, n, k, N, K, groups, stride, KIND, GROUP, True, BN, BK)
        acc = tl.dot(grad, w.to(grad.dtype), acc, input_precision="tf32x3")
    at = k + tl.arange(0, BK)
    tl.store(
        OUT + m[:, None].to(tl.int64) * K + at[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=(m < end)[:, None] & (at < K)[None, :],
    )


@triton.jit
def add_up_groups(
    GRAD,
    X,
    ENDS,
    OUT,
    M,
    N,
    K,
    stride_grad,
    stride_x,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out (E, N, K): grad.T @ x of each expert's tokens."""
    across, down = tl.cdiv(K, BK), tl.cdiv(N, BN)
    place, found = tl.program_id(0) % (across * down), tl.program_id(0) // (across * down)
    n = place // across * BN + tl.arange(0, BN)
    k = place % across * BK + tl.arange(0, BK)
    expert, begin, end = _limits(ENDS, M, EXPERTS, BLOCK_E)
    first = tl.sum(tl.where(expert == found, begin, 0), 0)
    last = tl.sum(tl.where(expert == found, end, 0), 0)
    acc = tl.zeros((BN, BK), tl.float32)
    for start in range(first, last, BM):
        m = start + tl.arange(0, BM)
        grad = tl.load(
            GRAD + m[:, None].to(tl.int64) * stride_grad + n[None, :],
            mask=(m < last)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        x = tl.load(
            X + m[:, None].to(tl.int64) * stride_x + k[None, :], mask=(m < last)[:, None] & (k < K)[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(grad), x, acc, input_precision="tf32x3")
    where = (found.to(tl.int64) * N + n[:, None]) * K + k[None, :]
    tl.store(OUT + where, acc.to(OUT.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


# ---- launches --------------------------------------------------------------------------------------------------------


def _constants(ends: Tensor, group: int, kind: int) -> dict[str, int]:
    return {"EXPERTS": ends.shape[0], "BLOCK_E": power_of_2(ends.shape[0]), "KIND": kind, "GROUP": group or 32}


def _blocks(tokens: int, experts: int, size: int) -> int:
    """As many blocks of `size` rows as the experts can need."""
    return min(tokens, tokens // size + min(tokens, experts))


@falls_back(op._forward)
def forward(x, ends, codes, scale, zero, row_scale, book, group, kind, dynamic) -> Tensor:
    (m, k), experts = x.shape, ends.shape[0]
    n = codes.shape[0] // experts
    out = x.new_zeros(m, n)  # tokens after the last end belong to no program
    if n == 0:
        return out
    tokens, codes, ends, token_scale = rows(x), rows(codes), ends.contiguous(), None
    tile, warps = _tile(-(-m // experts), x.dtype)
    if x.dtype == torch.float32 and tile["BM"] > 16 and since(3, 8):  # which spills 16 to 32 bytes of wider ones
        tile["BN"] = 32
    if dynamic:
        rounded, token_scale = x.new_empty(m, k, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
        launch(
            round_tokens,
            (m,),
            tokens,
            rounded,
            token_scale,
            k,
            tokens.stride(0),
            BLOCK=min(2048, power_of_2(k)),
            num_warps=4,
        )
        tokens = rounded
        few = m <= 16 * experts
        tile, warps = ({"BM": 16, "BN": 64, "BK": 128}, 4) if few else ({"BM": 128, "BN": 128, "BK": 64}, 8)
    blocks = _blocks(m, experts, tile["BM"])
    launch(
        multiply_groups,
        (blocks * triton.cdiv(n, tile["BN"]),),
        tokens,
        token_scale,
        ends,
        codes,
        scale,
        zero,
        row_scale,
        book,
        out,
        m,
        n,
        k,
        scale.shape[1] if group else 0,
        blocks,
        tokens.stride(0),
        codes.stride(0),
        num_warps=warps,
        **_constants(ends, group, kind),
        **tile,
    )
    return out


@falls_back(op._backward)
def backward(grad, ends, codes, scale, zero, row_scale, book, group, kind, k) -> Tensor:
    (m, n), experts = grad.shape, ends.shape[0]
    out = grad.new_zeros(m, k)
    if k == 0:
        return out
    grad, codes, ends = rows(grad), rows(codes), ends.contiguous()
    wide, each = grad.dtype == torch.float32, -(-m // experts)
    tile = {
        "BM": 16 if each <= 16 else 64 if wide or each <= 64 else 128,
        "BN": 32 if wide else 64,
        "BK": 64 if wide or each > 16 else 128,
    }
    blocks = _blocks(m, experts, tile["BM"])
    grid = (blocks * triton.cdiv(k, tile["BK"]),)
    launch(
        multiply_groups_back,
        grid,
        grad,
        ends,
        codes,
        scale,
        zero,
        row_scale,
        book,
        out,
        m,
        n,
        k,
        scale.shape[1] if group else 0,
        blocks,
        grad.stride(0),
        codes.stride(0),
        num_warps=_warps_back(tile["BM"], wide),
        **_constants(ends, group, kind),
        **tile,
    )
    return out


@falls_back(op._weight_backward, inputs=2)
def weight_backward(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    (m, n), k, experts = grad.shape, x.shape[1], ends.shape[0]
    out = x.new_empty(experts, n, k)
    grad, x, ends = rows(grad), rows(x), ends.contiguous()
    tile = {"BM": 32, "BN": 64, "BK": 64} if x.dtype == torch.float32 else {"BM": 64, "BN": 128, "BK": 128}
    grid = (experts * triton.cdiv(n, tile["BN"]) * triton.cdiv(k, tile["BK"]),)
    launch(
        add_up_groups,
        grid,
        grad,
        x,
        ends,
        out,
        m,
        n,
        k,
        grad.stride(0),
        x.stride(0),
        EXPERTS=experts,
        BLOCK_E=power_of_2(experts),
        num_warps=4 if x.dtype == torch.float32 else 8,
        **tile,
    )
    return out


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: every format, a few tokens and many, and backward."""
    experts, n, k = 8, 1024, 2048
    ends = torch.empty(experts, dtype=torch.int32, device="meta")
    one = torch.empty(experts * n, dtype=torch.float32, device="meta")
    codes, halves = (one.new_empty(experts * n, size, dtype=torch.uint8) for size in (k, k // 2))
    scale = one.new_empty(experts * n, k // 64)
    plain = one.new_empty(experts * n, k, dtype=dtype)
    of, signed, half = kinds.Operands.of, codes.to(torch.int8), scale.half()
    for dynamic, weight in (
        (False, kinds.Operands.plain(plain)),
        (False, of(kinds.INT8, signed, one)),
        (True, of(kinds.INT8, signed, one)),
        (False, of(kinds.FP8, codes, one)),
        (False, of(kinds.AFFINE4, halves, half, zero=half, row_scale=one, group=64)),
        (False, of(kinds.BOOK4, halves, scale, book=one.new_empty(16), group=64)),
    ):
        for tokens in (8, 8192):
            x = torch.empty(tokens, k, dtype=dtype, device="meta")
            yield forward, (x, ends, *weight, dynamic)
            if not dynamic:
                yield backward, (x.new_empty(tokens, n), ends, *weight, k)
    yield weight_backward, (plain.new_empty(8192, n), plain.new_empty(8192, k), ends)
