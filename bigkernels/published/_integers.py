"""Integers with scales and zero points, as a format that stands for the same values; or the values, if none does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..quantization import Int4, Int8, Int8Dynamic
from ..quantization.format import pack4
from ..quantization.q8_0 import BLOCK, Q8_0
from ._packed import Packed


def unpack(words: Tensor, bits: int) -> Tensor:
    """(W, n) int32 as (W * 32 / bits, n) values: a stream of bits down each column, the lowest first."""
    count = words.shape[0] * 32 // bits
    start = torch.arange(count, dtype=torch.int64, device=words.device) * bits
    wide = words.long() & 0xFFFFFFFF
    low, high = wide[start // 32], wide[((start + bits - 1) // 32)]
    shift = (start % 32)[:, None]
    return ((low | high << 32) >> shift & (1 << bits) - 1).to(torch.int16)


def integers(codes: Tensor, zero: Tensor | None, scale: Tensor, *, dynamic: bool = False) -> Packed | Tensor:
    """``(codes - zero) * scale``, bit for bit, each group of a row with a zero point and a scale.

    Args:
        codes: (N, K) integers, signed or not, of 8 bits at most.
        zero: (N, G), integers or numbers; None for 0.
        scale: (N, G); its dtype is that in which the values are rounded once.
        dynamic: whether tokens are rounded to 8 bits too.

    Returns:
        Codes in a format of this package; where none stands for these, the values in the dtype of the scales.
    """
    (n, k), groups = codes.shape, scale.shape[1]
    size = -(-k // groups)
    if zero is None:
        zero = torch.zeros_like(scale, dtype=torch.float32)
    zero = zero.float()
    whole = bool((zero == zero.round()).all())
    if groups == 1 and whole:
        shifted = codes.float() - zero
        if (shifted.abs() <= 128).all() and (shifted < 128).all():
            if not _fits4(codes, zero):
                tensors = {"codes": shifted.to(torch.int8), "scale": scale[:, 0].float()}
                return Packed((Int8Dynamic if dynamic else Int8)(), (n, k), tensors)
    step = next((s for s in (128, 64, 32) if size % s == 0), 128 if groups == 1 else 0)
    if step and _fits4(codes, zero):
        numbers = _half_and_row(scale)
        shift = codes.amin().clamp(max=0).float()
        points = (zero - shift).half()
        if numbers is not None and torch.equal(points.float(), zero - shift):
            half, row = numbers
            tensors = {
                "codes": pack4((codes.float() - shift).to(torch.uint8), k),
                "scale": _spread(half, size, step, k),
                "zero": _spread(points, size, step, k),
                "row_scale": row,
            }
            return Packed(Int4(step, "rtn"), (n, k), tensors)
    if size % BLOCK == 0 and whole:
        shifted = codes.float() - _spread(zero, size, 1, k)
        half = scale.half()
        if (shifted.abs() <= 128).all() and (shifted < 128).all() and torch.equal(half.to(scale.dtype), scale):
            tensors = {"codes": shifted.to(torch.int8), "scale": _spread(half, size, BLOCK, k)}
            return Packed(Q8_0(), (n, k), tensors)
    values = (codes.float() - _spread(zero, size, 1, k)) * _spread(scale.float(), size, 1, k)
    return values.to(scale.dtype)


def in_order(codes: Tensor, zero: Tensor, scale: Tensor, group: Tensor, size: int) -> Packed | Tensor:
    """The same for elements of which each says its group (act-order): `group` (K,).

    Returns:
        As `integers`; codes in groups as they lie, with the order of the elements, where all but the last are of
        `size`.
    """
    counts = torch.bincount(group, minlength=scale.shape[1])
    if bool((counts[:-1] == size).all()):
        order = group.argsort(stable=True)
        found = integers(codes[:, order], zero, scale)
        if isinstance(found, Packed) and isinstance(found.format, Int4):
            ordered = replace(found.format, act_order=True)
            return Packed(ordered, found.shape, found.tensors | {"order": order.to(torch.int32)})
    return ((codes.float() - zero.float()[:, group]) * scale.float()[:, group]).to(scale.dtype)


def _fits4(codes: Tensor, zero: Tensor) -> bool:
    return not codes.numel() or int(codes.amax()) - min(int(codes.amin()), 0) < 16


def _spread(numbers: Tensor, size: int, step: int, k: int) -> Tensor:
    """Numbers (N, G) of groups of `size` elements, for each `step` of the K elements of a row."""
    each = numbers.repeat_interleave(max(1, -(-size // step)), 1)
    return each[:, : -(-k // step)].contiguous()


def _half_and_row(scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """Scales (N, G) as float16 numbers times one a row, exactly; None where there are no such."""
    wide = scale.float()
    if scale.dtype == torch.float16:
        return scale, torch.ones(len(scale), dtype=torch.float32, device=scale.device)
    if scale.shape[1] == 1:
        return torch.ones_like(wide, dtype=torch.float16), wide[:, 0].contiguous()
    most = wide.abs().amax(1)
    row = torch.where(most > 0, torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent), 1.0)
    half = (wide / row[:, None]).half()
    return (half, row) if torch.equal(half.float() * row[:, None], wide) else None
