"""Linear layers with quantized weights, against the same layer in bfloat16 and against dequantizing it in each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ..._samples import Draw
from ..._torch_private import int_mm, scaled_mm
from ...ops.quantized_linear import round_tokens
from ...quantization import FP8, NF4, Int4, Int8, QuantizedWeight, quantize_weight
from ...quantization.format import Format
from ..case import Case, Missing, Settings
from ..operators import operator_case, upstream
from ..peers import INT_MM, MARLIN, SCALED_MM, TORCHAO, bitsandbytes, on_cuda

_FORMATS: tuple[Format, ...] = (Int8(), Int4(64), NF4(), FP8())


def case(settings: Settings, tokens: int, n: int, k: int, config: Format, *, backward: bool = False) -> Case:
    def weight(made: Mapping[str, Tensor]) -> QuantizedWeight:
        tensors = {name: made[name] for name in config.layout((n, k))}
        return QuantizedWeight(config, (n, k), torch.bfloat16, tensors)

    held: list[QuantizedWeight] = []  # a layer keeps what it derives from its tensors

    def inputs(draw: Draw) -> dict[str, Tensor]:
        quantized = quantize_weight(draw.normal(n, k, scale=0.02).float(), config)
        held[:] = [quantized]
        return {"x": draw.normal(tokens, k), "dense": quantized.dequantize(torch.bfloat16), **quantized.tensors}

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
        codes, scale, _, _, book, group, _ = held[0].operands()
        packed = ((codes & 15) << 4 | codes >> 4).view(-1, 1)
        state = package.functional.QuantState(
            cast(torch.Tensor, scale).flatten(), (n, k), book, group, "nf4", torch.bfloat16
        )
        return lambda x, **rest: package.matmul_4bit(x, packed.t(), quant_state=state)

    peers = bitsandbytes(theirs) if isinstance(config, NF4) else {}
    peers |= on_cuda(TORCHAO, lambda: _torchao(config, held[0])) if type(config) in (Int4, Int8) else {}
    peers |= on_cuda(MARLIN, lambda: _marlin(config, held[0])) if isinstance(config, Int4) else {}
    if not backward and tokens > 16:
        peers |= on_cuda(INT_MM, lambda: _int_mm(held[0])) if isinstance(config, Int8) else {}
        peers |= on_cuda(SCALED_MM, lambda: _scaled_mm(held[0])) if isinstance(config, FP8) else {}
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
        peers=peers,
        compiled=False,
        differentiable=("x",) if backward else (),
        exact=lambda made: results(made, weight(made).dequantize(torch.float64), torch.float64),
        plain=lambda made: results(made, made["dense"], torch.bfloat16),
        bytes=(2 if backward else 1) * size,
        flops=(4 if backward else 2) * tokens * n * k,
        metric="TFLOP/s" if tokens > 16 else "GB/s",
        only_read=tokens <= 16,
    )


def _torchao(config: Format, held: QuantizedWeight) -> Callable[..., Tensor]:
    """A linear layer of torchao with the same values in its own codes, which round a little otherwise."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(held.shape[1], held.shape[0], bias=False, device=held.device, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(held.dequantize(torch.bfloat16))
    wrapped = torch.nn.Sequential(layer)
    quantize_(wrapped, Int4WeightOnlyConfig(group_size=64) if isinstance(config, Int4) else Int8WeightOnlyConfig())
    return lambda x, **rest: wrapped(x)


def _marlin(config: Format, held: QuantizedWeight) -> Callable[..., Tensor]:
    """Marlin as the `kernels` package brings it; it fetches the kernel, and without a network there is none."""
    from kernels import get_kernel

    try:
        package = get_kernel("kernels-community/quantization")
        pack, multiply = package.marlin_quantize, package.gptq_marlin_gemm
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise Missing(f"its kernel cannot be had here: {error}") from error
    n, k = held.shape
    bits = package.scalar_type.scalar_types.uint4b8
    _, codes, scales, index, order, _ = pack(held.dequantize(torch.bfloat16).t().contiguous(), bits, 64, False)
    workspace = torch.zeros(n // 64 * 16, dtype=torch.int32, device=held.device)

    def call(x: Tensor, **rest: Tensor) -> Tensor:
        return multiply(x, None, codes, scales, None, None, index, order, workspace, bits, x.shape[0], n, k)

    return call


def _int_mm(held: QuantizedWeight) -> Callable[..., Tensor]:
    """Tokens rounded by plain PyTorch, and cuBLAS's product of integers: the bare product is most of it."""
    codes, scale = held.tensors["codes"], held.tensors["scale"]

    def call(x: Tensor, **rest: Tensor) -> Tensor:
        whole, factor = round_tokens(x.float())
        return (int_mm(whole.to(torch.int8), codes.t()) * (factor * scale)).to(x.dtype)

    return call


def _scaled_mm(held: QuantizedWeight) -> Callable[..., Tensor]:
    codes = held.tensors["codes"].view(torch.float8_e4m3fn)
    scale = held.tensors["scale"][None, :]

    def call(x: Tensor, **rest: Tensor) -> Tensor:
        factor = x.abs().amax(1, keepdim=True).float() / 448
        rounded = (x / factor).clamp(-448, 448).to(torch.float8_e4m3fn)
        return scaled_mm(rounded, codes.t(), factor, scale, out_dtype=x.dtype)

    return call


def _meta(config: Format, n: int, k: int) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in config.layout((n, k)).values()]


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [
            case(settings, tokens, 96, 128, config, backward=tokens > 16) for config in _FORMATS for tokens in (1, 40)
        ]
    cases = [case(settings, 1, n, 4096, config) for n in (4096, 11008) for config in _FORMATS]
    cases += [case(settings, 16, 4096, 4096, config) for config in _FORMATS]
    cases += [case(settings, 512, 4096, 4096, config, backward=b) for config in _FORMATS for b in (False, True)]
    return cases
