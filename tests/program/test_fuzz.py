"""A few of the random models of `fuzz.py`."""

from __future__ import annotations

import pytest
from program import fuzz

SEEDS = 24


@pytest.mark.parametrize("first", range(0, SEEDS, 6))
def test_random_models(first: int):
    for seed in range(first, first + 6):
        c = fuzz.case(seed)
        result = fuzz.run(c)
        assert result is None or result.fault is None, f"{c}\n{result.fault}"
