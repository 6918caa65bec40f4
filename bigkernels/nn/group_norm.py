"""GroupNorm as a module."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.group_norm import group_norm


class GroupNorm(nn.Module):
    """Normalisation of groups of channels, and an activation; see `bigkernels.functional.group_norm`.

    Args:
        groups: how many groups.
        channels: C, divisible by `groups`.
        eps: added to the variance.
        affine: whether there are a weight and a bias.
        activation: "silu", "gelu", "gelu_tanh", "relu" or None.
    """

    def __init__(
        self,
        groups: int,
        channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"bigkernels.nn.GroupNorm: {channels} channels do not make {groups} groups of one size")
        self.groups, self.channels, self.eps, self.activation = groups, channels, eps, activation
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.groups, self.weight, self.bias, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.channels}, eps={self.eps}, activation={self.activation!r}"
