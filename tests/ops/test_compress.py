"""8-bit codes with a scale a block: the kernels against plain PyTorch, and both against what the codes are."""

from __future__ import annotations

import pytest
import torch
from sizes import every_size

from bigkernels.ops.compress import BLOCK, _decode, _reference, compress, decompress, encode

SIZES = (0, 1, 7, 127, 128, 129, 1000, 128 * 512 + 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Of many magnitudes, with whole blocks of zeros, of tiny and of equal values."""
    x = torch.randn(n) * 10.0 ** torch.randint(-4, 4, (n,))
    x[128:200] = 0
    x[256:384] = 1e-40
    x[384:512] = -3.0
    return x.to(dtype)


@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ("int8", "fp8"))
@pytest.mark.parametrize("n", SIZES)
def test_kernels_and_reference_give_the_same_codes(n, format, dtype, stochastic):
    x = values(n, dtype)
    codes, scale = encode(x, format, stochastic, 12345)
    expected, expected_scale = _reference(x, format == "fp8", stochastic, 12345)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected)
    read = decompress(codes, scale, format, dtype=dtype)
    assert read.dtype == dtype
    assert torch.equal(read, _decode(codes, scale, format == "fp8", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ("int8", "fp8"))
def test_any_size_in_any_number_of_threads(format, dtype):
    """The same bits where codes are decoded past the caches, by any number of threads."""
    x = values(SIZES[-1], dtype)
    expected = [*_reference(x, format == "fp8", True, 12345)]
    expected.append(_decode(*expected, format == "fp8", dtype))
    for threads in (1, 2, 3, 7):
        with every_size(threads):
            codes, scale = encode(x, format, True, 12345)
            found = [codes, scale, decompress(codes, scale, format, dtype=dtype)]
        assert all(map(torch.equal, found, expected)), threads


def test_at_every_level(isa):
    isa.pytest("tests/ops/test_compress.py", "-k", "not at_every_level")


@pytest.mark.parametrize("n", SIZES)
def test_int8_is_within_half_a_step(n):
    x = values(n, torch.float32)
    read = decompress(*compress(x, "int8"), "int8")
    largest = torch.nn.functional.pad(x, (0, -n % BLOCK)).view(-1, BLOCK).abs().amax(1)
    # A block below 2^-119 reads back as zeros.
    bound = torch.where(largest < 2.0**-119, largest, largest / 127 * 0.5001).repeat_interleave(BLOCK)[:n]
    assert ((read - x).abs() <= bound).all()


@pytest.mark.parametrize("format", ("int8", "fp8"))
def test_the_largest_value_is_exact_enough_and_signs_stay(format):
    x = torch.tensor([3.0, -3.0, 1.5, -1.5, 0.0])
    read = decompress(*compress(x, format), format)
    assert torch.allclose(read, x, rtol=0.04, atol=0)
    assert read[4] == 0


@pytest.mark.parametrize("format", ("int8", "fp8"))
@pytest.mark.parametrize("largest", (2.0**-120, 1.2 * 2.0**-120, 1.999 * 2.0**-120, 2.0**-119, 2.0**-117))
def test_blocks_near_the_least_are_zeros_or_right(format, largest):
    x = torch.linspace(-largest, largest, BLOCK)
    read = decompress(*compress(x, format), format)
    assert (
        torch.equal(read, torch.zeros(BLOCK)) if largest < 2.0**-119 else torch.allclose(read, x, 0.063, largest / 200)
    )


@pytest.mark.parametrize("format", ("int8", "fp8"))
def test_stochastic_rounding_has_the_right_mean(format):
    x = torch.randn(BLOCK) * 10.0 ** torch.linspace(-3, 0, BLOCK)
    rounds = 4000
    total, square = torch.zeros(BLOCK, dtype=torch.float64), torch.zeros(BLOCK, dtype=torch.float64)
    for _ in range(rounds):
        read = decompress(*compress(x, format, stochastic=True), format).double()
        total += read
        square += read.square()
    mean = total / rounds
    deviation = (square / rounds - mean.square()).clamp_min(0).sqrt()
    assert deviation.max() > 0  # it does round at random
    assert ((mean - x).abs() <= 5 * deviation / rounds**0.5 + 1e-6 * x.abs().max()).all()


def test_stochastic_rounding_follows_torchs_generator():
    x = torch.randn(1000)
    torch.manual_seed(3)
    first = compress(x, stochastic=True)[0]
    second = compress(x, stochastic=True)[0]
    torch.manual_seed(3)
    assert torch.equal(compress(x, stochastic=True)[0], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("bad", (float("inf"), -float("inf"), float("nan")))
@pytest.mark.parametrize("format", ("int8", "fp8"))
def test_a_block_that_is_not_finite_reads_back_as_nan_and_others_do_not(format, bad):
    x = torch.randn(3 * BLOCK)
    x[BLOCK + 5] = bad
    read = decompress(*compress(x, format), format)
    assert read[BLOCK : 2 * BLOCK].isnan().all()
    assert not read[:BLOCK].isnan().any() and not read[2 * BLOCK :].isnan().any()


def test_any_layout_is_taken_in_row_major_order():
    x = torch.randn(37, 64).T[::2]
    assert torch.equal(compress(x)[0], compress(x.contiguous())[0])


def test_the_largest_float32():
    x = torch.full((BLOCK,), torch.finfo(torch.float32).max)
    for format in ("int8", "fp8"):
        assert decompress(*compress(x, format), format).isfinite().all()


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="x is int64"):
        compress(torch.arange(3))
    with pytest.raises(ValueError, match="format is 'int4'"):
        compress(torch.randn(3), "int4")
    codes, scale = compress(torch.randn(300))
    with pytest.raises(ValueError, match="not what compress makes"):
        decompress(codes, scale[:1])
    with pytest.raises(ValueError, match="format is 'e5m2'"):
        decompress(codes, scale, "e5m2")


def test_one_byte_a_value_and_a_scale_a_block():
    codes, scale = compress(torch.randn(4096, dtype=torch.bfloat16))
    assert codes.nbytes + scale.nbytes == 4096 + 4 * 4096 // BLOCK
