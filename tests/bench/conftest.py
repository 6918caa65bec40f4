"""A tiny case, and limits that need no measurement."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigkernels import functional
from bigkernels.bench.case import Case, Missing, Settings
from bigkernels.bench.limits import Limits
from bigkernels.bench.operators import operator_case

ROWS, SIZE = 4, 32


@pytest.fixture
def settings() -> Settings:
    return Settings(compile=False, rounds=3, seconds=0.0)


@pytest.fixture
def limits() -> Limits:
    return Limits("cpu", copy=1e9, matrix={"float32": 1e12}, copy_method="given", matrix_method="given")


def _not_here(device: str):
    raise Missing(f"made for another device than {device}")


@pytest.fixture
def make_case(settings):
    """A case of glu, in which any candidate can be replaced."""

    def make(*, backward: bool = False, dtype: torch.dtype = torch.float32, **changes) -> Case:
        arguments = {
            "settings": settings,
            "dtype": dtype,
            "inputs": lambda draw: {"gate": draw.normal(ROWS, SIZE), "up": draw.normal(ROWS, SIZE)},
            "ours": functional.glu,
            "eager": lambda gate, up: F.silu(gate) * up,
            "peers": {"peer": _not_here},
            "differentiable": ("gate", "up") if backward else (),
            "bytes": 3 * ROWS * SIZE * 4,
        }
        return operator_case("tiny", "glu 4x32", **arguments | changes)

    return make
