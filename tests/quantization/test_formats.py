"""What the formats store, against loops that are written from their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bigkernels import quantization as Q
from bigkernels.functional import quantize_weight
from bigkernels.quantization import FP4, FP8, MXFP4, NF4, Q4_1, Q8_0, Int4, Int8, Int8Dynamic
from bigkernels.quantization.book4 import DYNAMIC_CODEBOOK

CONFIGS = [Int8(), Int8Dynamic(), FP8(), Int4(), Int4(64), Int4(32, "rtn"), NF4(), NF4(32, double_quant=False), FP4(),
           MXFP4(), Q4_1(), Q8_0()]  # fmt: skip
SHAPES = [(1, 1), (3, 5), (7, 64), (33, 131), (2, 300), (0, 64), (5, 0)]


def steps(config: Q.Format, w: Tensor, found: Q.QuantizedWeight) -> Tensor:
    """The largest error that rounding to nearest may make of each element."""
    codes, scale, zero, row_scale, book, group, _ = found.operands()
    if isinstance(config, FP8):
        return torch.maximum(w.abs() / 16, scale[:, None] * 2.0**-10)
    if isinstance(config, Int8):
        return scale[:, None].expand(w.shape) / 2
    spread = scale.float().repeat_interleave(group, 1)[:, : w.shape[1]]
    if isinstance(config, Q4_1 | Q8_0):  # scales and minima are rounded to float16 after the codes are made
        minimum = 0 if zero is None else zero.float().abs().repeat_interleave(group, 1)[:, : w.shape[1]]
        return spread * 0.5 + (spread * (15 if zero is not None else 127) + minimum) / 2048 + 2.0**-25 * 128
    if isinstance(config, Int4):
        return spread * row_scale[:, None] / 2
    if isinstance(config, MXFP4):  # magnitudes between 6 and 8 of its units become 6 where the block gains by it
        return spread * 2
    ordered = book.sort().values
    return spread * (ordered[1:] - ordered[:-1]).max() / 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_layout_and_error(config: Q.Format, shape: tuple[int, int]):
    w = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    found = quantize_weight(w, config)
    assert {n: (tuple(t.shape), t.dtype) for n, t in found.tensors.items()} == config.layout(shape)
    error = (found.dequantize(torch.float64) - w.double()).abs()
    if isinstance(config, NF4) and config.double_quant:
        assert error.numel() == 0 or error.max() <= 0.3 * w.abs().max()
    elif isinstance(config, Int4) and config.algorithm == "hqq":
        plain = quantize_weight(w, Int4(config.group_size, "rtn")).dequantize(torch.float64)
        assert error.square().sum() <= (plain - w.double()).square().sum() * (1 + 1e-5)
    else:
        assert (error <= steps(config, w, found) * 1.002 + 1e-40).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_same_bits_however_it_comes(config: Q.Format):
    w = torch.randn(300, 200).bfloat16()
    first = quantize_weight(w, config).tensors
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ways = [w.float(), w.double(), w.t().contiguous().t(), torch.stack((w, w), -1)[..., 1]]
        for way in ways:
            for name, t in quantize_weight(way, config).tensors.items():
                assert torch.equal(t.view(torch.uint8), first[name].view(torch.uint8)), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_do_not_know_of_each_other(config: Q.Format):
    """But for the second quantization of scales, pieces of a weight are stored as the whole is."""
    if isinstance(config, NF4):
        config = type(config)(config.block_size, double_quant=False)
    w = torch.randn(10, 70)
    whole = quantize_weight(w, config).dequantize()
    assert torch.equal(whole[3:7], quantize_weight(w[3:7], config).dequantize())


@pytest.mark.parametrize("config", CONFIGS[:-2], ids=str)  # GGUF's have scales in float16
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-30, 1e30, 3.4e38])
def test_extreme_sizes(config: Q.Format, scale: float):
    w = torch.randn(4, 200).clamp(-1, 1) * scale
    w[1] = 0.0
    w[2, 70:] = 0.0
    if isinstance(config, MXFP4) and scale > 6 * 2.0**125:
        with pytest.raises(ValueError, match="beyond the range of mxfp4"):
            quantize_weight(w, config)
        return
    found = quantize_weight(w, config).dequantize(torch.float64)
    assert found.isfinite().all()
    if isinstance(config, NF4) and config.double_quant:
        return  # the offset of the scales moves a block of zeros' scale, not its values
    assert found[1].eq(0).all()
    assert (found - w.double()).abs().max() <= max(0.2 * scale, 1e-43)


def test_int4_by_a_loop():
    w = torch.randn(5, 70)
    found = quantize_weight(w, Int4(32, "rtn"))
    codes, scale, zero, row_scale, *_ = found.operands()
    for n in range(5):
        assert math.log2(row_scale[n]).is_integer()
        for k in range(70):
            group = w[n, k // 32 * 32 : k // 32 * 32 + 32]
            step = scale[n, k // 32].item() * row_scale[n].item()
            needed = (max(group.max().item(), 0) - min(group.min().item(), 0)) / 15
            assert needed * (1 - 1e-6) <= step <= needed * 1.001
            middle = zero[n, k // 32].item()
            assert middle == round(-min(group.min().item(), 0) / step)
            expected = min(max(round(w[n, k].item() / step + middle), 0), 15)
            assert codes[n, k // 2] >> 4 * (k % 2) & 15 == expected


@pytest.mark.parametrize("config", [NF4(64, double_quant=False), FP4(64, double_quant=False)], ids=str)
def test_book_codes_by_a_loop(config: NF4):
    w = torch.randn(4, 100)
    codes, scale, _, _, book, *_ = quantize_weight(w, config).operands()
    for n in range(4):
        for k in range(100):
            most = w[n, k // 64 * 64 : k // 64 * 64 + 64].abs().max()
            assert scale[n, k // 64] == most
            found = book[(codes[n, k // 2] >> 4 * (k % 2) & 15).long()]
            assert (found - w[n, k] / most).abs() <= (book - w[n, k] / most).abs().min() + 1e-7


def test_mxfp4_by_a_loop():
    """The better of the two powers of two, by the sum of squared errors of the nearest floats."""
    w = torch.randn(6, 70) * torch.tensor([1e-40, 1e-20, 1.0, 3e4, 1e37, 0.0])[:, None]
    found = quantize_weight(w, MXFP4())
    values, exponents = found.dequantize(torch.float64), found.tensors["exponent"]
    grid = sorted({s * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for s in (1, -1)})
    for n in range(6):
        for block in range(3):
            part = w[n, block * 32 : block * 32 + 32].double()
            got = (values[n, block * 32 : block * 32 + 32] - part).square().sum().item()
            best = math.inf
            for e in range(max(0, int(exponents[n, block]) - 3), min(252, int(exponents[n, block]) + 4) + 1):
                units = torch.tensor(grid, dtype=torch.float64) * 2.0 ** (e - 127)
                best = min(best, (units[:, None] - part).abs().amin(0).square().sum().item())
            assert got <= best * (1 + 1e-6)
    assert found.nbytes == 6 * (35 + 3) and not found.tensors["exponent"][5].any()
    exact = torch.tensor(grid * 2)[None] * 2.0**-20
    assert torch.equal(quantize_weight(exact, MXFP4()).dequantize(), exact)
    # What a file may hold: the least power of two, the largest, and what is no number.
    held = Q.QuantizedWeight(
        MXFP4(),
        (1, 96),
        torch.float32,
        {
            "codes": torch.full((1, 48), 0x71, dtype=torch.uint8),
            "exponent": torch.tensor([[0, 252, 255]], dtype=torch.uint8),
        },
    )
    read = held.dequantize()[0]
    assert read[0] == 2.0**-128 and read[1] == 6 * 2.0**-127 and read[33] == 6 * 2.0**125 and read[64:].isnan().all()
    for options in ({"block_size": 64}, {"double_quant": True}):
        with pytest.raises(ValueError, match="blocks are of 32"):
            MXFP4(**options)


def test_published_books():
    assert NF4.values[7] == 0 and NF4.values[0] == -1 and NF4.values[15] == 1 and list(NF4.values) == sorted(NF4.values)
    # Quantiles of a normal distribution, symmetric about a zero of its own: eight below, seven above.
    normal = torch.distributions.Normal(0.0, 1.0)
    top = 0.9677083
    above = normal.icdf(torch.linspace(top, 0.5, 9)[:-1])
    below = normal.icdf(torch.linspace(top, 0.5, 8)[:-1])
    made = torch.cat((above, torch.zeros(1), -below)).sort().values
    torch.testing.assert_close(torch.tensor(NF4.values), made / made.max(), rtol=0, atol=2e-6)
    assert [round(v * 12, 4) for v in FP4.values[:8]] == [0, 0.0625, 8, 12, 4, 6, 2, 3]
    book = DYNAMIC_CODEBOOK
    assert len(book) == len(set(book)) == 256 and book[-1] == 1 and 0.0 in book
    assert book[0] == pytest.approx(-0.9929688) and min(v for v in book if v > 0) == pytest.approx(5.5e-7)


def test_double_quantization_of_scales():
    w = torch.randn(64, 640) * torch.rand(64, 1)
    plain, double = (quantize_weight(w, NF4(double_quant=d)) for d in (False, True))
    assert torch.equal(plain.tensors["codes"], double.tensors["codes"])
    scales = [q.operands()[1] for q in (plain, double)]
    flat, offset = scales[0].flatten(), scales[0].double().mean()
    largest = torch.stack([part.abs().max() for part in (flat - offset).split(256)]).max()
    gaps = torch.tensor(DYNAMIC_CODEBOOK).diff().max()
    assert (scales[0] - scales[1]).abs().max() <= largest * gaps / 2 * 1.001
    assert double.nbytes < plain.nbytes - 3 * flat.numel() + 64


def test_hqq_helps():
    for w in (torch.randn(256, 512), torch.distributions.StudentT(4.0).sample((256, 512))):
        errors = []
        for algorithm in ("rtn", "hqq"):
            found = quantize_weight(w, Int4(64, algorithm)).dequantize()
            parts = (found - w).square().unflatten(1, (-1, 64)).mean(-1)
            errors.append(parts)
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
        assert errors[1].mean() < 0.97 * errors[0].mean()


@pytest.mark.parametrize(
    "w, error",
    [
        (torch.ones(3, 4, dtype=torch.int32), TypeError),
        ([[1.0]], TypeError),
        (torch.randn(4), ValueError),
        (torch.randn(2, 3, 4), ValueError),
        (torch.tensor([[1.0, float("nan")]]), ValueError),
        (torch.tensor([[1.0, float("inf")]]), ValueError),
        (torch.tensor([[1e300]], dtype=torch.float64), ValueError),
    ],
)
def test_weights_that_are_refused(w, error):
    with pytest.raises(error, match="quantize_weight"):
        quantize_weight(w, "int8")


NAMES = ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "q4_1", "q8_0")


def test_formats_that_are_refused():
    for make in (lambda: Int4(48), lambda: Int4(algorithm="spqr"), lambda: NF4(16), lambda: Q.resolve_format("int3")):
        with pytest.raises(ValueError, match="accepted are"):
            make()
    with pytest.raises(TypeError, match="accepted are"):
        Q.resolve_format(4)
    assert [Q.resolve_format(n).name for n in NAMES] == list(NAMES)


def test_operands_are_made_again_when_a_tensor_changes():
    found = quantize_weight(torch.randn(4, 64), NF4())
    first = found.operands()
    assert found.operands() is first
    found.tensors["scale_offset"].add_(1.0)
    assert not torch.equal(found.operands()[1], first[1])
