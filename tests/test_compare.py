"""The error criterion: it must pass what is as good as PyTorch and fail what is not."""

from __future__ import annotations

import math

import pytest
import torch

from bigkernels import _compare
from bigkernels._compare import Comparison, compare, compare_all, max_error, rounding, worst
from bigkernels._samples import SAMPLES, widen
from bigkernels.ops import OPERATORS

exact = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


def test_twice_the_error_of_pytorch_and_one_rounding_is_allowed():
    plain = (exact + torch.tensor([0.01, 0.0, 0.0])).float()
    bound = 2 * max_error(plain, exact) + torch.finfo(torch.float32).eps * 4.0
    found = compare(exact.float() + torch.tensor([0.0, 0.0199, 0.0]), plain, exact)
    assert found.ok
    assert found.bound == pytest.approx(bound)
    assert not compare(exact.float() + torch.tensor([0.0, 0.0201, 0.0]), plain, exact).ok


def test_without_an_error_of_pytorch_one_rounding_is_allowed():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        step = torch.finfo(dtype).eps * 4.0
        assert compare((exact + torch.tensor([0.0, 0.0, step])).to(dtype), exact.to(dtype), exact).ok
        assert not compare((exact + torch.tensor([0.0, 0.0, 2 * step])).to(dtype), exact.to(dtype), exact).ok


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
    monkeypatch.setattr(_compare, "_PART", 7)
    values = torch.arange(50.0, dtype=torch.float64).reshape(5, 10).t()
    other = values.clone()
    other[3, 4] += 0.5
    assert max_error(other, values) == 0.5
    assert rounding(torch.float32, values) == torch.finfo(torch.float32).eps * 49


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
