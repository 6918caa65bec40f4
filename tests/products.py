"""The criterion for matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from bigkernels._compare import compare


def check_product(ours: Tensor, plain: Tensor, exact: Tensor, terms: Tensor) -> None:
    """As near to `exact` as PyTorch's, or as a few roundings of the sum of the terms' magnitudes: where a product has
    few elements, PyTorch may be exact by luck.
    """
    assert ours.dtype == plain.dtype
    comparison = compare(ours, plain, exact, roundings=2.0, scale="row")
    small = (ours.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * terms + rounding(ours, exact)
    assert comparison.ok or small.all(), str(comparison)


def rounding(ours: Tensor, exact: Tensor) -> Tensor:
    return torch.finfo(ours.dtype).eps * exact.abs() if ours.dtype != torch.float32 else torch.zeros_like(exact)
