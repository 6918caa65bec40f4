"""The MLP without a gate, of encoders and of GPT-2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.activations import ACTIVATIONS
from ..ops.mlp import mlp


class MLP(nn.Module):
    """``fc2(activation(fc1(x)))``, the activation fused with the products; see `bigkernels.functional.mlp`.

    Layers that were replaced (by quantized ones, by adapters) or have hooks are called as they are.

    Args:
        hidden_size: D, of the input and the output.
        intermediate_size: N, between them.
        activation: a name that `bigkernels.functional.mlp` takes.
        bias: whether the layers have biases.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "gelu",
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"bigkernels.nn.MLP: activation is {activation!r}; accepted are {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.fc1 = nn.Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1, self.fc2
        if _is_plain(first) and _is_plain(second):
            return mlp(x, first.weight, first.bias, second.weight, second.bias, activation=self.activation)
        return second(ACTIVATIONS[self.activation](first(x)))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer does no more than its product."""
    own = layer.__dict__.get("forward")
    ours = layer.__dict__.get("_bigkernels_patch", {}).get("forward", (None,))[0]  # what `patch` put there
    if type(layer) is not nn.Linear or own is not ours or layer._compiled_call_impl:
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
