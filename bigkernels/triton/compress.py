"""8-bit codes with a scale a block, on GPUs: one read and one write of each element, so memory is the only limit.

The codes are those of `bigkernels.ops.compress._reference`, bit for bit: quotients are rounded as IEEE says, and
products that are added to something are exact, so that the compiler may fuse them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import compress as op
from ..ops.registry import KERNEL_DTYPES
from ._launch import falls_back, launch, require
from .quantized_linear import _fp8

_BLOCKS = 16  # of 128 values a program: 2048 elements for 128 threads
_SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer in the low bits
_SHIFT_BITS = tl.constexpr(0x4B400000)
_INFINITY = tl.constexpr(0x7F800000)  # bits
_INT8_TINY, _INT8_INFINITE, _INT8_NAN = map(tl.constexpr, (op.INT8_TINY, op.INT8_INFINITE, op.INT8_NAN))
_FP8_INFINITE, _FP8_NAN = map(tl.constexpr, (op.FP8_INFINITE, op.FP8_NAN))


@triton.jit
def _random(key, element):
    """One word of 32 bits an element."""
    x = element.to(tl.uint32) ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _nearest(x):
    return (x + _SHIFT).to(tl.int32, bitcast=True) - _SHIFT_BITS


@triton.jit
def _int8_codes(y, bits, random, STOCHASTIC: tl.constexpr):
    if STOCHASTIC:
        codes = (y + 128.0 + (random >> 16).to(tl.float32) * 1.52587890625e-05).to(tl.int32) - 128  # 2^-16
    else:
        codes = _nearest(y)
    size = bits & 0x7FFFFFFF
    sign = tl.where(bits < 0, -1, 1)
    codes = tl.where((codes == 0) & (size != 0), _INT8_TINY * sign, codes)
    codes = tl.where(size == _INFINITY, _INT8_INFINITE * sign, codes)
    return tl.where(size > _INFINITY, _INT8_NAN, codes)


@triton.jit
def _fp8_codes(y, bits, random, STOCHASTIC: tl.constexpr):
    """Above 2^-6 the float's own bits are rounded and its exponent rebased; below, codes count units of 2^-9."""
    magnitude_bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    magnitude = magnitude_bits.to(tl.float32, bitcast=True)
    if STOCHASTIC:
        normal = (magnitude_bits + (random & 0xFFFFF).to(tl.int32)) >> 20
        subnormal = (magnitude * 512.0 + (random >> 9).to(tl.float32) * 1.1920928955078125e-07).to(tl.int32)  # 2^-23
    else:
        normal = (magnitude_bits + 0x7FFFF + ((magnitude_bits >> 20) & 1)) >> 20
        subnormal = _nearest(magnitude * 512.0)
    codes = tl.where(magnitude < 0.015625, subnormal, normal - 960)
    size = bits & 0x7FFFFFFF
    codes = tl.where((codes == 0) & (size != 0), 1, codes)
    codes = tl.where(size == _INFINITY, _FP8_INFINITE, codes)
    codes = tl.where(size > _INFINITY, _FP8_NAN, codes)
    return codes | ((bits >> 24) & 0x80)


@triton.jit
def _place(N, BLOCKS: tl.constexpr):
    """A program's blocks, their elements, and which there are."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    return block, element, block * 128 < N, element < N


@triton.jit(do_not_specialize=["key"])
def encode(
    X,
    CODES,
    SCALE,
    N,
    key,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block, element, there, mask = _place(N, BLOCKS)
    x = tl.load(X + element, mask=mask, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    # Bits of magnitudes are ordered as magnitudes are.
    size = bits & 0x7FFFFFFF
    finite = size < _INFINITY
    largest = tl.max(tl.where(finite, size, 0), 1).to(tl.float32, bitcast=True)
    largest = tl.maximum(largest, LEAST)
    tl.store(SCALE + block, tl.minimum(tl.div_rn(largest, TOP), MOST), mask=there)
    y = tl.where(finite, x, 0.0) * tl.div_rn(TOP, largest)[:, None]
    y = tl.minimum(tl.maximum(y, -TOP), TOP)
    random = _random(key, element)
    codes = _fp8_codes(y, bits, random, STOCHASTIC) if TOP == 416.0 else _int8_codes(y, bits, random, STOCHASTIC)
    tl.store(CODES + element, codes.to(tl.uint8), mask=mask)


@triton.jit
def decode(CODES, SCALE, OUT, N, FP8: tl.constexpr, SMALLEST: tl.constexpr, BLOCKS: tl.constexpr):
    block, element, there, mask = _place(N, BLOCKS)
    scale = tl.load(SCALE + block, mask=there, other=0.0)[:, None]
    codes = tl.load(CODES + element, mask=mask, other=0)
    if FP8:
        values = _fp8(codes)
        values = tl.where((codes & 0x7F) == _FP8_INFINITE, values * float("inf"), values) * scale
    else:
        code = codes.to(tl.int8, bitcast=True).to(tl.float32)
        size = tl.abs(code)
        tiny = tl.maximum(scale * 0.00390625, SMALLEST)  # 2^-8
        values = tl.where(size == _INT8_TINY, tl.where(code < 0, -tiny, tiny), code * scale)
        values = tl.where(size == _INT8_INFINITE, code * float("inf"), values)
        values = tl.where(size > _INT8_INFINITE, float("nan"), values)
    tl.store(OUT + element, values.to(OUT.dtype.element_ty), mask=mask)


def _grid(n: int) -> tuple[int]:
    return (triton.cdiv(n, op.BLOCK * _BLOCKS),)


@falls_back(op._reference)
def infer(x: Tensor, fp8: bool, stochastic: bool, key: int) -> tuple[Tensor, Tensor]:
    require("compress", x.dim() == 1, "x must be flat")
    x, n = x.contiguous(), x.shape[0]
    codes = x.new_empty(n, dtype=torch.uint8)
    scale = x.new_empty(triton.cdiv(n, op.BLOCK), dtype=torch.float32)
    top = op.FORMATS["fp8" if fp8 else "int8"]
    launch(
        encode,
        _grid(n),
        x,
        codes,
        scale,
        n,
        key,
        TOP=top,
        LEAST=top * op.LEAST_SCALE,
        MOST=op.LARGEST_SCALE[top],
        STOCHASTIC=stochastic,
        BLOCKS=_BLOCKS,
        num_warps=4,
    )
    return codes, scale


def decompress(codes: Tensor, scale: Tensor, fp8: bool, dtype: torch.dtype) -> Tensor:
    if codes.numel() == 0 or dtype not in KERNEL_DTYPES:
        return op._decode(codes, scale, fp8, dtype)
    n = codes.numel()
    fits = codes.dtype == torch.uint8 and codes.is_contiguous() and scale.is_contiguous()
    fits = fits and scale.dtype == torch.float32 and scale.numel() == triton.cdiv(n, op.BLOCK)
    require("decompress", fits, "codes and scale do not fit")
    out = codes.new_empty(n, dtype=dtype)
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0  # that is not zero
    launch(decode, _grid(n), codes, scale, out, n, FP8=fp8, SMALLEST=smallest, BLOCKS=_BLOCKS, num_warps=4)
    return out


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: both formats and roundings, and an odd number."""
    for n in (4096 * 4096, 4096 * 4096 + 3):
        x = torch.empty(n, dtype=dtype, device="meta")
        codes, scale = op._fake(x, True, False, 0)
        for fp8 in (False, True):
            for stochastic in (False, True):
                yield infer, (x, fp8, stochastic, 12345)
            yield decompress, (codes, scale, fp8, dtype)
