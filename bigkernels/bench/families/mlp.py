"""MLPs without a gate: linear, activation, linear."""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ... import functional
from ..._samples import Draw
from ..case import Case, Settings
from ..operators import operator_case

_ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


def case(
    settings: Settings,
    tokens: int,
    size: int,
    inner: int,
    dtype: torch.dtype,
    *,
    backward: bool,
    activation: str = "gelu",
) -> Case:
    def inputs(draw: Draw):
        return {
            "x": draw.normal(tokens, size),
            "weight1": draw.normal(inner, size, scale=size**-0.5),
            "bias1": draw.normal(inner, scale=0.1),
            "weight2": draw.normal(size, inner, scale=inner**-0.5),
            "bias2": draw.normal(size, scale=0.1),
        }

    def eager(x, weight1, bias1, weight2, bias2):
        return F.linear(_ACTIVATIONS[activation](F.linear(x, weight1, bias1)), weight2, bias2)

    def ours(x, weight1, bias1, weight2, bias2):
        return functional.mlp(x, weight1, bias1, weight2, bias2, activation=activation)

    names = ("x", "weight1", "bias1", "weight2", "bias2")
    return operator_case(
        "mlp",
        f"{tokens} x {size} to {inner} {activation}",
        settings=settings,
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        eager=eager,
        differentiable=names if backward else (),
        ours_compiled=backward,
        bytes=(3 if backward else 1) * dtype.itemsize * (2 * tokens * size + 2 * size * inner),
        flops=(12 if backward else 4) * tokens * size * inner,
        metric="TFLOP/s",
    )


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [case(settings, 40, 64, 96, torch.bfloat16, backward=backward) for backward in (False, True)]
    bf16, wide, half = torch.bfloat16, torch.float32, torch.float16
    sizes = ((512, 384, 1536), (2048, 768, 3072))
    cases = [
        case(settings, *size, dtype, backward=backward)
        for size in sizes
        for dtype in (bf16, wide)
        for backward in (False, True)
    ]
    cases += [case(settings, 2048, 768, 3072, bf16, backward=True, activation=name) for name in ("gelu_tanh", "relu")]
    return [*cases, case(settings, 512, 384, 1536, half, backward=True)]
