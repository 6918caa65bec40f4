"""4-bit codes into a codebook of 16 values, in blocks along a row that are scaled by their largest magnitude.

NF4 and double quantization: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. The codebooks are those of
bitsandbytes, and so are codes and scales where a row is a whole number of blocks.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.codes import BOOK4, Operands
from ..ops.registry import is_capturing, is_watched
from .format import Format, in_groups, pack4, ratio

_SIZES = (32, 64, 128)
_SCALES_A_BLOCK = 256
# The quantiles of a normal distribution, Appendix E of the paper.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent and one of the mantissa, as bitsandbytes orders them, over 12.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _dynamic_codebook() -> tuple[float, ...]:
    """The signed 8-bit codebook of Dettmers et al. 2022 (https://arxiv.org/abs/2110.02861): seven decades, each one
    with twice the values of the one below it.
    """
    values = [0.0, 1.0]
    for i in range(7):
        # bitsandbytes computes in float32, on the CPU.
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        decade = 10.0 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)
        values += [sign * v for v in decade.tolist() for sign in (1, -1)]
    return tuple(sorted(values))


DYNAMIC_CODEBOOK = _dynamic_codebook()


@dataclass(frozen=True)
class NF4(Format):
    """``codebook[code] * scale``: 16 values that weights of a normal distribution use equally often.

    Args:
        block_size: 32, 64 or 128 elements; the last block of a row may be shorter.
        double_quant: store the scales in 8 bits: ``offset + dynamic[code] * scale_scale``, one of these a 256 scales.

    Raises:
        ValueError: another size.
    """

    name: ClassVar[str] = "nf4"
    values: ClassVar[tuple[float, ...]] = _NF4
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.block_size not in _SIZES:
            raise ValueError(
                f"bigkernels.quantization.{type(self).__name__}: block_size is {self.block_size!r}; "
                "accepted are 32, 64, 128"
            )

    def encode(self, rows: Tensor, data: None = None) -> dict[str, Tensor]:
        blocks = in_groups(rows, self.block_size)
        scale = blocks.abs().amax(-1)
        codes = _nearest(ratio(blocks, scale.unsqueeze(-1)), self.values)
        return {"codes": pack4(codes.flatten(1), rows.shape[1]), "scale": scale}

    def finish(self, tensors: dict[str, Tensor], data: None = None) -> dict[str, Tensor]:
        if not self.double_quant:
            return tensors
        scale = tensors.pop("scale")
        flat = scale.flatten()
        # In float64, so that the order of the additions does not show.
        offset = flat.double().mean().float().view(1) if flat.numel() else flat.new_zeros(1)
        short = -flat.numel() % _SCALES_A_BLOCK
        parts = torch.cat((flat - offset, flat.new_zeros(short))).view(-1, _SCALES_A_BLOCK)
        scale_scale = parts.abs().amax(1) if parts.numel() else flat.new_zeros(0)
        codes = _nearest(ratio(parts, scale_scale[:, None]), DYNAMIC_CODEBOOK)
        codes = codes.flatten()[: flat.numel()].view(scale.shape).to(torch.uint8)
        return tensors | {"scale_codes": codes, "scale_scale": scale_scale, "scale_offset": offset}

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        blocks = (n, -(-k // self.block_size))
        codes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": ((n, (k + 1) // 2), torch.uint8)}
        if not self.double_quant:
            return codes | {"scale": (blocks, torch.float32)}
        outer = -(-blocks[0] * blocks[1] // _SCALES_A_BLOCK)
        return codes | {
            "scale_codes": (blocks, torch.uint8),
            "scale_scale": ((outer,), torch.float32),
            "scale_offset": ((1,), torch.float32),
        }

    @property
    def derived(self) -> tuple[str, ...]:
        return ("scale_codes", "scale_scale", "scale_offset") if self.double_quant else ()

    def operands(self, tensors: dict[str, Tensor]) -> Operands:
        codes = tensors["codes"]
        book = beside(codes, self.values)
        scale = tensors.get("scale")
        if scale is None:
            inner = tensors["scale_codes"]
            values = beside(codes, DYNAMIC_CODEBOOK)[inner.flatten().long()]
            outer = tensors["scale_scale"].repeat_interleave(_SCALES_A_BLOCK)[: inner.numel()]
            scale = (values * outer + tensors["scale_offset"]).view(inner.shape)
        return Operands.of(BOOK4, codes, scale, book=book, group=self.block_size)


@dataclass(frozen=True)
class FP4(NF4):
    """``codebook[code] * scale``: floats of 4 bits (e2m1). The options are those of `NF4`."""

    name: ClassVar[str] = "fp4"
    values: ClassVar[tuple[float, ...]] = tuple(v / 12 for v in _FP4) + tuple(-v / 12 for v in _FP4)


def beside(t: Tensor, values: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A table on the device of a tensor, and as fake as that."""
    mode = getattr(t, "fake_mode", None)
    if mode is not None or is_watched() or torch.compiler.is_compiling():
        with nullcontext() if mode is None else mode:
            return torch.tensor(values, dtype=dtype, device=t.device)
    # What is made while a CUDA graph is captured has its values when the graph is replayed, and for it alone.
    return (_made if is_capturing(t) else _kept)(values, dtype, t.device)


@torch.inference_mode(False)
def _made(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    table = torch.empty(len(values), dtype=dtype, device=device)
    for place, value in zip(table.unbind(), values, strict=True):
        place.fill_(value)  # a copy from the host would wait for the device, and no graph takes it
    return table


_kept = functools.cache(_made)


@functools.cache
def _order(values: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Between which limits which code's value is the nearest; of two as near, the lower value."""
    codes = sorted({v: i for i, v in reversed(list(enumerate(values)))}.values(), key=values.__getitem__)
    ordered = torch.tensor([values[i] for i in codes], dtype=torch.float32, device="cpu")
    return tuple(((ordered[:-1] + ordered[1:]) / 2).tolist()), tuple(codes)


def _nearest(x: Tensor, values: tuple[float, ...]) -> Tensor:
    """The code of the value nearest to each element; of two as near, the lower value."""
    limits, codes = _order(values)
    return beside(x, codes, torch.int64)[torch.bucketize(x, beside(x, limits))]
