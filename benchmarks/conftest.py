"""The options of `bench_families.py`."""

from __future__ import annotations

import pytest

from bigkernels.bench.families import FAMILIES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bigkernels")
    group.addoption("--family", action="append", choices=tuple(FAMILIES), help="may be repeated; all by default")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--quick", action="store_true", help="tiny shapes, without torch.compile")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
