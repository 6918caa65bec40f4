"""Values for the tests of 8-bit codes on other devices than the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from bigkernels.ops.compress import BLOCK

SIZES = (1, 7, 127, 128, 129, 2047, 2048, 2049, 20 * BLOCK + 5)


def hard_values(n: int, dtype: torch.dtype) -> Tensor:
    """Of many magnitudes, and blocks that are zero, tiny, subnormal, equal, as large as can be, and not finite."""
    x = torch.randn(n) * 10.0 ** torch.randint(-4, 4, (n,))
    info = torch.finfo(dtype)
    blocks = [
        torch.zeros(BLOCK),
        -torch.zeros(BLOCK),
        torch.full((BLOCK,), 1e-40),
        torch.linspace(-1.2, 1.2, BLOCK) * 2.0**-120,
        torch.full((BLOCK,), -(2.0**-119)),
        torch.randn(BLOCK) * 2.0**-118,  # values below 2^-126 beside some that have codes
        torch.full((BLOCK,), -3.0),
        torch.full((BLOCK,), info.max),
        torch.randn(BLOCK).clamp(-1, 1) * info.max,
        torch.arange(BLOCK) / 2.0 + 0.25 - 31.75,  # quotients that are halves
        torch.cat((torch.randn(BLOCK - 1), torch.tensor([float("inf")]))),
        torch.cat((-torch.rand(BLOCK - 1), torch.tensor([-float("inf")]))),
        torch.cat((torch.randn(BLOCK - 1), torch.tensor([float("nan")]))),
    ]
    for i, block in enumerate(blocks, 1):
        part = x[i * BLOCK : (i + 1) * BLOCK]
        part.copy_(block[: part.numel()])
    return x.to(dtype)
