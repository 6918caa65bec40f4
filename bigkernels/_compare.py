"""The error criterion of the package, for outputs and gradients alike.

An element may be off by ``2 * P + roundings * eps * size``, with eps one rounding of the result's dtype. Its `size` is
its own magnitude in `exact`, the reference computed in float64, so that small values have to be right too; but at least
float32's rounding of the largest value of its row, as sums are made in float32. P is the largest error that `plain`,
PyTorch in the dtype of the result, makes among the elements of up to four times that size. A kernel may round
differently from PyTorch, but must not be less accurate. The form is that of the QuACK tests, which know one size: the
largest of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# What an element's rounding is measured by: the element itself; the largest of its row, where a kernel rounds to the
# dtype what it adds up; the largest of the tensor, where such sums cancel in whole rows.
Scale = Literal["element", "row", "tensor"]

_PART = 2**22
_LEAST_ROW = 32  # elements: trailing dimensions are taken together until they have so many
_LOWEST, _OCTAVES = -1080, 2120  # exponents of float64
_OCTAVES_ABOVE = 2  # of larger elements whose errors count for PyTorch's: a few elements may be exact by luck


@dataclass(frozen=True)
class Comparison:
    """How far a result is from the exact values, and how far it may be, at the element that is nearest to its bound.

    Attributes:
        error: the absolute difference; inf where a value is wrongly not finite or the shapes differ.
        bound: the largest difference allowed.
        problem: what makes the result unusable whatever its values, or None.
    """

    error: float
    bound: float
    problem: str | None = None

    @property
    def ratio(self) -> float:
        """error / bound; at most 1 passes. An exact result has ratio 0 even where the bound is 0."""
        if self.error == 0:
            return 0.0
        return self.error / self.bound if self.bound else float("inf")

    @property
    def ok(self) -> bool:
        return self.problem is None and self.error <= self.bound

    def __str__(self) -> str:
        return self.problem or f"error {self.error:.3g}, allowed {self.bound:.3g}"


def compare(
    ours: Tensor, plain: Tensor, exact: Tensor, *, roundings: float = 1.0, scale: Scale = "element"
) -> Comparison:
    """Apply the criterion to one result.

    Args:
        ours: the result to judge.
        plain: the same result by PyTorch in the same dtype.
        exact: the same result in float64.
        roundings: how many roundings of the dtype are allowed beyond PyTorch's error.
        scale: what they are measured by.
    """
    if ours.shape != exact.shape:
        return Comparison(float("inf"), 0.0, f"has shape {tuple(ours.shape)}, expected {tuple(exact.shape)}")
    sizes = _Sizes(ours.dtype, exact, scale)
    allowed = torch.zeros(_OCTAVES, dtype=torch.float64, device=exact.device)
    for p, e in _parts(sizes.row, plain, exact):
        allowed.scatter_reduce_(0, _octaves(sizes(e)).flatten(), _errors(p, e).flatten(), "amax")
    allowed = 2 * allowed.cummax(0).values
    nearest = Comparison(0.0, 0.0)
    for o, e in _parts(sizes.row, ours, exact):
        size, error = sizes(e), _errors(o, e)
        above = (_octaves(size) + _OCTAVES_ABOVE).clamp_(max=_OCTAVES - 1)
        bound = allowed[above] + roundings * sizes.eps * size
        # Where the bound is infinite, PyTorch overflows; whatever is 0 or more than its bound shows in the division.
        ratio = (error / bound).nan_to_num_(nan=0.0, posinf=float("inf"))
        at = ratio.argmax()
        comparison = Comparison(error.flatten()[at].item(), bound.flatten()[at].item())
        if comparison.ratio >= nearest.ratio:
            nearest = comparison
    return nearest


def compare_all(
    ours: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    *,
    roundings: float = 1.0,
    scale: Scale = "element",
) -> dict[str, Comparison]:
    """Apply the criterion to named results; a name that `ours` lacks is a failure."""
    lacking = Comparison(float("inf"), 0.0, "is missing")
    return {
        name: compare(ours[name], plain[name], exact[name], roundings=roundings, scale=scale)
        if name in ours
        else lacking
        for name in exact
    }


def worst(comparisons: Mapping[str, Comparison]) -> tuple[str, Comparison]:
    """The (name, comparison) nearest to failing, or failing most."""
    return max(comparisons.items(), key=lambda item: (item[1].problem is not None, item[1].ratio))


class _Sizes:
    """Called with some rows of `exact`: the size of each element."""

    def __init__(self, dtype: torch.dtype, exact: Tensor, scale: Scale):
        info = torch.finfo(dtype)
        self.eps, self.smallest = info.eps, info.smallest_normal
        # Two roundings of what sums are made in, at the scale of their row.
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        self.least = max(2 * torch.finfo(sums).eps / self.eps, 0.0 if scale == "element" else 1.0)
        self.row, self.largest = 1, None
        if scale == "tensor":
            self.largest = max((_magnitudes(part).max().item() for (part,) in _parts(1, exact)), default=0.0)
            return
        for length in reversed(exact.shape):
            if self.row < _LEAST_ROW:
                self.row *= max(length, 1)

    def __call__(self, exact: Tensor) -> Tensor:
        if self.largest is not None:
            return torch.full_like(exact, max(self.largest, self.smallest))
        sizes = _magnitudes(exact)
        return torch.maximum(sizes, self.least * sizes.amax(1, keepdim=True)).clamp_(min=self.smallest)


def _parts(row: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each tensor after the other, in float64: in parts, so that the copies stay small beside them."""
    rows = max(_PART // row, 1)
    for parts in zip(*(t.detach().reshape(-1, row).split(rows) for t in tensors), strict=True):
        if parts[0].numel():
            yield tuple(part.double() for part in parts)


def _magnitudes(values: Tensor) -> Tensor:
    return values.abs().nan_to_num_(0.0, 0.0, 0.0)


def _octaves(sizes: Tensor) -> Tensor:
    return sizes.frexp().exponent.long() - _LOWEST


def _errors(values: Tensor, exact: Tensor) -> Tensor:
    """``|value - exact|``. Infinities and NaNs equal themselves and are infinitely far from the rest."""
    same = (values == exact) | (values.isnan() & exact.isnan())
    return torch.where(same, 0.0, (values - exact).abs()).nan_to_num_(nan=float("inf"), posinf=float("inf"))
