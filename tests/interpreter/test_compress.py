"""8-bit codes by the launchers against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compress_values import SIZES, hard_values

from bigkernels import use
from bigkernels.ops.compress import _decode, _reference, compress
from bigkernels.ops.compress import decompress as public
from bigkernels.triton import compress as launchers

FORMATS = pytest.mark.parametrize("fp8", [False, True], ids=["int8", "fp8"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())
    )


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@FORMATS
def test_codes_are_those_of_the_reference(n, fp8, dtype, stochastic):
    x = hard_values(n, dtype)
    if dtype == torch.bfloat16:
        x[x.abs() < torch.finfo(dtype).tiny] = 0  # which the interpreter reads as zero
    codes, scale = launchers.infer(x, fp8, stochastic, 2**31 - 2)
    expected, expected_scale = _reference(x, fp8, stochastic, 2**31 - 2)
    assert equal(scale, expected_scale)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # bfloat16 is left to real GPUs
@pytest.mark.parametrize("n", SIZES)
@FORMATS
def test_codes_are_read_as_the_reference_reads_them(n, fp8, dtype):
    codes, scale = _reference(hard_values(n, torch.float32), fp8, False, 0)
    assert equal(launchers.decompress(codes, scale, fp8, dtype), _decode(codes, scale, fp8, dtype))


@FORMATS
def test_every_code(fp8):
    codes, scale = torch.arange(256).to(torch.uint8), torch.tensor([1.0, 3.0])
    assert equal(launchers.decompress(codes, scale, fp8, torch.float32), _decode(codes, scale, fp8, torch.float32))


def test_keys_draw_other_numbers():
    x = torch.randn(1000)
    first, again, other = (launchers.infer(x, False, True, key)[0] for key in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_kernels_do_not_take():
    """Nothing, and float64, are for the reference; strided values are copied."""
    for x in (torch.empty(0), torch.randn(300, dtype=torch.float64)):
        for found, expected in zip(launchers.infer(x, True, False, 0), _reference(x, True, False, 0), strict=True):
            assert equal(found, expected)
    x = torch.randn(600)
    assert torch.equal(launchers.infer(x[::2], False, False, 0)[0], _reference(x[::2], False, False, 0)[0])
    codes, scale = _reference(x, False, False, 0)
    assert launchers.decompress(codes, scale, False, torch.float64).dtype == torch.float64
    with pytest.raises(RuntimeError, match="do not fit"):
        launchers.decompress(codes, scale[:1], False, torch.float32)


@pytest.mark.usefixtures("launchers_serve_cpu_tensors")
@FORMATS
def test_through_the_public_functions(fp8):
    format = "fp8" if fp8 else "int8"
    x = torch.randn(37, 50)
    with use("triton"):
        codes, scale = compress(x, format)
        read = public(codes, scale, format)
    expected = _reference(x.view(-1), fp8, False, 0)
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])
    assert equal(read, _decode(*expected, fp8, torch.float32))
    op = torch.ops.bigkernels
    assert set(torch.library.opcheck(op.compress.default, (x.view(-1), fp8, True, 3)).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(op.decompress.default, (codes, scale, fp8, torch.float16)).values()) == {"SUCCESS"}
