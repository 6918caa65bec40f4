"""Linear layers with quantized weights on GPUs: codes are decoded in registers, a tile at a time, into the operands of
the tensor cores.

A few tokens are bound by reading the codes: the depth is split among programs until they fill the device, and their
sums are added up by a second kernel, in a fixed order. Many tokens share what a program decodes. float32 products are
made of three of tensor cores (tf32x3): multiply-adds spill registers at these sizes.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import codes as kinds
from ..ops import quantized_linear as op
from ..ops import routes
from ._launch import capability, falls_back, launch, power_of_2, processors, require, rows, since

_INT8, _FP8 = tl.constexpr(kinds.INT8.number), tl.constexpr(kinds.FP8.number)
_AFFINE4, _AFFINE4M = tl.constexpr(kinds.AFFINE4.number), tl.constexpr(kinds.AFFINE4M.number)
_BOOK4, _INT8G = tl.constexpr(kinds.BOOK4.number), tl.constexpr(kinds.INT8G.number)
_FEW = 16  # tokens: the least that tensor cores multiply


@triton.jit
def _fp8(codes):
    """float8_e4m3fn to float32: the exponent is rebased by a product, which makes subnormal numbers normal too."""
    codes = codes.to(tl.int32)
    magnitude = codes & 0x7F
    value = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(codes >= 0x80, -value, value)


@triton.jit
def _decode(
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
    """Rows n (BN,) and elements [k, k + BK) of the weight in float32, finite where they are outside of it. 8-bit codes
    without their scale, which is the row's, unless SCALED.
    """
    inside = n < N
    row = n.to(tl.int64)
    if KIND == _INT8 or KIND == _FP8:
        at = k + tl.arange(0, BK)
        mask = inside[:, None] & (at < K)[None, :]
        codes = tl.load(CODES + row[:, None] * stride + at[None, :], mask=mask, other=0)
        values = codes.to(tl.float32) if KIND == _INT8 else _fp8(codes)
        if SCALED:
            values = values * tl.load(SCALE + row, mask=inside, other=0.0)[:, None]
    else:
        if KIND == _INT8G:
            at = k + tl.arange(0, BK)
            mask = inside[:, None] & (at < K)[None, :]
            codes = tl.load(CODES + row[:, None] * stride + at[None, :], mask=mask, other=0)
        else:
            half = k // 2 + tl.arange(0, BK // 2)
            mask = inside[:, None] & (2 * half < K)[None, :]
            pairs = tl.load(CODES + row[:, None] * stride + half[None, :], mask=mask, other=0)
            codes = tl.interleave(pairs & 15, pairs >> 4)
        GROUPS: tl.constexpr = BK // GROUP if BK > GROUP else 1
        g = k // GROUP + tl.arange(0, GROUPS)
        where = row[:, None] * groups + g[None, :]
        known = inside[:, None] & (g < groups)[None, :]
        scale = tl.load(SCALE + where, mask=known, other=0.0).to(tl.float32)
        if KIND == _BOOK4:
            # Not by loads: in a loop the compiler would stage what they gather in shared memory.
            book = tl.broadcast_to(tl.load(BOOK + tl.arange(0, 16))[None, :], (BN, 16))
            values = tl.reshape(tl.gather(book, codes.to(tl.int32), 1), (BN, GROUPS, BK // GROUPS))
        else:
            values = tl.reshape(codes.to(tl.float32), (BN, GROUPS, BK // GROUPS))
        if KIND == _AFFINE4:
            zero = tl.load(ZERO + where, mask=known, other=0.0).to(tl.float32)
            scale = scale * tl.load(ROW_SCALE + row, mask=inside, other=0.0)[:, None]
            values = values - zero[:, :, None]
        values = values * scale[:, :, None]
        if KIND == _AFFINE4M:
            values += tl.load(ZERO + where, mask=known, other=0.0).to(tl.float32)[:, :, None]
        values = tl.reshape(values, (BN, BK))
    return values


@triton.jit
def _put(OUT, PARTS, acc, m, n, M, N, part, SPLIT: tl.constexpr):
    where = m[:, None].to(tl.int64) * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if SPLIT:
        tl.store(PARTS + part.to(tl.int64) * M * N + where, acc, mask=mask)
    else:
        tl.store(OUT + where, acc.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def multiply(
    X,
    CODES,
    SCALE,
    ZERO,
    ROW_SCALE,
    BOOK,
    BIAS,
    OUT,
    PARTS,
    M,
    N,
    K,
    groups,
    stride_x,
    stride,
    depth,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out = x @ w.T + bias, or the sums over [part * depth, (part + 1) * depth) without scale of 8 bits and bias."""
    across = tl.cdiv(M, BM)
    m = tl.program_id(0) % across * BM + tl.arange(0, BM)
    n = tl.program_id(0) // across * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    acc = tl.zeros((BM, BN), tl.float32)
    end = tl.minimum((part + 1) * depth, K)
    for k in range(part * depth, end, BK):
        at = k + tl.arange(0, BK)
        x = tl.load(
            X + m[:, None].to(tl.int64) * stride_x + at[None, :], mask=(m < M)[:, None] & (at < K)[None, :], other=0.0
        )
        w = _decode(CODES, SCALE, ZERO, ROW_SCALE, BOOK, n, k, N, K, groups, stride, KIND, GROUP, False, BN, BK)
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="tf32x3")
    if not SPLIT:
        if KIND == _INT8 or KIND == _FP8:
            acc = acc * tl.load(SCALE + n, mask=n < N, other=0.0)[None, :]
        if BIAS is not None:
            acc += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    _put(OUT, PARTS, acc, m, n, M, N, part, SPLIT)


@triton.jit
def add_parts(PARTS, SCALE, BIAS, OUT, M, N, parts, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """What `multiply` left out, one row of the result at a time."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        acc += tl.load(PARTS + (part * M + m) * N + n, mask=n < N, other=0.0)
    if KIND == _INT8 or KIND == _FP8:
        acc = acc * tl.load(SCALE + n, mask=n < N, other=0.0)
    if BIAS is not None:
        acc += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(OUT + m * N + n, acc.to(OUT.dtype.element_ty), mask=n < N)


@triton.jit
def multiply_back(
    GRAD,
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
    stride_grad,
    stride,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out (M, K) = grad (M, N) @ w."""
    across = tl.cdiv(M, BM)
    m = tl.program_id(0) % across * BM + tl.arange(0, BM)
    k = tl.program_id(0) // across * BK
    acc = tl.zeros((BM, BK), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        grad = tl.load(
            GRAD + m[:, None].to(tl.int64) * stride_grad + n[None, :],
            mask=(m < M)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        w = _decode(CODES, SCALE, ZERO, ROW_SCALE, BOOK, n, k, N, K, groups, stride, KIND, GROUP, True, BN, BK)
        acc = tl.dot(grad, w.to(grad.dtype), acc, input_precision="tf32x3")
    _put(OUT, OUT, acc, m, k + tl.arange(0, BK), M, K, 0, False)


# ---- tokens rounded to 8 bits ----------------------------------------------------------------------------------------


@triton.jit
def round_tokens(X, CODES, TOKEN_SCALE, D, stride_x, BLOCK: tl.constexpr):
    """A token in integers, ``max|x| / 127`` apart; zeros and a scale of NaN where it holds what is not finite."""
    m = tl.program_id(0).to(tl.int64)
    top = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, D, BLOCK):
        at = k + tl.arange(0, BLOCK)
        x = tl.load(X + m * stride_x + at, mask=at < D, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf")))
    most = tl.max(top)
    scale = tl.div_rn(most, 127.0)
    usable = (scale > 0.0) & (most < float("inf"))
    divisor = tl.where(usable, scale, 1.0)
    tl.store(TOKEN_SCALE + m, tl.where(most < float("inf"), scale, float("nan")))
    for k in range(0, D, BLOCK):
        at = k + tl.arange(0, BLOCK)
        x = tl.load(X + m * stride_x + at, mask=at < D, other=0.0).to(tl.float32)
        x = tl.where(usable, tl.div_rn(x, divisor), 0.0)
        x = tl.minimum(tl.maximum(x, -127.0), 127.0)
        x = (x + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
        tl.store(CODES + m * D + at, x.to(tl.int8), mask=at < D)


@triton.jit
def multiply_integers(
    X,
    TOKEN_SCALE,
    CODES,
    SCALE,
    BIAS,
    OUT,
    M,
    N,
    K,
    stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    across = tl.cdiv(M, BM)
    m = tl.program_id(0) % across * BM + tl.arange(0, BM)
    n = tl.program_id(0) // across * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        x = tl.load(X + m[:, None].to(tl.int64) * K + at[None, :], mask=(m < M)[:, None] & (at < K)[None, :], other=0)
        w = tl.load(
            CODES + n[:, None].to(tl.int64) * stride + at[None, :], mask=(n < N)[:, None] & (at < K)[None, :], other=0
        )
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    y = acc.to(tl.float32) * tl.load(TOKEN_SCALE + m, mask=m < M, other=0.0)[:, None]
    y = y * tl.load(SCALE + n, mask=n < N, other=0.0)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    _put(OUT, OUT, y, m, n, M, N, 0, False)


# ---- launches --------------------------------------------------------------------------------------------------------


def _tile(m: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Sizes of a program's tile, forward, and its warps."""
    wide = dtype == torch.float32
    if m <= _FEW:
        return {"BM": 16, "BN": 64, "BK": 64 if wide else 128}, 4
    if m <= 64:
        return {"BM": power_of_2(m), "BN": 64, "BK": 32 if wide else 64}, 4
    return {"BM": 64 if wide else 128, "BN": 64 if wide else 128, "BK": 32 if wide else 64}, 4 if wide else 8


def _splits(programs: int, k: int, block: int, device: torch.device) -> int:
    """Parts of the depth: enough that programs fill the device twice, and of four blocks at least."""
    wanted = triton.cdiv(2 * processors(device), programs)
    return max(1, min(wanted, k // (4 * block)))


@falls_back(op._forward)
def forward(x, codes, scale, zero, row_scale, book, bias, group, kind, k, dynamic, wide=False) -> Tensor:
    n = codes.shape[0]
    out = x.new_empty(*x.shape[:-1], n, dtype=torch.float32 if wide else x.dtype)
    if n == 0:
        return out
    tokens = rows(x)
    m = tokens.shape[0]
    if dynamic:
        return _forward_rounded(tokens, codes, scale, bias, kind, out)
    if _many.takes_cublas(tokens, bias, wide):
        operands = kinds.Operands(codes, scale, zero, row_scale, book, group, kind)
        _many.forward_by_cublas(tokens, operands, bias, k, out.view(m, n))
        return out
    tile, warps = _tile(m, x.dtype)
    programs = triton.cdiv(m, tile["BM"]) * triton.cdiv(n, tile["BN"])
    splits = _splits(programs, k, tile["BK"], x.device) if m <= _FEW else 1
    depth = triton.cdiv(triton.cdiv(k, splits), tile["BK"]) * tile["BK"]
    splits = triton.cdiv(k, depth)
    parts = x.new_empty(splits, m, n, dtype=torch.float32) if splits > 1 else None
    groups = scale.shape[1] if group else 0
    # Triton 3.8 spills 8 bytes of lookups on the newest GPUs, where the assembler may choose.
    lookups = m <= _FEW and kind == kinds.BOOK4.number and x.dtype != torch.float32
    registers = 192 if lookups and since(3, 8) and capability(x) >= 100 else None
    launch(
        multiply,
        (programs, splits),
        tokens,
        codes,
        scale,
        zero,
        row_scale,
        book,
        bias,
        out,
        parts,
        m,
        n,
        k,
        groups,
        tokens.stride(0),
        codes.stride(0),
        depth,
        KIND=kind,
        GROUP=group or 32,
        SPLIT=splits > 1,
        num_warps=warps,
        maxnreg=registers,
        **tile,
    )
    if splits > 1:
        block = min(1024, power_of_2(n))
        launch(
            add_parts,
            (m, triton.cdiv(n, block)),
            parts,
            scale,
            bias,
            out,
            m,
            n,
            splits,
            KIND=kind,
            BLOCK=block,
            num_warps=4,
        )
    return out


def _forward_rounded(
    tokens: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kind: int,
    out: Tensor,
) -> Tensor:
    (m, k), n = tokens.shape, codes.shape[0]
    if kind == kinds.FP8.number:
        require("quantized_linear_fwd", routes.takes_scaled_mm(tokens, codes), "fp8 tokens are for torch._scaled_mm")
        return _many.forward_by_scaled_mm(tokens, codes, scale, bias).view(out.shape)
    if _many.takes_int_mm(tokens, codes):
        return _many.forward_by_int_mm(tokens, codes, scale, bias, out)
    rounded, token_scale = _many.rounded_tokens(tokens, torch.int8)
    tile, warps = ({"BM": 16, "BN": 64, "BK": 128}, 4) if m <= _FEW else ({"BM": 128, "BN": 128, "BK": 64}, 8)
    grid = (triton.cdiv(m, tile["BM"]) * triton.cdiv(n, tile["BN"]),)
    launch(
        multiply_integers,
        grid,
        rounded,
        token_scale,
        codes,
        scale,
        bias,
        out,
        m,
        n,
        k,
        codes.stride(0),
        num_warps=warps,
        **tile,
    )
    return out


def _warps_back(rows: int, wide: bool) -> int:
    """Of a tile that multiplies gradients."""
    return 8 if rows == 128 or wide and since(3, 8) else 4  # which spills 8 to 16 bytes of four warps' in float32


@falls_back(op._backward)
def backward(grad, codes, scale, zero, row_scale, book, group, kind, k) -> Tensor:
    out = grad.new_empty(*grad.shape[:-1], k)
    if k == 0:
        return out
    rows_of_grad = rows(grad)
    m, n = rows_of_grad.shape
    if _many.takes_cublas_back(rows_of_grad, codes, k):
        w = _many.decoded(codes, scale, zero, row_scale, book, group, kind, k, grad.dtype)
        torch.mm(rows_of_grad, w, out=out.view(m, k))
        return out
    wide = grad.dtype == torch.float32
    tile = {
        "BM": 16 if m <= 16 else 64 if wide or m <= 64 else 128,
        "BN": 32 if wide else 64,
        "BK": 64 if wide or m > 16 else 128,
    }
    grid = (triton.cdiv(m, tile["BM"]) * triton.cdiv(k, tile["BK"]),)
    launch(
        multiply_back,
        grid,
        rows_of_grad,
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
        rows_of_grad.stride(0),
        codes.stride(0),
        KIND=kind,
        GROUP=group or 32,
        num_warps=_warps_back(tile["BM"], wide),
        **tile,
    )
    return out


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: every format with a few and many tokens, and backward."""
    n, k = 4096, 4096
    one = torch.empty(n, dtype=torch.float32, device="meta")
    bytes, halves = (torch.empty(n, size, dtype=torch.uint8, device="meta") for size in (k, k // 2))
    book = one.new_empty(16)
    of, signed = kinds.Operands.of, bytes.to(torch.int8)
    operands = [of(kinds.INT8, signed, one), of(kinds.FP8, bytes, one)]
    for group in (32, 64, 128):
        scale = one.new_empty(n, k // group)
        half = scale.half()
        operands.append(of(kinds.AFFINE4, halves, half, zero=half, row_scale=one, group=group))
        operands.append(of(kinds.BOOK4, halves, scale, book=book, group=group))
        if group == 32:
            operands.append(of(kinds.AFFINE4M, halves, half, zero=half, group=group))
            operands.append(of(kinds.INT8G, signed, half, group=group))
    for weight in operands:
        typical = weight.group in (0, 64)  # the others differ in how many groups meet in a tile
        for m in (1, 64, 2048) if typical else (1, 2048):
            x = torch.empty(m, k, dtype=dtype, device="meta")
            yield forward, (x, *weight[:5], x.new_empty(n), *weight[5:], k, False)
            if typical or m > 64:
                yield backward, (x.new_empty(m, n), *weight, k)
    for m in (1, 2048):
        x = torch.empty(m, k, dtype=dtype, device="meta")
        yield forward, (x, *operands[0][:5], None, *operands[0][5:], k, True)
    for weight in operands:
        yield _many.decoded, (*weight, k, dtype)
    yield _many.rounded_tokens, (x, torch.uint8)
    yield _many.scaled, (x.new_empty(2048, n, dtype=torch.int32), one.new_empty(2048), one, None, x.new_empty(2048, n))


from . import _quantized_many as _many  # noqa: E402 - it uses the kernels above
