"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._deprecated import renamed_members
from ..ops.rms_norm import rms_norm


@renamed_members("bigkernels.nn.RMSNorm", size="hidden_size")
class RMSNorm(nn.Module):
    """Root mean square normalisation of the last dimension; see `bigkernels.functional.rms_norm`.

    Args:
        hidden_size: D, the size of the last dimension.
        eps: added to the mean square.
        offset: added to the weight; with 1.0 the weight starts at zero, as in Gemma.
        elementwise_affine: whether there is a weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        offset: float = 0.0,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.offset = hidden_size, eps, offset
        weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if elementwise_affine else None
        self.weight: nn.Parameter | None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, self.eps, offset=self.offset, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, offset={self.offset}"
