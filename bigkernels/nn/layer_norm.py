"""LayerNorm as a module."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._deprecated import renamed_members
from ..ops.layer_norm import layer_norm


@renamed_members("bigkernels.nn.LayerNorm", size="hidden_size")
class LayerNorm(nn.Module):
    """Normalisation of the last dimension to mean 0 and variance 1; see `bigkernels.functional.layer_norm`.

    Args:
        hidden_size: D, the size of the last dimension.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and, with `bias`, a bias.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        for name, present in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if present else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"
