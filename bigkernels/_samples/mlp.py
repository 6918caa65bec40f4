"""Samples of MLPs."""

from __future__ import annotations

from torch import Tensor

from ..ops.activations import ACTIVATIONS
from ._sample import Draw, Sample, rows_strided, strided


def _sample(
    name: str,
    shape: tuple[int, ...],
    inner: int,
    out: int,
    activation: str = "gelu",
    *,
    bias: bool = True,
    arrange=lambda t: t,
) -> Sample:
    def make(draw: Draw) -> dict[str, Tensor]:
        inputs = {
            "x": arrange(draw.normal(*shape)),
            "weight1": arrange(draw.normal(inner, shape[-1], scale=shape[-1] ** -0.5 if shape[-1] else 1.0)),
            "bias1": draw.normal(inner, scale=0.3),
            "weight2": arrange(draw.normal(out, inner, scale=inner**-0.5 if inner else 1.0)),
            "bias2": draw.normal(out, scale=0.3),
        }
        return inputs if bias else {k: t for k, t in inputs.items() if "bias" not in k}

    names = ("x", "weight1", "bias1", "weight2", "bias2") if bias else ("x", "weight1", "weight2")
    # Products are sums, and the first of them is rounded before the second.
    options: dict[str, object] = {"activation": activation} | ({} if bias else {"bias1": None, "bias2": None})
    return Sample("mlp", name, make, options, names, scale="row", gradient_scale="row", gradient_roundings=2.0)


MLP = [
    _sample("many tokens", (2, 35, 64), 130, 70),
    *(_sample(name, (37, 33), 70, 20, name) for name in ACTIVATIONS),
    _sample("one token", (1, 96), 40, 33),
    _sample("a few tokens", (2, 3, 131), 37, 17, "relu"),
    _sample("no biases", (51, 40), 96, 40, "silu", bias=False),
    _sample("several groups of tokens", (530, 24), 40, 24, "gelu_tanh"),
    _sample("several pieces of the depth", (40, 300), 600, 40),
    _sample("one element", (1, 1), 1, 1),
    _sample("one dimension", (48,), 20, 48),
    _sample("no tokens", (0, 16), 8, 16),
    _sample("strided elements", (40, 70), 24, 30, arrange=strided),
    _sample("strided rows", (40, 70), 24, 30, "quick_gelu", arrange=rows_strided),
]
