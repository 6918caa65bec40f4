"""Samples of the norms of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ops.images import NUMBERS
from ._sample import Draw, Sample, strided


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _inputs(names: str, shape: tuple[int, ...], arrange=lambda t: t, mean: float = 0.5, *, running: bool = False):
    def make(draw: Draw) -> dict[str, Tensor]:
        inputs = {}
        for name in names.split():
            image = name in ("x", "residual")
            t = draw.normal(
                *(shape if image else shape[1:2]),
                mean={"x": mean, "weight": 1.0}.get(name, 0.0),
                scale=1.0 if image else 0.3,
            )
            inputs[name] = arrange(t) if image else t
        if running:
            inputs["running_mean"] = draw.normal(shape[1], mean=0.5, scale=0.2)
            inputs["running_var"] = draw.positive(shape[1])
        return inputs

    return make


def _group(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    activation: str | None = None,
    *,
    names: str = "x weight bias",
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
    **more: Any,
) -> Sample:
    make = _inputs(names, shape, arrange, **more)
    # What is added up in float32 is as large as the group's terms.
    return Sample(
        "group_norm",
        name,
        make,
        {"groups": groups, "activation": activation},
        tuple(names.split()),
        gradient_scale="row",
    )


GROUP_NORM = [
    _group("plain", (2, 12, 5, 7), 3),
    *(_group(name, (2, 8, 9, 4), 4, name) for name in NUMBERS if name),
    _group("channels-last", (2, 12, 5, 7), 3, "silu", arrange=_channels_last),
    _group("channels-last, odd", (3, 37, 3, 3), 37, arrange=_channels_last),
    _group("many pixels", (1, 4, 70, 81), 2, "silu"),
    _group("many pixels, channels-last", (1, 20, 41, 33), 2, "silu", arrange=_channels_last),
    _group("one group", (3, 10, 6), 1),
    _group("a group a channel", (2, 6, 33), 6),
    _group("no pixels' dimension", (5, 24), 4),
    _group("no weight", (2, 8, 5, 5), 2, names="x"),
    _group("weight alone", (2, 8, 5, 5), 2, names="x weight"),
    _group("bias alone", (2, 8, 5, 5), 2, "relu", names="x bias"),
    _group("three dimensions", (1, 8, 3, 4, 5), 4, arrange=_channels_last),
    _group("strided", (2, 8, 6, 5), 4, arrange=strided),
    _group("far from zero", (2, 4, 12, 12), 2, mean=100.0),
    _group("far from zero, channels-last", (2, 4, 12, 12), 2, mean=100.0, arrange=_channels_last),
    _group("empty", (0, 8, 4, 4), 4),
]


def _batch(
    name: str,
    shape: tuple[int, ...],
    activation: str | None = None,
    *,
    names: str = "x weight bias",
    arrange=lambda t: t,
    training: bool = True,
    mean: float = 0.5,
) -> Sample:
    make = _inputs(names, shape, arrange, mean, running=not training)
    return Sample(
        "batch_norm",
        name,
        make,
        {"training": training, "activation": activation},
        tuple(names.split()),
        gradient_scale="row",
    )


_RESIDUAL = "x weight bias residual"

BATCH_NORM = [
    # First one with an activation: of the others the sum of squares is a constant.
    *(_batch(name, (3, 8, 9, 4), name) for name in NUMBERS if name),
    _batch("plain", (4, 6, 5, 7)),
    _batch("residual", (3, 8, 6, 6), names=_RESIDUAL),
    _batch("residual and relu", (3, 8, 6, 6), "relu", names=_RESIDUAL),
    _batch("residual and relu, channels-last", (3, 24, 6, 6), "relu", names=_RESIDUAL, arrange=_channels_last),
    _batch("residual, no weight", (3, 5, 7), "relu", names="x residual"),
    _batch("channels-last", (4, 12, 5, 7), "relu", arrange=_channels_last),
    _batch("channels-last, odd", (3, 37, 3, 3), arrange=_channels_last),
    _batch("many values", (2, 3, 71, 64), "relu"),
    _batch("many values, channels-last", (2, 20, 41, 33), "relu", arrange=_channels_last),
    _batch("two dimensions", (40, 19), "relu"),
    _batch("no weight", (4, 5, 9), names="x"),
    _batch("weight alone", (4, 5, 9), names="x weight"),
    _batch("bias alone", (4, 5, 9), "silu", names="x bias"),
    _batch("strided", (3, 8, 6, 5), arrange=strided),
    _batch("far from zero", (3, 4, 12, 12), mean=100.0),
    _batch("far from zero, channels-last", (3, 4, 12, 12), mean=100.0, arrange=_channels_last),
    _batch("evaluation", (4, 6, 5, 7), training=False),
    _batch("evaluation, relu", (4, 6, 5, 7), "relu", training=False),
    _batch(
        "evaluation, residual and relu", (2, 24, 5, 5), "relu", names=_RESIDUAL, training=False, arrange=_channels_last
    ),
    _batch("evaluation, bias alone", (2, 6, 5), "gelu", names="x bias", training=False),
    _batch("evaluation, empty", (0, 6, 5, 5), training=False),
]
