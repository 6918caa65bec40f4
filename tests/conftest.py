"""Shared by all tests: two threads, fixed seeds, devices, and the instruction-set levels of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bigkernels import _load
from bigkernels._load import cpu_library

ROOT = Path(__file__).resolve().parent.parent
# As BIGKERNELS_CPU_ISA names them, lowest first.
ISA_LEVELS = ("base", "avx2", "avx512", "amx")

torch.set_num_threads(2)  # some results depend on their number


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def library() -> Path:
    """The compiled CPU library. Missing is an error where it could have been built, and a skip where not."""
    found = cpu_library()
    if found.reason is None:
        return found.path
    if sys.platform == "linux" and any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.fail(f"{found.reason}; run `make build`")
    pytest.skip(found.reason)


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The compiled CUDA library, which loads without a GPU. Missing is an error where the build found a compiler."""
    found = _load.cuda_library()
    if found.reason is None:
        return found.path
    if shutil.which("nvcc") and os.environ.get("BIGKERNELS_CUDA") != "0":
        pytest.fail(f"{found.reason}; run `make build`")
    pytest.skip(found.reason)


@dataclass(frozen=True)
class Isa:
    """One instruction-set level; what runs through it runs in a process of its own, as the level is chosen at start."""

    name: str

    def run(self, snippet: str, *arguments: str) -> str:
        """What a Python snippet prints at this level; its failure is the test's."""
        return _python(self.name, "-c", snippet, *arguments)

    def pytest(self, *arguments: str) -> str:
        """Run tests, given as pytest names them, at this level."""
        return _python(self.name, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def _python(level: str, *arguments: str) -> str:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"BIGKERNELS_CPU_ISA": level, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"at level {level}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def highest_isa(library: Path) -> str:
    """The level that this process chose: the machine's best, unless BIGKERNELS_CPU_ISA lowers it."""
    return torch.ops.bigkernels.cpu_isa()


@pytest.fixture(params=ISA_LEVELS)
def lower_isa(request: pytest.FixtureRequest, highest_isa: str) -> Isa:
    """Each level below this process's own: for what the process runs at its own level anyway."""
    if ISA_LEVELS.index(request.param) >= ISA_LEVELS.index(highest_isa):
        pytest.skip(f"this process chose level {highest_isa}")
    return Isa(request.param)


@pytest.fixture(params=ISA_LEVELS)
def isa(request: pytest.FixtureRequest, highest_isa: str) -> Isa:
    """Each level in turn; those that this machine lacks are skipped."""
    if ISA_LEVELS.index(request.param) > ISA_LEVELS.index(highest_isa):
        pytest.skip(f"level {request.param} is not available: this process chose {highest_isa}")
    return Isa(request.param)
