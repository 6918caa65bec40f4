"""LayerNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.layer_norm import layer_norm


class LayerNorm(nn.Module):
    """Normalisation of the last dimension to mean 0 and variance 1; see `bigkernels.functional.layer_norm`.

    Args:
        size: D, the size of the last dimension.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and, with `bias`, a bias.
    """

    def __init__(self, size: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True, *,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        self.size, self.eps = size, eps
        for name, present in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if present else None
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
        return f"{self.size}, eps={self.eps}"
