"""RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import functional
from ..._samples import Draw
from ..case import Case, Settings
from ..operators import operator_case
from ..peers import liger

EPS = 1e-6


def eager(x, weight, residual=None):
    """As Llama's module does it: float32 inside, rounded before the weight."""
    total = x if residual is None else x + residual
    wide = total.float()
    y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return y if residual is None else (y, total)


def builtin(x, weight, residual=None):
    total = x if residual is None else x + residual
    y = F.rms_norm(total, weight.shape, weight, EPS)
    return y if residual is None else (y, total)


def ours(x, weight, residual=None):
    return functional.rms_norm(x, weight, EPS, residual=residual)


def _liger(peer):
    def call(x, weight, residual=None):
        if residual is None:
            return peer.liger_rms_norm(x, weight, EPS, in_place=False)
        return peer.liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)

    return call


def case(
    settings: Settings,
    rows: int,
    size: int,
    dtype: torch.dtype,
    *,
    backward: bool,
    residual: bool = False,
    family: str = "rms_norm",
    name: str = "",
    **options,
) -> Case:
    def inputs(draw: Draw):
        inputs = {"x": draw.normal(rows, size), "weight": draw.normal(size, mean=1.0, scale=0.1)}
        return inputs | {"residual": draw.normal(rows, size)} if residual else inputs

    # Each way reads its inputs and writes its outputs once; backward reads the saved rows and the upstream gradients.
    tensors = (4 if residual else 2) + (backward and (4 if residual else 3))
    return operator_case(
        family,
        name or f"{rows}x{size}{' + residual' if residual else ''}",
        settings=settings,
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        eager=eager,
        builtin=builtin,
        peers=liger(_liger),
        differentiable=(("x", "weight", "residual") if residual else ("x", "weight")) if backward else (),
        ours_compiled=backward and not residual,
        bytes=tensors * rows * size * dtype.itemsize,
        **options,
    )


def cases(settings: Settings) -> list[Case]:
    rows, sizes = (64, (512,)) if settings.quick else (4096, (2048, 4096))
    return [
        case(settings, rows, size, dtype, backward=backward, residual=residual)
        for size in sizes
        for dtype in (torch.bfloat16, torch.float32)
        for residual in (False, True)
        for backward in (False, True)
    ]
