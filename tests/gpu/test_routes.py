"""What the table of routes sends to PyTorch and cuBLAS, on a GPU: right, without waiting, and in graphs."""

from __future__ import annotations

import pytest
import torch

from bigkernels import functional, use
from bigkernels._compare import worst
from bigkernels._samples import widen
from bigkernels._samples.quantized_linear import weight_sample

pytestmark = pytest.mark.gpu
FORMATS = ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "q4_1", "q8_0")


@pytest.mark.parametrize("config", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [17, 300])
def test_quantized_layers_of_many_tokens(config: str, dtype: torch.dtype, tokens: int):
    sample = weight_sample("", config, (tokens, 1024), 512)
    inputs = sample.inputs(dtype, "cuda")
    ours = sample.results(inputs)
    plain, exact = (sample.results(given, backend="reference") for given in (inputs, widen(inputs)))
    name, comparison = worst(sample.judge(ours, plain, exact, gradient_roundings=1))
    assert comparison.ok, f"{name}: {comparison}"


@pytest.mark.parametrize("heads, key_heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(1, 300), (300, 300), (2048, 2048)])
def test_plain_attention(heads: int, key_heads: int, causal: bool, queries: int, keys: int):
    q, k, v = (
        torch.randn(2, n, h, 64, device="cuda").bfloat16().transpose(1, 2)
        for n, h in ((queries, heads), (keys, key_heads), (keys, key_heads))
    )
    found = functional.attention(q, k, v, causal=causal)
    with use("triton"):
        ours = functional.attention(q, k, v, causal=causal)
    torch.testing.assert_close(found, ours, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("config", ["int8", "int8-dynamic", "int4", "nf4"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_they_are_captured(config: str, tokens: int):
    qweight = functional.quantize_weight(torch.randn(512, 1024, device="cuda"), config)
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()
    for _ in range(4):  # the third call of a layout is a prepared one
        expected = functional.quantized_linear(x, qweight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = functional.quantized_linear(x, qweight)
    x.copy_(2 * x)
    graph.replay()
    torch.testing.assert_close(found, 2 * expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("tokens", [1, 300])
def test_prepared_launches_see_each_calls_tensors(tokens: int):
    weight = torch.randn(256, device="cuda")
    for seed in range(6):
        torch.manual_seed(seed)
        x, r = (torch.randn(tokens, 256, device="cuda") for _ in range(2))
        with use("triton"):
            y, total = functional.rms_norm(x, weight, residual=x if seed % 2 else r)
        with use("reference"):
            expected = functional.rms_norm(x, weight, residual=x if seed % 2 else r)
        torch.testing.assert_close((y, total), expected)
