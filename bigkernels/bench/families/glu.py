"""Gated linear units."""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ... import functional
from ..._samples import Draw
from ..case import Case, Settings
from ..operators import operator_case
from ..peers import liger

_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
_LIGER = {"silu": "liger_swiglu", "gelu_tanh": "liger_geglu"}


def case(
    settings: Settings,
    rows: int,
    size: int,
    dtype: torch.dtype,
    *,
    backward: bool,
    activation: str = "silu",
    family: str = "glu",
    name: str = "",
    **options,
) -> Case:
    def inputs(draw: Draw):
        return {"gate": draw.normal(rows, size), "up": draw.normal(rows, size)}

    def eager(gate, up):
        return _ACTIVATIONS[activation](gate) * up

    def ours(gate, up):
        return functional.glu(gate, up, activation=activation)

    def _liger(peer):
        function = getattr(peer, _LIGER[activation])
        return lambda gate, up: function(gate, up)

    return operator_case(
        family,
        name or f"{rows}x{size} {activation}",
        settings=settings,
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        eager=eager,
        peers=liger(_liger),
        differentiable=("gate", "up") if backward else (),
        ours_compiled=backward,
        bytes=(8 if backward else 3) * rows * size * dtype.itemsize,  # backward: the gradient, both inputs, two outputs
        **options,
    )


def cases(settings: Settings) -> list[Case]:
    rows, size = (64, 512) if settings.quick else (2048, 8192)
    return [
        case(settings, rows, size, torch.bfloat16, backward=backward, activation=activation)
        for activation in _ACTIVATIONS
        for backward in (False, True)
    ]
