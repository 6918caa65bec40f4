"""Samples of linear layers with quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import functional
from ..quantization import NF4, Format, Int4, QuantizedWeight, quantize_weight, resolve_format
from ._sample import Draw, Sample, rows_strided, strided


@dataclass(frozen=True)
class _WeightSample(Sample):
    """The tensors of a weight stand among the arguments."""

    def call(self, inputs: dict[str, Tensor]) -> Tensor:
        options: dict[str, Any] = self.options
        config, n = resolve_format(options["config"]), options["n"]
        x = inputs["x"]
        shape = n, x.shape[-1]
        # As they are stored, also among inputs that were widened to float64.
        tensors = {name: inputs[name].to(dtype) for name, (_, dtype) in config.layout(shape).items()}
        weight = QuantizedWeight(config, shape, x.dtype, tensors)
        return functional.quantized_linear(x, weight, inputs.get("bias"))


def weight_sample(
    name: str,
    config: str | Format,
    shape: tuple[int, ...],
    n: int,
    *,
    bias: bool = True,
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
) -> Sample:
    def make(draw: Draw) -> dict[str, Tensor]:
        inputs = {"x": arrange(draw.normal(*shape))}
        inputs |= quantize_weight(draw.normal(n, shape[-1], scale=0.05), config).tensors
        return inputs | ({"bias": draw.normal(n)} if bias else {})

    # For many tokens the dequantized weight is rounded before it is multiplied.
    return _WeightSample(
        "quantized_linear",
        name,
        make,
        {"config": config, "n": n},
        ("x", "bias") if bias else ("x",),
        scale="row",
        gradient_scale="row",
    )


_FORMATS = ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "q4_1", "q8_0")

QUANTIZED_LINEAR = [
    *(weight_sample(f"{name}, one token", name, (1, 192), 40) for name in _FORMATS),
    *(weight_sample(f"{name}, many tokens", name, (2, 35, 192), 70) for name in _FORMATS),
    *(weight_sample(f"{name}, half a block of columns", name, (70, 80), 48) for name in ("int8", "int8-dynamic")),
    weight_sample("groups of 32, odd sizes", Int4(32), (3, 131), 37),
    weight_sample("groups of 64, odd sizes, many tokens", Int4(64, "rtn"), (51, 131), 37),
    weight_sample("blocks of 128, plain scales", NF4(128, double_quant=False), (5, 300), 33),
    weight_sample("int4, one token of a long row", "int4", (1, 1300), 24),
    weight_sample("int8, one token of a long row", "int8", (1, 1300), 24),
    weight_sample("q4_1, one token of a long row", "q4_1", (1, 1300), 24),
    weight_sample("q8_0, odd sizes", "q8_0", (5, 131), 37),
    weight_sample("no bias", "int4", (4, 64), 16, bias=False),
    weight_sample("one element", "nf4", (1, 1), 1),
    weight_sample("one dimension", "int8", (48,), 20),
    weight_sample("empty", "int4", (0, 64), 8),
    weight_sample("strided elements", "int4", (9, 70), 24, arrange=strided),
    weight_sample("strided rows", "nf4", (40, 70), 24, arrange=rows_strided),
]
