"""How optimizer states are stored, in plain PyTorch: what the kernels' formats (csrc/cpu/kernels/optimizer_formats.h)
are compared with, and what runs where there is no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # elements that share a scale in 8 bits
LEAST_8BIT = 4096  # smaller tensors keep float32 states: nothing to save, and norms and biases are sensitive

STATE_DTYPES = (torch.float32, torch.bfloat16, "int8")


def blocks(n: int) -> int:
    return -(-n // BLOCK)


# For codes beside a sign and without one: the largest, whose bits as a float, less a constant, are a quarter of those
# of 1.
_TOP = {True: 0x42FF0000, False: 0x437F8000}  # 127.5 and 255.5 as floats
_ONE = 0x3F800000


def _value(magnitude: Tensor, sign: bool) -> Tensor:
    bits = (magnitude.float() + 0.5).view(torch.int32) - (_TOP[sign] - (_ONE >> 2))
    return (bits << 2).view(torch.float32)


def flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory, as a view."""
    return x.as_strided((x.numel(),), (1,))


def encode8(x: Tensor, sign: bool) -> tuple[Tensor, Tensor]:
    """Codes, (n,) int8 or without a sign uint8, and scales, (blocks,) float32, of a flat tensor.

    A dynamic code like that of 8-bit optimizers (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861): where the
    leading one of a code's magnitude is tells the order of magnitude, here four octaves, and the bits below it share
    that out. A magnitude u stands for u + 1/2, whose bits as a float are a quarter of those of the value it stands for,
    as a part of the block's largest, which is exact. Beside a sign 0 stands for zero; without one nothing does.
    """
    padded = torch.nn.functional.pad(x.float(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = padded.abs().amax(1)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    y = padded * inverse[:, None]
    bits = (y.abs() if sign else y.clamp(min=0)).view(torch.int32)
    u = ((bits >> 2) + (_TOP[sign] - (_ONE >> 2))).view(torch.float32).nan_to_num(0.0).to(torch.int32)
    codes = torch.where(y.signbit(), -u, u).to(torch.int8) if sign else u.to(torch.uint8)
    return codes.view(-1)[: x.numel()], scale


def decode8(codes: Tensor, scale: Tensor) -> Tensor:
    """(n,) float32."""
    if codes.dtype == torch.int8:
        value = _value(codes.int().abs(), True) - _value(torch.zeros_like(codes), True)
        value = torch.where(codes < 0, -value, value)
    else:
        value = _value(codes, False)
    return value * scale.repeat_interleave(BLOCK)[: codes.numel()]


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 as a bfloat16 and the 16-bit remainder: bits = (parameter << 16) + remainder, exactly.

    The parameter is rounded half up in magnitude, not to even, so that the remainder fits. NaN keeps no remainder.
    """
    nan = master.isnan()
    bits = master.view(torch.int32)
    bits = torch.where(nan, (bits | 0x400000) & ~0xFFFF, bits)
    high = (bits.to(torch.int64) + 0x8000) >> 16
    rest = bits.to(torch.int64) - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), rest.to(torch.int16)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that `split` took apart."""
    bits = (param.view(torch.int16).to(torch.int64) << 16) + remainder.to(torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def _mix(x: Tensor) -> Tensor:
    """update.h's `mix` of 32-bit words, held in int64."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
        x = x ^ (x >> shift)
        # In two halves: the product of two 32-bit words does not fit a signed 64-bit one.
        low, high = x & 0xFFFF, x >> 16
        x = (low * factor + ((high * factor) << 16)) & 0xFFFFFFFF
    return x ^ (x >> 15)


def key(seed: int, step: int) -> int:
    """The key of a step's random words, as update.h's `scalars_of` makes it."""

    def mix(x: int) -> int:
        return int(_mix(torch.tensor(x & 0xFFFFFFFF, dtype=torch.int64, device="cpu")))

    return mix(seed ^ mix((seed >> 32) ^ mix(step))) ^ mix(step >> 32)


def random_16(seed: int, step: int, n: int, device: torch.device) -> Tensor:
    """(n,) int64 in [0, 2^16): what stochastic rounding adds to element i. Elements i and i + 16 share a word."""
    element = torch.arange(n, dtype=torch.int64, device=device)
    position = (element // 32) * 32 + element % 16
    words = _mix((position & 0xFFFFFFFF) ^ key(seed, step) ^ _mix(position >> 32))
    return torch.where((element // 16) % 2 == 0, words & 0xFFFF, words >> 16)


def stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Flat float32 `x` rounded up with the probability that it lies above the lower neighbour; inf and NaN stay."""
    if dtype == torch.bfloat16:
        bits = (x.view(torch.int32).to(torch.int64) + random) >> 16
        rounded = bits.to(torch.int16).view(torch.bfloat16)
    else:
        bits = (x.view(torch.int32).to(torch.int64) + (random & 0x1FFF)) & ~0x1FFF
        normal = bits.to(torch.int32).view(torch.float32)
        fraction = ((random << 7) | 0x3F800000).to(torch.int32).view(torch.float32) - 1.0
        subnormal = ((x.abs() * 2.0**24 + fraction).floor() * 2.0**-24).copysign(x)
        rounded = torch.where(x.abs() < 2.0**-14, subnormal, normal).to(torch.float16)
    return torch.where(x.isfinite(), rounded, x.to(dtype))
