"""The activations that kernels know, in the order of their numbers (csrc/include/bigkernels/activations.h)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "quick_gelu": lambda x, alpha=1.702: x * torch.sigmoid(alpha * x),
}
NAMES = tuple(ACTIVATIONS)
NUMBERS = {name: number for number, name in enumerate(NAMES)}
