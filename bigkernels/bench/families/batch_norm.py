"""BatchNorm and ReLU in training, with and without the residual between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import functional
from ..._samples import Draw
from ..case import Case, Settings
from ..operators import Call, operator_case


def eager(x, weight, bias, residual=None):
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    return F.relu(y if residual is None else y + residual)


def ours(x, weight, bias, residual=None):
    return functional.batch_norm(x, weight=weight, bias=bias, training=True, activation="relu", residual=residual)


def case(
    settings: Settings,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    backward: bool,
    rows: bool = False,
    residual: bool = False,
) -> Case:
    def inputs(draw: Draw):
        def image():
            t = draw.normal(*shape, mean=0.5)
            return t.contiguous(memory_format=torch.channels_last) if rows else t

        inputs = {
            "x": image(),
            "weight": draw.normal(shape[1], mean=1.0, scale=0.1),
            "bias": draw.normal(shape[1], scale=0.1),
        }
        return inputs | {"residual": image()} if residual else inputs

    size = torch.Size(shape).numel() * dtype.itemsize
    # Forward x, a residual and y; backward x and two gradients, with a residual y and a third one.
    tensors = (3 if residual else 2) + (backward and (5 if residual else 3))
    names = ("x", "weight", "bias", "residual") if residual else ("x", "weight", "bias")
    return operator_case(
        "batch_norm",
        f"{'x'.join(map(str, shape))}{' channels-last' if rows else ''}{' + residual' if residual else ''} + relu",
        settings=settings,
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        eager=eager,
        differentiable=names if backward else (),
        plain=lambda tensors: Call(eager, tensors, names if backward else ()).results(),  # it rounds before ReLU
        bytes=tensors * size,
    )


def cases(settings: Settings) -> list[Case]:
    shapes = ((4, 64, 8, 8),) if settings.quick else ((8, 64, 56, 56), (8, 256, 28, 28))
    return [
        case(settings, shape, dtype, backward=backward, rows=rows, residual=residual)
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
        for rows, residual in ((False, False), (True, False), (False, True))
        for backward in (False, True)
    ]
