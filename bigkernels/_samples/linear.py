"""Samples of linear layers."""

from __future__ import annotations

from torch import Tensor

from ._sample import Draw, Sample, rows_strided, strided


def _sample(name: str, shape: tuple[int, ...], n: int, *, bias: bool = True, arrange=lambda t: t) -> Sample:
    def make(draw: Draw) -> dict[str, Tensor]:
        inputs = {"x": arrange(draw.normal(*shape)), "weight": arrange(draw.normal(n, shape[-1], scale=0.1))}
        return inputs | ({"bias": draw.normal(n)} if bias else {})

    return Sample("linear", name, make, {}, ("x", "weight", "bias") if bias else ("x", "weight"))


LINEAR = [
    _sample("one token", (1, 192), 40),
    _sample("a few tokens, odd sizes", (2, 3, 131), 37),
    _sample("many tokens", (2, 35, 192), 70),
    _sample("odd sizes", (51, 131), 37, bias=False),
    _sample("several pieces of the depth", (40, 600), 150),
    _sample("half a block of columns", (70, 80), 48),
    _sample("one element", (1, 1), 1),
    _sample("one dimension", (48,), 20),
    _sample("no tokens", (0, 64), 8),
    _sample("no features", (3, 0), 8),
    _sample("strided elements", (40, 70), 24, arrange=strided),
    _sample("strided rows", (40, 70), 24, arrange=rows_strided),
]
