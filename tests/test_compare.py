"""The error criterion: it must pass what is as good as PyTorch and fail what is not."""

from __future__ import annotations

import math

import pytest
import torch

from bigkernels import _compare
from bigkernels._compare import Comparison, compare, compare_all, worst
from bigkernels._samples import SAMPLES, Draw, widen
from bigkernels._samples.rows import norm_inputs
from bigkernels.ops import OPERATORS

exact = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("scale", ["element", "row", "tensor"])
def test_twice_the_error_of_pytorch_and_one_rounding_is_allowed(scale):
    plain = (exact + torch.tensor([0.01, 0.0, 0.0])).float()
    found = compare(exact.float() + torch.tensor([0.0, 0.0199, 0.0]), plain, exact, scale=scale)
    assert found.ok
    assert found.bound == pytest.approx(2 * 0.01, rel=1e-4)
    assert not compare(exact.float() + torch.tensor([0.0, 0.0201, 0.0]), plain, exact, scale=scale).ok


def test_without_an_error_of_pytorch_one_rounding_is_allowed():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        step = torch.finfo(dtype).eps * 4.0
        # Sums are made in float32: two of its roundings are allowed at the scale of a row.
        of_a_row = 2 if dtype == torch.float32 else 1
        for scale, roundings in {"element": of_a_row, "row": of_a_row, "tensor": 1}.items():
            right, wrong = (exact + torch.tensor([0.0, 0.0, n * step]) for n in (roundings, roundings + 1))
            assert compare(right.to(dtype), exact.to(dtype), exact, scale=scale).ok
            assert not compare(wrong.to(dtype), exact.to(dtype), exact, scale=scale).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_values_have_to_be_right_too(dtype):
    """Of a norm's outputs the smallest 4.5 % are below one rounding of the largest."""
    x = norm_inputs("x", (64, 256))(Draw(dtype))["x"]
    wide = torch.nn.functional.rms_norm(x.double(), (256,))
    plain = torch.nn.functional.rms_norm(x.float(), (256,)).to(dtype)
    for part in (0.045, 0.01, 0.001):
        small = plain.abs() <= plain.abs().float().quantile(part)
        assert compare(plain, plain, wide).ok
        assert not compare(plain.where(~small, 0.0), plain, wide).ok
        assert not compare(plain.where(~small, 1.1 * plain), plain, wide).ok
    assert compare(plain.where(~small, 0.0), plain, wide, scale="tensor").ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["element", "row"])
def test_a_row_has_a_scale_of_its_own(scale, dtype):
    """A row a thousand times smaller than the others is wrong where it would be lost in their rounding."""
    rows = torch.randn(8, 64)
    rows[3] /= 1e3
    rows = rows.to(dtype)
    off = rows.clone()
    off[3] += 8 * torch.finfo(dtype).eps * rows[3].abs().max()
    assert compare(off, rows, rows.double(), scale="tensor").ok
    assert not compare(off, rows, rows.double(), scale=scale).ok


def test_sums_that_cancel_may_lose_digits_of_float32_alone():
    terms = torch.randn(32, 64, 4096, generator=torch.Generator().manual_seed(0))
    terms[..., -1] -= terms.double().sum(-1).float()  # every sum is next to nothing
    terms[:, ::8, 0] += 100.0
    wide = terms.double().sum(-1)
    assert compare(terms.flip(-1).sum(-1).bfloat16(), terms.sum(-1).bfloat16(), wide).ok
    off = terms.sum(-1) + 1e-3
    assert not compare(off.bfloat16(), terms.sum(-1).bfloat16(), wide).ok


def test_an_overflow_of_pytorch_allows_nothing_to_smaller_values():
    wide = torch.tensor([[1e5, 1.0] + [0.01] * 30], dtype=torch.float64)
    plain = wide.half()
    assert plain.isinf().any()
    assert compare(plain, plain, wide).ok
    off = plain.clone()
    off[0, 1] = 1.1
    assert not compare(off, plain, wide).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails_unless_it_should_be_there(bad):
    spoiled = exact.clone()
    spoiled[1] = bad
    assert compare(spoiled.float(), exact.float(), exact).error == math.inf
    assert compare(exact.float(), spoiled.float(), spoiled).error == math.inf
    assert compare(spoiled.float(), spoiled.float(), spoiled).ok


def test_shapes_and_missing_names_fail():
    assert "shape" in compare(exact[:2].float(), exact.float(), exact).problem
    found = compare_all({"a": exact}, {"a": exact, "b": exact}, {"a": exact, "b": exact})
    assert found["a"].ok
    assert not found["b"].ok
    assert worst(found)[0] == "b"


def test_long_tensors_are_compared_in_parts(monkeypatch):
    values = torch.arange(500.0, dtype=torch.float64).reshape(50, 10).t()
    plain, other = values.clone(), values.clone()
    plain[7, 44] += 0.0625
    other[3, 44] += 0.5
    for scale in ("element", "row", "tensor"):
        whole = compare(other.float(), plain.float(), values, scale=scale)
        assert whole.error == 0.5 and whole.bound == pytest.approx(0.125, rel=1e-3)
        with monkeypatch.context() as patch:
            patch.setattr(_compare, "_PART", 7)
            assert compare(other.float(), plain.float(), values, scale=scale) == whole


def test_empty_results_pass():
    empty = torch.empty(0, 3)
    assert compare(empty, empty, empty.double()).ok
    assert Comparison(0.0, 0.0).ratio == 0.0


@pytest.mark.parametrize("operator", SAMPLES)
def test_samples_cover_the_operator(operator):
    names = [sample.name for sample in SAMPLES[operator]]
    assert len(set(names)) == len(names)
    drawn = [sample.inputs(torch.float32) for sample in SAMPLES[operator]]
    assert any(0 in t.shape for made in drawn for t in made.values())
    assert any(not t.is_contiguous() for made in drawn for t in made.values())


def test_every_operator_has_samples():
    assert set(SAMPLES) == set(OPERATORS)


@pytest.mark.parametrize("operator", SAMPLES)
def test_samples_are_the_same_values_in_every_dtype_and_again(operator):
    for sample in SAMPLES[operator]:
        first, again, low = (sample.inputs(d) for d in (torch.float32, torch.float32, torch.bfloat16))
        for name in first:
            assert torch.equal(first[name], again[name])
            if first[name].dtype == torch.float32 and low[name].dtype == torch.bfloat16:
                assert torch.equal(first[name].bfloat16(), low[name])


@pytest.mark.parametrize("operator", SAMPLES)
def test_a_float64_result_is_finite_and_has_all_gradients(operator):
    for sample in SAMPLES[operator]:
        results = sample.results(widen(sample.inputs(torch.float32)), backend="reference")
        assert {f"grad {name}" for name in sample.differentiable} <= set(results)
        assert all(t.dtype == torch.float64 and t.isfinite().all() for t in results.values()), sample.name
