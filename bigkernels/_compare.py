"""The error criterion of the package, for outputs and gradients alike.

``max|ours - exact| <= 2 * max|plain - exact| + eps``, where `exact` is the reference computed in float64, `plain` is
PyTorch in the dtype of the result, and eps is one rounding of that dtype at the scale of the exact values. A kernel
may round differently from PyTorch, but must not be less accurate. The form is that of the QuACK tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_PART = 2**22


@dataclass(frozen=True)
class Comparison:
    """How far a result is from the exact values, and how far it may be.

    Attributes:
        error: the largest absolute difference; inf where a value is wrongly not finite or the shapes differ.
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


def max_error(value: Tensor, exact: Tensor) -> float:
    """The largest ``|value - exact|``. Infinities and NaNs equal themselves and are infinitely far from the rest."""
    largest = 0.0
    # In parts, so that the float64 copies stay small beside the tensors themselves.
    for v, e in zip(value.detach().flatten().split(_PART), exact.detach().flatten().split(_PART), strict=True):
        if v.numel() == 0:
            continue
        v, e = v.double(), e.double()
        same = (v == e) | (v.isnan() & e.isnan())
        error = torch.where(same, 0.0, (v - e).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
        largest = max(largest, error.max().item())
    return largest


def rounding(dtype: torch.dtype, exact: Tensor) -> float:
    """One rounding of `dtype` at the largest finite magnitude of `exact`."""
    parts = (part.abs() for part in exact.detach().flatten().split(_PART) if part.numel())
    scale = max((part.nan_to_num(0.0, 0.0, 0.0).max().item() for part in parts), default=0.0)
    info = torch.finfo(dtype)
    return info.eps * max(scale, info.smallest_normal)


def compare(ours: Tensor, plain: Tensor, exact: Tensor, *, roundings: float = 1.0) -> Comparison:
    """Apply the criterion to one result.

    Args:
        ours: the result to judge.
        plain: the same result by PyTorch in the same dtype.
        exact: the same result in float64.
        roundings: how many roundings eps stands for.
    """
    if ours.shape != exact.shape:
        return Comparison(float("inf"), 0.0, f"has shape {tuple(ours.shape)}, expected {tuple(exact.shape)}")
    bound = 2 * max_error(plain, exact) + roundings * rounding(ours.dtype, exact)
    return Comparison(max_error(ours, exact), bound)


def compare_all(
    ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, roundings: float = 1.0
) -> dict[str, Comparison]:
    """Apply the criterion to named results; a name that `ours` lacks is a failure."""
    lacking = Comparison(float("inf"), 0.0, "is missing")
    return {
        name: compare(ours[name], plain[name], exact[name], roundings=roundings) if name in ours else lacking
        for name in exact
    }


def worst(comparisons: Mapping[str, Comparison]) -> tuple[str, Comparison]:
    """The (name, comparison) nearest to failing, or failing most."""
    return max(comparisons.items(), key=lambda item: (item[1].problem is not None, item[1].ratio))
