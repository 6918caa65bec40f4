"""Linear layers of a few tokens with weights in the order of matrix fragments, on a GPU (`use("cuda")`)."""

from __future__ import annotations

import pytest
import torch

import bigkernels
from bigkernels import functional, use
from bigkernels._compare import compare
from bigkernels.ops import _few_tokens
from bigkernels.quantization import FP4, NF4, Int4

pytestmark = pytest.mark.gpu
FORMATS = {
    "int4, 32": Int4(32),
    "int4, 64": Int4(64),
    "int4, 128": Int4(128),
    "q4_1": "q4_1",
    "nf4, 32": NF4(32),
    "nf4, 64": NF4(64),
    "nf4, 128": NF4(128, False),
    "fp4": FP4(),
    "int8": "int8",
    "q8_0": "q8_0",
    "fp8": "fp8",
}
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _there_is_one() -> None:
    if reason := _few_tokens.unavailable():
        pytest.skip(reason)


def made(name: str, n: int, k: int) -> bigkernels.quantization.QuantizedWeight:
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=draw) * torch.linspace(0.1, 3, n)[:, None]
    return functional.quantize_weight(w.cuda(), FORMATS[name])


def tokens(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(m, k, generator=torch.Generator().manual_seed(m)) + 0.3).to("cuda", dtype)


def ours(x: torch.Tensor, qweight, bias: torch.Tensor | None = None) -> torch.Tensor:
    with use("cuda"):
        return functional.quantized_linear(x, qweight, bias)


def check(found: torch.Tensor, x: torch.Tensor, qweight, bias: torch.Tensor | None = None) -> None:
    with use("reference"):
        plain = functional.quantized_linear(x, qweight, bias)
        exact = functional.quantized_linear(x.double(), qweight, bias)
    # Values of a book are rounded to the dtype of the tokens, as weights are by every other kernel.
    comparison = compare(found, plain, exact, roundings=2, scale="tensor")
    assert comparison.ok, str(comparison)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_number_of_tokens(name: str, dtype: torch.dtype):
    for n, k in ((77, 328), (1000, 2056), (4096, 4096)):
        qweight, bias = made(name, n, k), torch.linspace(-1, 1, n, device="cuda")
        for m in (1, 3, 8, 9, 16, 17, 33, 64):
            x = tokens(m, k, dtype)
            check(ours(x, qweight, bias), x, qweight, bias)


@pytest.mark.parametrize("m", [1, 40])
def test_equal_inputs_give_equal_results(m: int):
    """Parts are added up in the order of the depth, whoever finishes last."""
    qweight, x = made("int4, 128", 512, 8192), tokens(m, 8192)
    first = ours(x, qweight)
    for _ in range(50):
        assert torch.equal(ours(x, qweight), first)


@pytest.mark.parametrize("name", ["int4, 128", "nf4, 64", "fp8"])
@pytest.mark.parametrize("m", [1, 20])
def test_in_a_graph(name: str, m: int):
    qweight, x = made(name, 512, 4096), tokens(m, 4096)
    expected = ours(x, qweight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ours(x, qweight)
        again = ours(x, qweight)
    x.copy_(2 * x)
    for _ in range(3):
        found.zero_()
        graph.replay()
        torch.testing.assert_close(found, 2 * expected, rtol=0.02, atol=0.02)
        assert torch.equal(found, again)


def test_two_graphs_and_two_streams_at_once():
    """Launches that may run beside each other have counters of their own."""
    qweight, xs = made("int4, 128", 256, 8192), [tokens(m, 8192) for m in (1, 2)]
    expected = [ours(x, qweight) for x in xs]
    torch.cuda.synchronize()
    streams, graphs, found = [torch.cuda.Stream() for _ in xs], [], []
    for x in xs:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for _ in range(20):
                out = ours(x, qweight)
        found.append(out)
    for _ in range(20):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))
    for _ in range(20):
        eager = []
        for stream, x in zip(streams, xs, strict=True):
            with torch.cuda.stream(stream):
                eager.append([ours(x, qweight) for _ in range(10)])
        torch.cuda.synchronize()
        assert all(torch.equal(y, e) for ys, e in zip(eager, expected, strict=True) for y in ys)


def test_never_waits_for_the_device_after_the_first_call():
    qweight, x = made("int4, 128", 512, 4096), tokens(4, 4096)
    ours(x, qweight)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(x, qweight)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_writes_to_the_codes_are_seen():
    qweight, x = made("int8", 64, 256), tokens(3, 256)
    before = ours(x, qweight)
    qweight.tensors["codes"].neg_()
    assert torch.equal(ours(x, qweight), -before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_gradients(name: str, dtype: torch.dtype):
    for n, k in ((77, 328), (1000, 2056)):
        qweight = made(name, n, k)
        for m in (1, 8, 16, 17, 64):
            x, grad = tokens(m, k, dtype).requires_grad_(), tokens(m, n, dtype)
            with use("cuda"):
                functional.quantized_linear(x, qweight).backward(grad)
            w = qweight.dequantize(torch.float64)
            size = (grad.double().square() @ w.square()).sqrt() * 4 + (grad.double() @ w).abs()
            wrong = (x.grad.double() - grad.double() @ w).abs()
            assert (wrong <= 2 * torch.finfo(dtype).eps * size + 2.0**-24).all(), f"{m} tokens: {float(wrong.max())}"


def test_compiled():
    linear = torch.nn.Linear(512, 256, device="cuda", dtype=torch.bfloat16)
    model = torch.nn.Sequential(linear)
    bigkernels.quantize(model, "int4")
    x = tokens(2, 512)
    with torch.no_grad(), use("cuda"):
        expected = model(x)
        found = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
