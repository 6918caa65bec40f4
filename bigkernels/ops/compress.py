"""Tensors in 8 bits with a scale a block, for what is kept and needed again: saved activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import check_tensor
from .registry import REFUSED, Operator, define

BLOCK = 128  # values that share a scale: 1.03 bytes a value
# The largest number of a code. The codes above it say what no multiple of a scale can.
FORMATS = {"int8": 125.0, "fp8": 416.0}
INT8_TINY, INT8_INFINITE, INT8_NAN = 126, 127, -128  # the first two with either sign
FP8_INFINITE, FP8_NAN = 0x7E, 0x7F  # beside the sign
TINY = 2.0**-8  # of a step of "int8": how a value reads back that is not zero and smaller than half a step
LEAST_SCALE = 2.0**-116  # what is scaled by it is a normal number in every type
# Times the largest code it is still a number, in float32.
LARGEST_SCALE = {
    top: float(torch.tensor(float.fromhex("0x1.fffffcp127"), device="cpu", dtype=torch.float32) / top) * (1 - 2.0**-22)
    for top in FORMATS.values()
}


def compress(x: Tensor, format: str = "int8", *, stochastic: bool = False) -> tuple[Tensor, Tensor]:
    """The values of a tensor in 8 bits: ``scale * code`` with one scale for 128 values that lie next to each other.

    "int8" has steps of a 125th of the block's largest value; "fp8" (e4m3, Micikevicius et al. 2022,
    https://arxiv.org/abs/2209.05433) steps of 3 to 6 % of a value down to a 2^-15th of it. In both, only zero reads
    back as zero: what is smaller than a code can tell becomes the smallest value of a code, with its sign. Infinities
    and NaN stay, and what lies beside them does not notice.

    Args:
        x: floating, any shape; its elements are taken in row-major order.
        format: "int8" or "fp8".
        stochastic: round up or down at random, so that the mean of what is read back is `x`, to within the smallest
            value of a code; drawn from torch's generator. Otherwise to the nearest.

    Returns:
        (codes (n,) uint8, scale (ceil(n / 128),) float32). The scale of a block with numbers beyond float32's range is
        infinite, and it does not read back.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: there is no such format.
    """
    check_tensor("ops.compress", "x", x)
    if format not in FORMATS:
        raise ValueError(f"bigkernels.ops.compress: format is {format!r}; accepted are {', '.join(FORMATS)}")
    key = int(torch.randint(2**31 - 1, (), dtype=torch.int64, device="cpu")) if stochastic else 0
    return encode(x.detach().reshape(-1), format, stochastic, key)


def encode(flat: Tensor, format: str, stochastic: bool, key: int) -> tuple[Tensor, Tensor]:
    """`compress` of values (n,), with the random numbers of a key in [0, 2^31)."""
    run = _compress if OPERATOR.uses_kernel(flat) else _reference
    return run(flat.contiguous(), format == "fp8", stochastic, key)


def decompress(codes: Tensor, scale: Tensor, format: str = "int8", *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values (n,) that `compress` has put into codes.

    Raises:
        ValueError: there is no such format, or `codes` and `scale` do not fit each other.
    """
    if format not in FORMATS:
        raise ValueError(f"bigkernels.ops.compress.decompress: format is {format!r}; accepted are {', '.join(FORMATS)}")
    if codes.dtype != torch.uint8 or codes.dim() != 1 or scale.shape != (-(-codes.shape[0] // BLOCK),):
        raise ValueError(
            f"bigkernels.ops.compress.decompress: codes {tuple(codes.shape)} of {codes.dtype} and scale "
            f"{tuple(scale.shape)} are not what compress makes"
        )
    probe = scale.new_empty(0, dtype=dtype)
    try:
        run = _decompress if OPERATOR.uses_kernel(probe, codes, scale) else _decode
        return run(codes, scale, format == "fp8", dtype)
    except REFUSED:
        return _decode(codes, scale, format == "fp8", dtype)


def _random(key: int, n: int, device: torch.device) -> Tensor:
    """(n,) words of 32 bits, as int64."""
    low = 0xFFFFFFFF
    x = (torch.arange(n, device=device, dtype=torch.int64) & low) ^ key
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & low
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & low
    return x ^ (x >> 15)


def _reference(x: Tensor, fp8: bool, stochastic: bool, key: int) -> tuple[Tensor, Tensor]:
    top = FORMATS["fp8" if fp8 else "int8"]
    values = x.float()
    numbers = torch.where(x.isfinite(), values, 0.0)
    blocks = F.pad(numbers, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1) if x.numel() else blocks.new_empty(0)
    largest = largest.clamp_min(top * LEAST_SCALE)
    scale = torch.where(largest.isfinite(), (largest / top).clamp_max(LARGEST_SCALE[top]), torch.inf)
    # A number over a tensor would be a product with the rounded reciprocal.
    inverse = torch.full_like(largest, top) / largest
    y = (blocks * inverse[:, None]).view(-1)[: x.numel()].nan_to_num(0.0).clamp(-top, top)
    random = _random(key, x.numel(), x.device) if stochastic else None
    codes = (_fp8_codes if fp8 else _int8_codes)(y, x, random)
    return codes.view(torch.uint8), scale


def _int8_codes(y: Tensor, x: Tensor, random: Tensor | None) -> Tensor:
    # 16 random bits are what a sum of up to 256 holds. All products here are exact, fused with sums or not.
    codes = y.round() if random is None else (y + 128.0 + (random >> 16).float() * 2.0**-16).int() - 128
    sign = torch.where(x.signbit(), -1, 1)
    codes = torch.where((codes == 0) & (x != 0), INT8_TINY * sign, codes.int())
    codes = torch.where(x.isinf(), INT8_INFINITE * sign, codes)
    return torch.where(x.isnan(), INT8_NAN, codes).to(torch.int8)


def _fp8_codes(y: Tensor, x: Tensor, random: Tensor | None) -> Tensor:
    magnitude = y.abs()
    if random is None:
        codes = magnitude.to(torch.float8_e4m3fn).view(torch.uint8).int()
    else:
        normal = ((magnitude.view(torch.int32).long() + (random & 0xFFFFF)) >> 20) - (120 << 3)
        subnormal = (magnitude * 512.0 + (random >> 9).float() * 2.0**-23).long()
        codes = torch.where(magnitude < 2.0**-6, subnormal, normal).int()
    codes = torch.where((codes == 0) & (x != 0), 1, codes)
    codes = torch.where(x.isinf(), FP8_INFINITE, codes)
    codes = torch.where(x.isnan(), FP8_NAN, codes)
    return (codes | torch.where(x.signbit(), 0x80, 0)).to(torch.uint8)


def _decode(codes: Tensor, scale: Tensor, fp8: bool, dtype: torch.dtype) -> Tensor:
    scale = scale.repeat_interleave(BLOCK)[: codes.shape[0]]
    if fp8:
        values = codes.view(torch.float8_e4m3fn).float()
        values = torch.where(codes & 0x7F == FP8_INFINITE, values * torch.inf, values)
        return (values * scale).to(dtype)
    code = codes.view(torch.int8).float()
    size = code.abs()
    # The smallest number of float16 that is not zero is larger than what a step there may be cut into.
    tiny = (scale * TINY).clamp_min(2.0**-24 if dtype == torch.float16 else 0.0)
    values = torch.where(size == INT8_TINY, tiny.copysign(code), code * scale)
    values = torch.where(size == INT8_INFINITE, code * torch.inf, values)
    return torch.where(size > INT8_INFINITE, torch.nan, values).to(dtype)


def _fake(x, fp8, stochastic, key):
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(-(-x.shape[0] // BLOCK), dtype=torch.float32)


OPERATOR = Operator("compress", in_graphs=True, listed=False)
_compress = define("compress(Tensor x, bool fp8, bool stochastic, int key) -> (Tensor, Tensor)", _fake, _reference)
_decompress = define(
    "decompress(Tensor codes, Tensor scale, bool fp8, ScalarType dtype) -> Tensor",
    lambda codes, scale, fp8, dtype: codes.new_empty(codes.shape, dtype=dtype),
    _decode,
)
