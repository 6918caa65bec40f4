"""The gated MLP of current transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._deprecated import renamed_arguments
from ..ops.activations import ACTIVATIONS
from ..ops.glu import glu


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``, the activation and the product fused.

    Args:
        hidden_size: D, of the input and the output.
        intermediate_size: N, between them.
        activation: a name that `bigkernels.functional.glu` takes.
        bias: whether the three projections have biases.
    """

    @renamed_arguments("bigkernels.nn.GatedMLP", size="hidden_size")
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"bigkernels.nn.GatedMLP: activation is {activation!r}; accepted are {', '.join(ACTIVATIONS)}"
            )
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), activation=self.activation))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
