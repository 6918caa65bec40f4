"""Orthogonalisation by Newton-Schulz iterations, of many matrices of one shape at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._load import cpu_library
from ..ops import linear
from ..ops._registry import compute_dtype

_STRIP = 256  # rows of a symmetric product that are made at once
_LEAST = 256  # rows from which on half a product costs less than a whole one in a batch


def compute_in(device: torch.device) -> torch.dtype:
    """The dtype of the products: bfloat16 where there is hardware for it, as in torch.optim.Muon; float32 elsewhere."""
    return torch.bfloat16 if device.type != "cpu" or _tiles() else torch.float32


def _tiles() -> bool:
    return cpu_library().reason is None and torch.ops.bigkernels.cpu_isa() == "amx"


def orthogonalize_(
    x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, factor: float = 1.0
) -> Tensor:
    """Bring the singular values of each matrix near 1 and multiply with `factor`, in place.

    Each step is ``X <- a X + (b A + c A^2) X`` with ``A = X X^T`` (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/), of the matrix divided by its Frobenius norm, or by `eps` where that is
    larger. `a` goes to the diagonal of the polynomial, so that a step is three products; of the two symmetric ones half
    is computed where the tile unit can be used.

    Args:
        x: (B, M, N) in the dtype to compute in.
    """
    tall = x.shape[1] > x.shape[2]
    work = x.transpose(1, 2) if tall else x
    norm = work.to(compute_dtype(work.dtype)).flatten(1).norm(dim=1).clamp(min=eps)
    work = work / norm.to(work.dtype)[:, None, None]
    if steps == 0:
        work = work * factor
    elif x.is_cpu and work.shape[1] >= _LEAST:
        for matrix in work:
            matrix.copy_(_by_halves(matrix.contiguous(), coefficients, steps, factor))
    else:
        work = _batched(work, coefficients, steps, factor)
    return x.copy_(work.transpose(1, 2) if tall else work)


def _polynomial(hessian: Tensor, square: Tensor, coefficients: tuple[float, float, float], factor: float) -> Tensor:
    """factor (a I + b A + c A^2), over `square`."""
    a, b, c = (factor * value for value in coefficients)
    square.mul_(c).add_(hessian, alpha=b)
    square.diagonal(dim1=-2, dim2=-1).add_(a)
    return square


def _batched(x: Tensor, coefficients: tuple[float, float, float], steps: int, factor: float) -> Tensor:
    for step in range(steps):
        hessian = x @ x.mT
        x = _polynomial(hessian, hessian @ hessian, coefficients, factor if step == steps - 1 else 1.0) @ x
    return x


def _by_halves(x: Tensor, coefficients: tuple[float, float, float], steps: int, factor: float) -> Tensor:
    for step in range(steps):
        hessian = _symmetric(x)
        polynomial = _polynomial(hessian, _symmetric(hessian), coefficients, factor if step == steps - 1 else 1.0)
        x = linear._bwd(polynomial, None, x, True)[0] if _on_tiles(x) else polynomial @ x
    return x


def _on_tiles(x: Tensor) -> bool:
    """PyTorch's own products of float32 are faster than ours without tiles."""
    return x.dtype == torch.bfloat16 and _tiles() and linear.OPERATOR.uses_kernel(x)


def _symmetric(x: Tensor) -> Tensor:
    """x x^T: strips of rows up to the diagonal, and their mirror image."""
    rows, tiles = x.shape[0], _on_tiles(x)
    out = x.new_empty(rows, rows)
    for begin in range(0, rows, _STRIP):
        end = min(begin + _STRIP, rows)
        strip = linear._fwd(x[begin:end], x[:end], None, None) if tiles else x[begin:end] @ x[:end].T
        out[begin:end, :end] = strip
        out[:begin, begin:end] = strip[:, :begin].T
    return out
