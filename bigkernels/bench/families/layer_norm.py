"""LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import functional
from ..._samples import Draw
from ..case import Case, Settings
from ..operators import operator_case
from ..peers import liger

EPS = 1e-5


def eager(x, weight, bias, residual=None):
    """As the models do it that write it out (Cohere's is one): float32 inside. The others call the built-in."""
    total = x if residual is None else x + residual
    wide = total.float()
    centred = wide - wide.mean(-1, keepdim=True)
    wide = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)
    y = (wide * weight.float() + bias.float()).to(x.dtype)
    return y if residual is None else (y, total)


def builtin(x, weight, bias, residual=None):
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, bias, EPS)
    return y if residual is None else (y, total)


def ours(x, weight, bias, residual=None):
    return functional.layer_norm(x, weight, bias, EPS, residual=residual)


def _liger(peer):
    def call(x, weight, bias, residual=None):
        total = x if residual is None else x + residual
        y = peer.liger_layer_norm(total, weight, bias, EPS)
        return y if residual is None else (y, total)

    return call


def case(
    settings: Settings,
    rows: int,
    size: int,
    dtype: torch.dtype,
    *,
    backward: bool,
    residual: bool = False,
    family: str = "layer_norm",
    name: str = "",
    **options,
) -> Case:
    def inputs(draw: Draw):
        inputs = {
            "x": draw.normal(rows, size, mean=0.5),
            "weight": draw.normal(size, mean=1.0, scale=0.1),
            "bias": draw.normal(size, scale=0.1),
        }
        return inputs | {"residual": draw.normal(rows, size)} if residual else inputs

    tensors = (4 if residual else 2) + (backward and (4 if residual else 3))  # as for rms_norm
    parameters = ("x", "weight", "bias")
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
        differentiable=((*parameters, "residual") if residual else parameters) if backward else (),
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
