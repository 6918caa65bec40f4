"""Rotary position embedding."""

from __future__ import annotations

import torch

from ... import functional
from ..._samples import Draw
from ..case import Case, Settings
from ..operators import operator_case
from ..peers import liger


def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def eager(q, k, cos, sin):
    """As Llama's attention does it, in the dtype of the queries."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def case(
    settings: Settings,
    q_heads: int,
    k_heads: int,
    length: int,
    size: int,
    dtype: torch.dtype,
    *,
    backward: bool,
    family: str = "rope",
    name: str = "",
    **options,
) -> Case:
    def inputs(draw: Draw):
        # (B, S, H, D) in memory, as the projections leave them.
        q, k = (draw.normal(1, length, heads, size).transpose(1, 2) for heads in (q_heads, k_heads))
        cos, sin = draw.angles(1, length, size)
        return {"q": q, "k": k, "cos": cos, "sin": sin}

    elements = 2 * (q_heads + k_heads) * length * size + 2 * length * size
    return operator_case(
        family,
        name or f"S {length}, heads {q_heads}/{k_heads}, D {size}",
        settings=settings,
        dtype=dtype,
        inputs=inputs,
        ours=functional.rope,
        eager=eager,
        peers=liger(lambda peer: lambda q, k, cos, sin: peer.liger_rope(q, k, cos, sin)),
        differentiable=("q", "k") if backward else (),
        ours_compiled=backward,
        bytes=elements * (2 if backward else 1) * dtype.itemsize,
        **options,
    )


def cases(settings: Settings) -> list[Case]:
    length = 64 if settings.quick else 2048
    return [
        case(settings, *heads, length, size, torch.bfloat16, backward=backward)
        for heads, size in (((32, 8), 128), ((9, 3), 64))
        for backward in (False, True)
    ]
