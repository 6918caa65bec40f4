"""8-bit codes on a GPU: those of the reference on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compress_values import SIZES, hard_values

from bigkernels import use
from bigkernels.ops.compress import BLOCK, _decode, _reference, decompress, encode
from bigkernels.ops.registry import KERNEL_DTYPES

pytestmark = pytest.mark.gpu

FORMATS = pytest.mark.parametrize("format", ["int8", "fp8"])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a = a.cpu()
    return (
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    )


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("n", [*SIZES, 10_000_003])
@FORMATS
def test_codes_and_values_are_those_of_the_reference(n, format, dtype, stochastic):
    x = hard_values(n, dtype)
    expected, expected_scale = _reference(x, format == "fp8", stochastic, 12345)
    with use("triton"):
        codes, scale = encode(x.cuda(), format, stochastic, 12345)
        assert same(scale, expected_scale)
        assert same(codes, expected)
        for to in KERNEL_DTYPES:
            read = decompress(codes, scale, format, dtype=to)
            assert same(read, _decode(expected, expected_scale, format == "fp8", to))


@FORMATS
def test_never_waits_for_the_device_and_is_captured(format):
    x = torch.randn(1 << 20, device="cuda", dtype=torch.bfloat16)

    def both():
        codes, scale = encode(x, format, True, 7)
        return codes, scale, decompress(codes, scale, format, dtype=x.dtype)

    both()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(map(torch.equal, captured, both()))


@FORMATS
def test_more_than_2_31_elements(format):
    n = 2**31 + 3 * BLOCK + 1
    if torch.cuda.mem_get_info()[0] < 6 * n:
        pytest.skip(f"needs {6 * n / 2**30:.0f} GiB of GPU memory")
    x = torch.zeros(n, device="cuda", dtype=torch.bfloat16)
    last = slice(2**31 - 2 * BLOCK, n)
    x[last] = torch.randn(n - last.start, device="cuda")
    codes, scale = encode(x, format, False, 0)
    expected, expected_scale = _reference(x[last].cpu(), format == "fp8", False, 0)
    assert same(codes[last], expected) and same(scale[last.start // BLOCK :], expected_scale)
    assert not scale[: last.start // BLOCK].any()
    read = decompress(codes, scale, format, dtype=torch.bfloat16)
    assert same(read[last], _decode(expected, expected_scale, format == "fp8", torch.bfloat16))
