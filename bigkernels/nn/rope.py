"""Rotary position embedding as a module that holds the frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from .._deprecated import renamed_members
from ..ops.rope import rope
from ._constants import KeepsConstants


@renamed_members("bigkernels.nn.RotaryEmbedding", size="rotary_dim")
class RotaryEmbedding(KeepsConstants):
    """Rotates queries and keys by their positions; see `bigkernels.functional.rope`.

    Args:
        rotary_dim: R, the number of elements of a head that are rotated; even.
        theta: the base of the frequencies.
        interleaved: pair neighbours and not halves.
    """

    inverse_frequencies: Tensor

    def __init__(
        self,
        rotary_dim: int,
        theta: float = 10_000.0,
        *,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if rotary_dim % 2:
            raise ValueError(f"bigkernels.nn.RotaryEmbedding: rotary_dim is {rotary_dim}, expected an even number")
        self.rotary_dim, self.theta, self.interleaved = rotary_dim, theta, interleaved
        exponents = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
        self.register_buffer("inverse_frequencies", theta**-exponents, persistent=False)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, S, R) in float32 of integer positions (B, S) or (S,)."""
        if positions.dim() == 1:
            positions = positions.unsqueeze(0)
        half = positions.unsqueeze(-1).float() * self.inverse_frequencies.float()
        full = half.repeat_interleave(2, -1) if self.interleaved else torch.cat((half, half), -1)
        return full.cos(), full.sin()

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q (B, Hq, S, D), k (B, Hk, S, D); `positions` (B, S) or (S,) defaults to 0, 1, ..., S - 1."""
        if positions is None:
            positions = torch.arange(q.shape[2], dtype=torch.int64, device=q.device)
        return rope(q, k, *self.angles(positions), interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, theta={self.theta}, interleaved={self.interleaved}"
