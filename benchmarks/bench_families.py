"""Every candidate of the engine's cases as a pytest-benchmark.

Cases, inputs and the check of what is computed are those of `bigkernels bench`; pytest-benchmark adds saved runs and
their comparison. It times one candidate after the other, so for ratios use `bigkernels bench`, which interleaves them.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from bigkernels.bench import engine
from bigkernels.bench.case import Case, Settings
from bigkernels.bench.families import FAMILIES, cases

# The last case only: its inputs and results may be gigabytes. The candidates of a case run one after the other.
_checked = lru_cache(maxsize=1)(engine.check)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device = option("device")
    settings = Settings.quickly(device) if option("quick") else Settings(device, compile=not option("no_compile"))
    made = [case for family in option("family") or FAMILIES for case in cases(family, settings)]
    pairs = [(case, name) for case in made for name in case.candidates]
    metafunc.parametrize(("case", "candidate"), pairs, ids=[f"{case.family} {case}: {name}" for case, name in pairs])


@pytest.fixture
def step(case: Case, candidate: str, benchmark):
    """What to time; a candidate that is missing here is skipped, and one that computes something else fails."""
    with torch.set_grad_enabled(bool(case.backward)):
        steps, rows = _checked(case)
        row = next(row for row in rows if row.candidate in (candidate, "all"))
        if row.status == "missing":
            pytest.skip(f"{candidate}: {row.reason}")
        assert row.status == "ok", f"{candidate} is {row.status}: {row.reason}"
        if row.slow:
            pytest.skip(f"{candidate}: a step takes too long to be repeated; `bigkernels bench` times it once")
        benchmark.group = f"{case.family} {case}"
        benchmark.extra_info.update(bytes=row.bytes, part=row.part, flops=case.flops, tokens=case.tokens)
        run = steps[candidate]
        yield (lambda: (run(), torch.cuda.synchronize())) if case.device == "cuda" else run


def test_step(benchmark, step):
    benchmark(step)
