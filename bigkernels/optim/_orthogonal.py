"""Orthogonalisation by Newton-Schulz iterations, of many matrices of one shape at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._load import cpu_library
from ..ops import linear
from ..ops.registry import compute_dtype

_STRIP = 128  # rows of a symmetric product that are made at once
_MULTIPLY_BF16 = ("avx512", "amx")  # ISA levels
_LEAST = 256  # rows from which on half a product costs less than a whole one in a batch


def compute_in(device: torch.device) -> torch.dtype:
    """The dtype of the products: bfloat16 where there is hardware for it, as in torch.optim.Muon; float32 elsewhere.

    Processors that only convert between the two (AVX2, AVX-512 without BF16) multiply float32 faster.
    """
    return torch.bfloat16 if device.type != "cpu" or _isa() in _MULTIPLY_BF16 else torch.float32


def _isa() -> str | None:
    return torch.ops.bigkernels.cpu_isa() if cpu_library().reason is None else None


def _tiles() -> bool:
    return _isa() == "amx"


def orthogonalize_(
    x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, factor: float = 1.0
) -> Tensor:
    """Bring the singular values of each matrix near 1 and multiply with `factor`, in place.

    Each step is ``X <- a X + (b A + c A^2) X`` with ``A = X X^T`` (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/), of the matrix divided by its Frobenius norm, or by `eps` where that is
    larger. A step is three products; of the two symmetric ones half is computed where matrices are large.

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


def _of_step(coefficients: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    a, b, c = (factor * value for value in coefficients)
    return a, b, c


# a X, b A and c A^2 meet before anything is rounded to 16 bits, as in torch.optim.Muon: rounded one by one, or as a
# polynomial with `a` on its diagonal, updates are two to five times as far from those of float32.


def _batched(x: Tensor, coefficients: tuple[float, float, float], steps: int, factor: float) -> Tensor:
    for step in range(steps):
        a, b, c = _of_step(coefficients, factor if step == steps - 1 else 1.0)
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_halves(x: Tensor, coefficients: tuple[float, float, float], steps: int, factor: float) -> Tensor:
    for step in range(steps):
        a, b, c = _of_step(coefficients, factor if step == steps - 1 else 1.0)
        gram = _symmetric(x)
        polynomial = _symmetric(gram, b, c)
        if _on_tiles(x):
            x = linear._bwd(polynomial, None, x, True)[0].add_(x, alpha=a)
        else:
            x = torch.addmm(x, polynomial, x, beta=a)
    return x


def _on_tiles(x: Tensor) -> bool:
    """PyTorch's own products are as fast as ours without tiles."""
    return x.dtype == torch.bfloat16 and _tiles() and linear.OPERATOR.uses_kernel(x)


def _symmetric(x: Tensor, b: float = 0.0, c: float = 1.0) -> Tensor:
    """c x x^T, and b x beside it where b is not 0: strips of rows up to the diagonal, and their mirror image."""
    rows, tiles = x.shape[0], _on_tiles(x)
    out = x.new_empty(rows, rows)
    for begin in range(0, rows, _STRIP):
        end = min(begin + _STRIP, rows)
        some, others = x[begin:end], x[:end]
        if tiles and not b:
            strip = linear._fwd(some, others, None, None)
        elif tiles:
            strip = linear._fwd(some, others, None, None, True).mul_(c).add_(some[:, :end], alpha=b)
        else:
            strip = torch.addmm(some[:, :end] if b else out[begin:end, :end], some, others.T, beta=b, alpha=c)
        out[begin:end, :end] = strip
        out[:begin, begin:end] = out[begin:end, :begin].T
    return out
