"""4-bit integers in groups along a row, each with a scale and a zero point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..ops.codes import AFFINE4, Operands
from . import awq, gptq
from .format import Format, in_groups, pack4, ratio

_ALGORITHMS = ("rtn", "hqq", "gptq", "awq")
_SIZES = (32, 64, 128)
_PARTS = tuple(1 - i / 20 for i in range(1, 9))  # of a group's range that clipping tries


@dataclass(frozen=True)
class Int4(Format):
    """``(code - zero) * scale * row_scale``, codes 0 to 15.

    A group's range includes zero, which keeps zero points inside of 0 to 15. Scales and zero points are float16;
    row_scale is a power of two that keeps the scales of a row inside of float16's range, whatever the weight's.

    Args:
        group_size: 32, 64 or 128 elements; the last group of a row may be shorter.
        algorithm: "rtn" rounds to nearest, with whole zero points. "hqq" then moves the zero points for a smaller
            error: half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/), which needs
            no data. No group's squared error gets larger. The other two are calibrated: they lower the error of the
            layer's outputs on inputs like those given. "gptq" rounds element after element and moves the error of each
            to those that follow (Frantar et al. 2022, https://arxiv.org/abs/2210.17323). "awq" scales the elements that
            meet large inputs up (Lin et al. 2023, https://arxiv.org/abs/2306.00978), by powers of two, which are stored
            and divide the inputs, and then moves zero points as "hqq" does.
        act_order: whether groups are of elements from anywhere in a row, as GPTQ makes them with ``desc_act``: codes
            stand group after group, and `order` says which input each of them meets. Such weights are read from folders
            and not made.

    Raises:
        ValueError: another size or algorithm.
    """

    name: ClassVar[str] = "int4"
    group_size: int = 128
    algorithm: str = "hqq"
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.group_size not in _SIZES:
            raise ValueError(
                f"bigkernels.quantization.Int4: group_size is {self.group_size!r}; accepted are 32, 64, 128"
            )
        if self.algorithm not in _ALGORITHMS:
            raise ValueError(
                f"bigkernels.quantization.Int4: algorithm is {self.algorithm!r}; accepted are {', '.join(_ALGORITHMS)}"
            )
        if self.act_order and self.algorithm == "awq":
            raise ValueError("bigkernels.quantization.Int4: act_order does not go with algorithm 'awq'")

    @property
    def calibrated(self) -> bool:
        return self.algorithm in ("gptq", "awq")

    def blind(self) -> Int4:
        return Int4(self.group_size) if self.calibrated or self.act_order else self

    def prepare(self, weight: Tensor, hessian: Tensor) -> Any:
        if self.algorithm == "gptq":
            return gptq.Order.of(hessian)
        return awq.channel_scales(weight, hessian, lambda rows, importance: self._rounded(rows, importance))

    def _rounded(self, rows: Tensor, importance: Tensor) -> Tensor:
        """The values of rows to the nearest, with the ranges that fit inputs of the given second moments."""
        fitted = fit(in_groups(rows, self.group_size), self._weights(rows, importance), clip=True)
        groups = in_groups(rows, self.group_size)
        values = (_codes(groups, fitted.step, fitted.zero) - fitted.zero.unsqueeze(-1)) * fitted.step
        return values.flatten(1)[:, : rows.shape[1]]

    def _weights(self, rows: Tensor, importance: Tensor | None = None) -> Tensor:
        """(1, G, size): how much the error of each element counts; the copies that fill up a group count nothing."""
        k = rows.shape[1]
        each = torch.ones(k, dtype=torch.float32, device=rows.device) if importance is None else importance.float()
        return torch.nn.functional.pad(each, (0, -k % self.group_size)).view(1, -1, self.group_size)

    def encode(self, rows: Tensor, data: Any = None) -> dict[str, Tensor]:
        if self.act_order:
            raise ValueError("bigkernels: Int4(act_order=True) is read from published folders and not made of weights")
        k = rows.shape[1]
        if self.algorithm == "awq":
            rows = rows * data.up
        groups = in_groups(rows, self.group_size)
        if not groups.shape[1]:
            empty = rows.new_zeros(rows.shape[0], 0)
            return {
                "codes": empty.to(torch.uint8),
                "scale": empty.half(),
                "zero": empty.half(),
                "row_scale": torch.ones(rows.shape[0], dtype=torch.float32, device=rows.device),
            }
        weights = self._weights(rows, data.importance if self.calibrated else None)
        fitted = fit(groups, weights, clip=self.calibrated)
        zero = fitted.zero
        if self.algorithm in ("hqq", "awq"):
            zero = _half_quadratic(groups, fitted.step, zero, weights)
        if self.algorithm == "gptq":
            codes = gptq.codes(rows, fitted.step[..., 0], zero, self.group_size, data)
        else:
            codes = _codes(groups, fitted.step, zero).flatten(1)
        return {"codes": pack4(codes, k), "scale": fitted.scale, "zero": zero.half(), "row_scale": fitted.row_scale}

    def finish(self, tensors: dict[str, Tensor], data: Any = None) -> dict[str, Tensor]:
        return tensors | {"channel": data.down} if self.algorithm == "awq" else tensors

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        groups = (n, -(-k // self.group_size))
        stored = {
            "codes": ((n, (k + 1) // 2), torch.uint8),
            "scale": (groups, torch.float16),
            "zero": (groups, torch.float16),
            "row_scale": ((n,), torch.float32),
        }
        if self.algorithm == "awq":
            stored |= {"channel": ((k,), torch.float32)}
        return stored | {"order": ((k,), torch.int32)} if self.act_order else stored

    def operands(self, tensors: dict[str, Tensor]) -> Operands:
        return Operands.of(
            AFFINE4,
            tensors["codes"],
            tensors["scale"],
            zero=tensors["zero"],
            row_scale=tensors["row_scale"],
            group=self.group_size,
        )


class Fit(NamedTuple):
    """The scales and whole zero points of groups: scale (n, G) in float16, row_scale (n,), and their product `step`
    (n, G, 1).
    """

    scale: Tensor
    row_scale: Tensor
    step: Tensor
    zero: Tensor


def fit(groups: Tensor, weights: Tensor, *, clip: bool) -> Fit:
    """Scales that cover the range of each group; with `clip`, the fraction of it whose weighted error is the least."""
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    wanted = high / 15 - low / 15  # divided first: the difference may be infinite
    row_scale = _power_above(wanted.amax(1))

    def at(part: float) -> tuple[Fit, Tensor]:
        scale = _half_not_below(wanted * part / row_scale[:, None])
        step = (scale.float() * row_scale[:, None]).unsqueeze(-1)
        zero = ratio(-low * part, step[..., 0]).round().clamp(0, 15)
        return Fit(scale, row_scale, step, zero), _error(groups, step, zero, weights)[1] * step[..., 0].square()

    best, least = at(1.0)
    for part in _PARTS if clip else ():
        other, error = at(part)
        better = error < least
        best = Fit(
            torch.where(better, other.scale, best.scale),
            row_scale,
            torch.where(better.unsqueeze(-1), other.step, best.step),
            torch.where(better, other.zero, best.zero),
        )
        least = torch.where(better, error, least)
    return best


def _error(groups: Tensor, step: Tensor, zero: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and the weighted squared error of each group in steps: the square of a small weight would vanish."""
    codes = _codes(groups, step, zero)
    return codes, (ratio(groups - (codes - zero.unsqueeze(-1)) * step, step).square() * weights).sum(-1)


def _power_above(x: Tensor) -> Tensor:
    """The power of two above each value; 1 for zero."""
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent), 1.0)


def _half_not_below(x: Tensor) -> Tensor:
    """float16 values at or above x in [0, 1]: a group's ends then stay within half a step of their codes."""
    half = x.half()
    return torch.where(half.float() < x, (half.view(torch.int16) + 1).view(torch.float16), half)


def _codes(groups: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    return (ratio(groups, step) + zero.unsqueeze(-1)).round().clamp(0, 15)


def _half_quadratic(groups: Tensor, step: Tensor, zero: Tensor, weights: Tensor) -> Tensor:
    """Zero points (rounded to float16) that lower the squared error of a group, or the given ones.

    Codes and zero points are found in turn, each as the other asks for: with the mean of what codes and weights ask for
    the errors of a group add up to nothing. The paper's sparse part of the error is zero for weights below 1 at its
    constants, and made the perplexity of a model worse where it was scaled to count.
    """

    total = weights.sum(-1)
    wanted = ratio(groups, step)
    best, (codes, least) = zero, _error(groups, step, zero, weights)
    better = torch.ones_like(best, dtype=torch.bool)
    for _ in range(20):
        zero = ratio(((codes - wanted) * weights).sum(-1), total).half().float()
        codes, now = _error(groups, step, zero, weights)
        better = better & (now < least)  # a group is done where it gets no better, whatever the others do
        if not better.any():
            break
        best, least = torch.where(better, zero, best), torch.where(better, now, least)
    return best
