"""What the report of `patch` says of errors."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

import bigkernels
from bigkernels.patch._report import Error, PatchReport, Row
from bigkernels.patch._verify import compare


class RMS(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(size)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def test_an_error_stands_beside_that_of_the_model_in_its_dtype() -> None:
    report = bigkernels.patch(nn.Sequential(RMS(24), RMS(24)))
    error = report.patched[0].error
    # Of float32, float16 and bfloat16 the last is the coarsest; each rounds to half a unit of 2^-8 and a little more.
    assert error.dtype == torch.bfloat16
    assert 0 < error < 2**-7 and 0 < error.eager < 2**-7
    last = str(report).splitlines()[-1]
    assert last.endswith(f"{float(error):.1e} (bfloat16; eager {error.eager:.1e})")


def test_the_largest_error_is_shown_with_what_belongs_to_it() -> None:
    exact = [torch.tensor([4.0, -2.0], dtype=torch.float64)]
    near = compare([torch.tensor([4.0, -2.0])], [torch.tensor([4.0, -2.0000005])], exact, "f")
    assert (near, near.dtype) == (0.0, torch.float32)
    assert near.eager == pytest.approx(4.768e-7 / 4, rel=1e-3)
    rows = [Row("a.0", "k", near), Row("a.1", "k", Error(0.5, torch.float16, 0.25)), Row("b", "k", None)]
    text = str(PatchReport(patched=rows))
    assert "5.0e-01 (float16; eager 2.5e-01)" in text and text.splitlines()[-1].endswith("-")


def test_errors_are_numbers_that_can_be_copied() -> None:
    error = Error(0.5, torch.float16, 0.25)
    for made in (copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert (made, made.dtype, made.eager) == (0.5, torch.float16, 0.25)
    assert max(0.0, error) is error and error + 1 == 1.5


def test_each_rule_has_an_argument_that_switches_it_off():
    from bigkernels.patch.rules import MODULE_RULES, SOURCE_RULES

    arguments = inspect.signature(bigkernels.patch).parameters
    assert {rule.flag for rule in (*MODULE_RULES, *SOURCE_RULES)} <= set(arguments)
