"""GPTQ: rounding that moves the error of each element to those that are still to be rounded.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. Elements come in the order of the size of their inputs, the
largest first; their groups stay those of neighbours, with scales that are found before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .format import ratio

_DAMP = 0.01  # of the mean second moment, added to all
_BLOCK = 128  # elements between two updates of the rest


class Order(NamedTuple):
    """What all rows share.

    Attributes:
        order: (K,) the elements in the order in which they are rounded.
        factor: (K, K) upper Cholesky factor of the inverse of the inputs' second moments, in that order.
        importance: (K,) the inputs' second moments, relative to their mean.
    """

    order: Tensor
    factor: Tensor
    importance: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> Order:
        hessian = hessian.double()
        moments = hessian.diagonal().clone()
        mean = moments.mean() if moments.numel() else moments.new_ones(())
        mean = torch.where(mean > 0, mean, 1.0)
        order = moments.argsort(descending=True, stable=True)
        ordered = hessian[order][:, order]
        ordered.diagonal().add_(_DAMP * mean)  # also keeps inputs that are always zero from dividing by it
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
        factor = torch.linalg.cholesky(inverse, upper=True)
        return cls(order, factor.float(), (moments / mean + _DAMP).float())


def codes(rows: Tensor, step: Tensor, zero: Tensor, size: int, data: Order, least: int = 0, most: int = 15) -> Tensor:
    """Codes (n, K), `least` to `most`, of rows whose groups of `size` have the given steps and zero points (n, G)."""
    order, factor, _ = data
    left = rows[:, order]
    steps, zeros = (t[:, order // size] for t in (step, zero))
    rounded = torch.empty_like(left)
    for begin in range(0, left.shape[1], _BLOCK):
        end = min(begin + _BLOCK, left.shape[1])
        block, errors = left[:, begin:end], torch.empty_like(left[:, begin:end])
        for i in range(end - begin):
            at, w = begin + i, block[:, i]
            s, z = steps[:, at], zeros[:, at]
            code = (ratio(w, s) + z).round().clamp(least, most)
            error = (w - (code - z) * s) / factor[at, at]
            block[:, i + 1 :] -= error[:, None] * factor[at, at + 1 : end]
            rounded[:, at], errors[:, i] = code, error
        left[:, end:] -= errors @ factor[begin:end, end:]
    return torch.empty_like(rounded).index_copy_(1, order, rounded)
