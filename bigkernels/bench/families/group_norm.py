"""GroupNorm and SiLU, as in diffusion models' U-Nets and decoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import functional
from ..._samples import Draw
from ..case import Case, Settings
from ..operators import operator_case

GROUPS = 32


def case(settings: Settings, shape: tuple[int, ...], dtype: torch.dtype, *, backward: bool, rows: bool = False) -> Case:
    def inputs(draw: Draw):
        x, channels = draw.normal(*shape, mean=0.5), shape[1]
        return {
            "x": x.contiguous(memory_format=torch.channels_last) if rows else x,
            "weight": draw.normal(channels, mean=1.0, scale=0.1),
            "bias": draw.normal(channels, scale=0.1),
        }

    size = torch.Size(shape).numel() * dtype.itemsize
    return operator_case(
        "group_norm",
        f"{'x'.join(map(str, shape))}{' channels-last' if rows else ''} + silu",
        settings=settings,
        dtype=dtype,
        inputs=inputs,
        ours=lambda x, weight, bias: functional.group_norm(x, GROUPS, weight, bias, activation="silu"),
        eager=lambda x, weight, bias: F.silu(F.group_norm(x, GROUPS, weight, bias)),
        differentiable=("x", "weight", "bias") if backward else (),
        bytes=(5 if backward else 2) * size,  # backward: x and the gradient, and the gradient of x
    )


def cases(settings: Settings) -> list[Case]:
    shapes = ((2, 64, 8, 8),) if settings.quick else ((2, 320, 64, 64), (8, 256, 32, 32))
    return [
        case(settings, shape, dtype, backward=backward, rows=rows)
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
        for rows in (False, True)
        for backward in (False, True)
    ]
