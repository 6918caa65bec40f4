"""8-bit codes with a scale a block: the kernels against plain PyTorch, and both against what the codes are."""

from __future__ import annotations

import pytest
import torch
from sizes import every_size

from bigkernels.ops.compress import BLOCK, FORMATS, LEAST_SCALE, _decode, _reference, compress, decompress, encode

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
    bound = (largest / FORMATS["int8"]).clamp_min(LEAST_SCALE).repeat_interleave(BLOCK)[:n] * 0.5001
    assert ((read - x).abs() <= bound).all()


@pytest.mark.parametrize("format", ("int8", "fp8"))
def test_the_largest_value_is_exact_enough_and_signs_stay(format):
    x = torch.tensor([3.0, -3.0, 1.5, -1.5, 0.0])
    read = decompress(*compress(x, format), format)
    assert torch.allclose(read, x, rtol=0.04, atol=0)
    assert read[4] == 0


@pytest.mark.parametrize("format", ("int8", "fp8"))
@pytest.mark.parametrize("largest", (2.0**-149, 2.0**-127, 2.0**-120, 1.2 * 2.0**-110, 2.0**-100))
def test_tiny_blocks_keep_their_signs(format, largest):
    x = torch.linspace(-largest, largest, BLOCK)
    read = decompress(*compress(x, format), format)
    assert torch.equal(read.sign(), x.sign())
    assert torch.allclose(read, x, 0.063, max(largest / 200, LEAST_SCALE / 2))


@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("format", ("int8", "fp8"))
def test_only_zero_reads_back_as_zero(format, dtype, stochastic):
    """Whatever lies beside it: masks of what is positive stay, and nothing that is divided by becomes zero."""
    info = torch.finfo(dtype)
    magnitude = 10.0 ** torch.linspace(-7, 4, 6 * BLOCK, dtype=torch.float64)[torch.randperm(6 * BLOCK)]
    x = (magnitude * torch.where(torch.rand(6 * BLOCK) < 0.5, -1, 1)).to(dtype)
    x[:3] = torch.tensor([info.max, info.tiny, -info.tiny], dtype=dtype)
    x[2 * BLOCK :: 7] = 0
    if dtype == torch.float64:
        x[:BLOCK] /= 1e280  # beyond float32's range, below
    read = decompress(*compress(x, format, stochastic=stochastic), format, dtype=dtype)
    assert torch.equal(read.sign(), x.sign())
    assert read.isfinite().all()


def test_small_values_add_nothing_to_sums():
    """Probabilities, nearly all of which are smaller than a step: what stands for them is much smaller, too."""
    p = torch.full((BLOCK,), 1e-6)
    p[5] = 0.9
    for format in ("int8", "fp8"):
        assert abs(float(decompress(*compress(p, format), format).sum()) - 0.9) < 0.004


@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("format", ("int8", "fp8"))
def test_values_that_are_not_finite_stay(format, dtype, stochastic):
    """And what lies in a block with them is as exact as without."""
    x = torch.randn(3 * BLOCK).to(dtype)
    x[5:20:5] = x[BLOCK : 2 * BLOCK : 2] = 0
    without = decompress(*compress(x, format), format, dtype=dtype)
    at = torch.tensor([5, 10, 15, *range(BLOCK, 2 * BLOCK, 2)])
    bad = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype).repeat(23)[: len(at)]
    x[at] = bad
    read = decompress(*compress(x, format, stochastic=stochastic), format, dtype=dtype)
    assert torch.equal(read[at].nan_to_num(7.0), bad.nan_to_num(7.0)) and torch.equal(read[at].isnan(), bad.isnan())
    if not stochastic:
        read[at] = 0
        assert torch.equal(read, without)


@pytest.mark.parametrize("format", ("int8", "fp8"))
def test_masks(format):
    """Of attention: zeros and negative infinity, or the most negative number."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for low in (-torch.inf, torch.finfo(dtype).min):
            mask = torch.zeros(64, 64, dtype=dtype).masked_fill(torch.ones(64, 64).triu(1).bool(), low)
            read = decompress(*compress(mask, format), format, dtype=dtype).view(64, 64)
            assert torch.equal(read == 0, mask == 0) and (read[mask != 0] <= low * 0.999).all()
            assert torch.equal(read.isinf(), mask.isinf())


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
    least = 2.0**-8 / 125 if format == "int8" else 2.0**-9 / 416  # what a value that is not zero reads back as
    assert ((mean - x).abs() <= 5 * deviation / rounds**0.5 + least * x.abs().max()).all()


def test_stochastic_rounding_follows_torchs_generator():
    x = torch.randn(1000)
    torch.manual_seed(3)
    first = compress(x, stochastic=True)[0]
    second = compress(x, stochastic=True)[0]
    torch.manual_seed(3)
    assert torch.equal(compress(x, stochastic=True)[0], first)
    assert not torch.equal(first, second)


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
