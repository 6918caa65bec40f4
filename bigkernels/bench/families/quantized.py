"""Linear layers with quantized weights, against the same layer in bfloat16 and against dequantizing it in each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ..._samples import Draw
from ...quantization import FP8, NF4, Int4, Int8, QuantizedWeight, quantize_weight
from ...quantization._format import Format
from ..case import Case, Settings
from ..operators import operator_case, upstream
from ..peers import bitsandbytes

_FORMATS: tuple[Format, ...] = (Int8(), Int4(64), NF4(), FP8())


def case(settings: Settings, tokens: int, n: int, k: int, config: Format, *, backward: bool = False) -> Case:
    def weight(made: Mapping[str, Tensor]) -> QuantizedWeight:
        tensors = {name: made[name] for name in config.layout((n, k))}
        return QuantizedWeight(config, (n, k), torch.bfloat16, tensors)

    held: list[QuantizedWeight] = []  # a layer keeps what it derives from its tensors

    def inputs(draw: Draw) -> dict[str, Tensor]:
        made = quantize_weight(draw.normal(n, k, scale=0.02).float(), config)
        held[:] = [made]
        return {"x": draw.normal(tokens, k), "dense": made.dequantize(torch.bfloat16), **made.tensors}

    def ours(x: Tensor, **rest: Tensor) -> Tensor:
        return functional.quantized_linear(x, held[0])

    def dequantized(x: Tensor, dense: Tensor, **tensors: Tensor) -> Tensor:
        return F.linear(x, weight(tensors).dequantize(x.dtype))

    def dense(x: Tensor, dense: Tensor, **rest: Tensor) -> Tensor:
        return F.linear(x, dense)

    def results(made: Mapping[str, Tensor], w: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        x = made["x"].detach().to(dtype)
        out = F.linear(x, w)
        grad = upstream((made["x"].new_empty(tokens, n),))[0].to(dtype)
        return {"out0": out} | ({"grad x": grad @ w} if backward else {})

    def theirs(package: ModuleType) -> Callable[..., Tensor]:
        """The same codes and scales, with the nibbles of a byte the other way round."""
        codes, scale, _, _, book, group = held[0].operands()
        packed = ((codes & 15) << 4 | codes >> 4).view(-1, 1)
        state = package.functional.QuantState(scale.flatten(), (n, k), book, group, "nf4", torch.bfloat16)
        return lambda x, **rest: package.matmul_4bit(x, packed.t(), quant_state=state)

    size = sum(t.nbytes for t in _meta(config, n, k)) + 2 * tokens * (n + k)
    return operator_case(
        "quantized",
        f"{config.name}, {tokens} x {k} to {n}",
        settings=settings,
        dtype=torch.bfloat16,
        inputs=inputs,
        ours=ours,
        eager=dequantized,
        builtin=dense,
        peers=bitsandbytes(theirs) if isinstance(config, NF4) else None,
        compiled=False,
        differentiable=("x",) if backward else (),
        exact=lambda made: results(made, weight(made).dequantize(torch.float64), torch.float64),
        plain=lambda made: results(made, made["dense"], torch.bfloat16),
        bytes=(2 if backward else 1) * size,
        flops=(4 if backward else 2) * tokens * n * k,
        metric="TFLOP/s" if tokens > 16 else "GB/s",
        only_read=tokens <= 16,
    )


def _meta(config: Format, n: int, k: int) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in config.layout((n, k)).values()]


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [case(settings, tokens, 96, 128, config, backward=tokens > 16)
                for config in _FORMATS for tokens in (1, 40)]  # fmt: skip
    made = [case(settings, 1, n, 4096, config) for n in (4096, 11008) for config in _FORMATS]
    made += [case(settings, 16, 4096, 4096, config) for config in _FORMATS]
    made += [case(settings, 512, 4096, 4096, config, backward=b) for config in _FORMATS for b in (False, True)]
    return made
