"""Quantized linear layers of many tokens: what surrounds a product of cuBLAS.

With few tokens reading the weight is all the work, and each tile decodes what it multiplies. With many, every tile of
tokens would decode the weight again: it is decoded once, into 16 bits, and multiplied by cuBLAS. Tokens that are
rounded to 8 bits go to cuBLAS as integers or as floats of 8 bits. `bigkernels.ops.routes` says from how many on.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._torch_private import MATRIX_UNITS, int_mm, lacks, scaled_mm
from ..ops import routes
from ..ops.codes import Operands
from ..ops.registry import is_forced
from ._launch import launch, power_of_2
from .quantized_linear import _decode, round_tokens

WORKSPACE = 2**27  # elements of a weight that are decoded at once


@triton.jit
def decode_weight(
    CODES,
    SCALE,
    ZERO,
    ROW_SCALE,
    BOOK,
    OUT,
    N,
    K,
    groups,
    stride,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    across = tl.cdiv(K, BK)
    n = tl.program_id(0) // across * BN + tl.arange(0, BN)
    k = tl.program_id(0) % across * BK
    w = _decode(CODES, SCALE, ZERO, ROW_SCALE, BOOK, n, k, N, K, groups, stride, KIND, GROUP, True, BN, BK)
    at = k + tl.arange(0, BK)
    where = n[:, None].to(tl.int64) * K + at[None, :]
    tl.store(OUT + where, w.to(OUT.dtype.element_ty), mask=(n < N)[:, None] & (at < K)[None, :])


@triton.jit
def scale_integers(ACC, TOKEN_SCALE, SCALE, BIAS, OUT, N, BLOCK: tl.constexpr):
    """A row of integer products times both scales."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(ACC + m * N + n, mask=n < N, other=0).to(tl.float32) * tl.load(TOKEN_SCALE + m)
    y = y * tl.load(SCALE + n, mask=n < N, other=0.0)
    if BIAS is not None:
        y += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(OUT + m * N + n, y.to(OUT.dtype.element_ty), mask=n < N)


@triton.jit
def round_tokens_fp8(X, CODES, TOKEN_SCALE, D, stride_x, BLOCK: tl.constexpr):
    """A token in floats of 8 bits (e4m3), its largest at 448; zeros and a scale of NaN where it is not finite."""
    m = tl.program_id(0).to(tl.int64)
    top = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, D, BLOCK):
        at = k + tl.arange(0, BLOCK)
        x = tl.load(X + m * stride_x + at, mask=at < D, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf")))
    most = tl.max(top)
    scale = tl.div_rn(most, 448.0)
    usable = (scale > 0.0) & (most < float("inf"))
    divisor = tl.where(usable, scale, 1.0)
    tl.store(TOKEN_SCALE + m, tl.where(most < float("inf"), scale, float("nan")))
    for k in range(0, D, BLOCK):
        at = k + tl.arange(0, BLOCK)
        x = tl.load(X + m * stride_x + at, mask=at < D, other=0.0).to(tl.float32)
        x = tl.where(usable, tl.div_rn(x, divisor), 0.0)
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        # Above 2^-6 the float's own bits are rounded and its exponent rebased; below, codes count units of 2^-9.
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
        small = size.to(tl.float32, bitcast=True) * 512.0
        subnormal = (small + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        codes = tl.where(size < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)
        tl.store(CODES + m * D + at, codes.to(tl.uint8), mask=at < D)


def decoded(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    row_scale: Tensor | None,
    book: Tensor | None,
    group: int,
    kind: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight (N, K) in `dtype`."""
    n = codes.shape[0]
    out = torch.empty(n, k, dtype=dtype, device=codes.device)
    tile = {"BN": 32, "BK": 128}
    launch(
        decode_weight,
        (triton.cdiv(n, tile["BN"]) * triton.cdiv(k, tile["BK"]),),
        codes,
        scale,
        zero,
        row_scale,
        book,
        out,
        n,
        k,
        scale.shape[1] if group else 0,
        codes.stride(0),
        KIND=kind,
        GROUP=group or 32,
        num_warps=4,
        **tile,
    )
    return out


def _goes(call: str, x: Tensor, to: str) -> bool:
    """Whether the table of routes sends a kind of call on tensors like x to a library."""
    capability = None if is_forced("triton") else routes.capability_of(x)
    return capability is not None and routes.find("quantized_linear", call, capability).by == to


def forward_by_cublas(tokens: Tensor, operands: Operands, bias: Tensor | None, k: int, out: Tensor) -> Tensor:
    """Fills out (M, N), with the rows of the weight decoded a few at a time."""
    n = operands.codes.shape[0]
    at_once = max(1, WORKSPACE // k)
    for begin in range(0, n, at_once):
        rows = slice(begin, begin + at_once)
        w = decoded(*operands.rows(lambda t, rows=rows: t[rows]), k, out.dtype)
        if bias is None:
            torch.mm(tokens, w.t(), out=out[:, rows])
        else:
            torch.addmm(bias[rows], tokens, w.t(), out=out[:, rows])
    return out


def takes_cublas(tokens: Tensor, bias: Tensor | None, wide: bool) -> bool:
    if tokens.shape[0] <= routes.MANY_TOKENS or tokens.dtype == torch.float32 or wide:
        return False
    return (bias is None or bias.dtype == tokens.dtype) and _goes("many tokens", tokens, "cublas")


def takes_cublas_back(grad: Tensor, codes: Tensor, k: int) -> bool:
    # The depth is the weight's rows: sums of parts of it would be rounded between them.
    whole = codes.shape[0] * k <= 2 * WORKSPACE
    return whole and takes_cublas(grad, None, False)


def takes_int_mm(tokens: Tensor, codes: Tensor) -> bool:
    (m, k), n = tokens.shape, codes.shape[0]
    if lacks(MATRIX_UNITS) or m <= routes.INTEGER_TOKENS or k % 8 or n % 8 or codes.stride(0) != k:
        return False
    return _goes("int8-dynamic, many tokens", tokens, "_int_mm")


def forward_by_int_mm(tokens: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    rounded, token_scale = rounded_tokens(tokens, torch.int8)
    scaled(int_mm(rounded, codes.t()), token_scale, scale, bias, out)
    return out


def scaled(acc: Tensor, token_scale: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    m, n = acc.shape
    block = min(1024, power_of_2(n))
    launch(scale_integers, (m, triton.cdiv(n, block)), acc, token_scale, scale, bias, out, n, BLOCK=block, num_warps=4)


def forward_by_scaled_mm(tokens: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rounded, token_scale = rounded_tokens(tokens, torch.uint8)
    y = scaled_mm(
        rounded.view(torch.float8_e4m3fn),
        codes.view(torch.float8_e4m3fn).t(),
        token_scale[:, None],
        scale[None, :],
        bias=None if bias is None else bias.to(tokens.dtype),
        out_dtype=tokens.dtype,
    )
    return y


def rounded_tokens(tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens in int8, or in the bytes of e4m3 (uint8), and their scales (M,)."""
    m, k = tokens.shape
    codes = tokens.new_empty(m, k, dtype=dtype)
    token_scale = tokens.new_empty(m, dtype=torch.float32)
    kernel = round_tokens if dtype == torch.int8 else round_tokens_fp8
    launch(kernel, (m,), tokens, codes, token_scale, k, tokens.stride(0), BLOCK=min(2048, power_of_2(k)), num_warps=4)
    return codes, token_scale
