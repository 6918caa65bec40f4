"""AWQ: elements that meet large inputs are scaled up before they are rounded, and the inputs down.

Lin et al. 2023, https://arxiv.org/abs/2306.00978. The scales are powers of two, so that dividing inputs rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 20  # exponents tried
_DAMP = 0.01  # of the mean second moment, added to all
_AT_ONCE = 2**22


class Channels(NamedTuple):
    """By what the elements of rows are multiplied, by what inputs are, and the second moments of the latter: (K,)."""

    up: Tensor
    down: Tensor
    importance: Tensor


def channel_scales(w: Tensor, hessian: Tensor, rounded: Callable[[Tensor, Tensor], Tensor]) -> Channels:
    """The scales, powers of the inputs' sizes, whose rounded weight changes the outputs least.

    Args:
        w: (N, K).
        hessian: (K, K), second moments of inputs.
        rounded: float32 rows and the second moments of their inputs to the values that they are stored as.
    """
    ones = torch.ones(w.shape[1], dtype=torch.float32, device=w.device)
    if not w.numel():
        return Channels(ones, ones, ones)
    hessian = hessian.float()
    mean = hessian.diagonal().mean()
    # Inputs that were always zero may not always be.
    hessian = hessian + _DAMP * torch.where(mean > 0, mean, 1.0) * torch.eye(
        len(ones), dtype=torch.float32, device=w.device
    )
    moments = hessian.diagonal()
    size = (moments / moments.mean()).sqrt()
    at_once = max(1, _AT_ONCE // len(ones))
    best, least = Channels(ones, ones, moments), math.inf
    for i in range(_STEPS):
        up = torch.exp2((size.log2() * i / _STEPS).round())
        channels = Channels(up, 1 / up, moments / up.square())
        error = sum(_output_error(rows.float(), channels, hessian, rounded) for rows in w.split(at_once))
        if least is None or error < least:
            best, least = channels, error
    return best


def _output_error(rows: Tensor, channels: Channels, hessian: Tensor, rounded) -> float:
    missed = rows - rounded(rows * channels.up, channels.importance) * channels.down
    return ((missed @ hessian) * missed).sum().item()
