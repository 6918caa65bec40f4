"""4-bit integers in groups along a row, each with a scale and a zero point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._format import Format, Operands, in_groups, pack4, ratio

_ALGORITHMS = ("rtn", "hqq")
_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Int4(Format):
    """``(code - zero) * scale * row_scale``, codes 0 to 15.

    A group's range includes zero, which keeps zero points inside of 0 to 15. Scales and zero points are float16;
    row_scale is a power of two that keeps the scales of a row inside of float16's range, whatever the weight's.

    Args:
        group_size: 32, 64 or 128 elements; the last group of a row may be shorter.
        algorithm: "rtn" rounds to nearest, with whole zero points. "hqq" then moves the zero points for a smaller
            error: half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/), which needs
            no data. No group's squared error gets larger.

    Raises:
        ValueError: another size or algorithm.
    """

    name: ClassVar[str] = "int4"
    group_size: int = 128
    algorithm: str = "hqq"

    def __post_init__(self) -> None:
        if self.group_size not in _SIZES:
            raise ValueError(
                f"bigkernels.quantization.Int4: group_size is {self.group_size!r}; accepted are 32, 64, 128"
            )
        if self.algorithm not in _ALGORITHMS:
            raise ValueError(f"bigkernels.quantization.Int4: algorithm is {self.algorithm!r}; accepted are rtn, hqq")

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        k = rows.shape[1]
        groups = in_groups(rows, self.group_size)
        if not groups.shape[1]:
            empty = rows.new_zeros(rows.shape[0], 0)
            return {"codes": empty.to(torch.uint8), "scale": empty.half(), "zero": empty.half(),
                    "row_scale": torch.ones(rows.shape[0], device=rows.device)}  # fmt: skip
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        wanted = high / 15 - low / 15  # divided first: the difference may be infinite
        row_scale = _power_above(wanted.amax(1))
        scale = _half_not_below(wanted / row_scale[:, None])
        step = (scale.float() * row_scale[:, None]).unsqueeze(-1)
        zero = ratio(-low, step[..., 0]).round().clamp(0, 15)
        if self.algorithm == "hqq":
            # The copies that fill up the last group have no weight of their own.
            counted = in_groups(torch.ones(1, k, device=rows.device), self.group_size)
            counted[0, -1, self.group_size - -k % self.group_size :] = 0
            zero = _half_quadratic(groups, step, zero, counted)
        codes = _codes(groups, step, zero)
        return {"codes": pack4(codes.flatten(1), k), "scale": scale, "zero": zero.half(), "row_scale": row_scale}

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        groups = (n, -(-k // self.group_size))
        return {"codes": ((n, (k + 1) // 2), torch.uint8), "scale": (groups, torch.float16),
                "zero": (groups, torch.float16), "row_scale": ((n,), torch.float32)}  # fmt: skip

    def operands(self, tensors: dict[str, Tensor]) -> Operands:
        return tensors["codes"], tensors["scale"], tensors["zero"], tensors["row_scale"], None, self.group_size


def _power_above(x: Tensor) -> Tensor:
    """The power of two above each value; 1 for zero."""
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent), 1.0)


def _half_not_below(x: Tensor) -> Tensor:
    """float16 values at or above x in [0, 1]: a group's ends then stay within half a step of their codes."""
    half = x.half()
    return torch.where(half.float() < x, (half.view(torch.int16) + 1).view(torch.float16), half)


def _codes(groups: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    return (ratio(groups, step) + zero.unsqueeze(-1)).round().clamp(0, 15)


def _half_quadratic(groups: Tensor, step: Tensor, zero: Tensor, counted: Tensor) -> Tensor:
    """Zero points (rounded to float16) that lower the squared error of a group, or the given ones.

    Codes and zero points are found in turn, each as the other asks for: with the mean of what codes and weights ask for
    the errors of a group add up to nothing. The paper's sparse part of the error is zero for weights below 1 at its
    constants, and made the perplexity of a model worse where it was scaled to count.
    """

    def error(zero: Tensor) -> tuple[Tensor, Tensor]:
        codes = _codes(groups, step, zero)
        missed = groups - (codes - zero.unsqueeze(-1)) * step
        relative = ratio(missed, step)  # in steps: the square of a small weight would vanish
        return codes, (relative.square() * counted).sum(-1)

    total = counted.sum(-1)
    wanted = ratio(groups, step)
    best, (codes, least) = zero, error(zero)
    better = torch.ones_like(best, dtype=torch.bool)
    for _ in range(20):
        zero = (((codes - wanted) * counted).sum(-1) / total).half().float()
        codes, now = error(zero)
        better = better & (now < least)  # a group is done where it gets no better, whatever the others do
        if not better.any():
            break
        best, least = torch.where(better, zero, best), torch.where(better, now, least)
    return best
