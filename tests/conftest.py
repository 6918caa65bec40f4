"""Shared by all tests: two threads, fixed seeds, devices, and the instruction-set levels of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Idle threads of a parallel region sleep instead of spinning: workers of pytest-xdist share the cores. It is read when
# torch is loaded, and inherited by the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from bigkernels import _load
from bigkernels._info import cores, info
from bigkernels._load import cpu_library

ROOT = Path(__file__).resolve().parent.parent
ARM = platform.machine() == "aarch64"
# As BIGKERNELS_CPU_ISA names them, lowest first.
ISA_LEVELS = ("base", "dotprod") if ARM else ("base", "avx2", "avx512_vnni", "avx512", "amx")
# What a processor needs for each, as /proc/cpuinfo names it.
FEATURES = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512_vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avx512": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16", "amx_int8"},
    "dotprod": {"asimddp"},
}

torch.set_num_threads(2)  # some results depend on their number
GPU = torch.cuda.is_available()
collect_ignore = [] if GPU else ["gpu"]

# Files whose tests share what takes long to make: one worker runs them all.
TOGETHER = (
    "test_distributed.py",
    "test_packaging.py",
    "test_cuda_source.py",
    "test_demo.py",
    "test_plan.py",
    "test_tiles.py",
    "test_training.py",
    "test_trl_ranks.py",
)
# What takes longest begins first, so that no worker is left with it at the end.
LONG = ("test_interpreter.py", "test_distributed.py", "test_packaging.py", "test_training.py", "test_triton_aot.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker a core, which runs a test's second thread as well; a worker may need more than a GB."""
    return min(cores(), 8)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if item.path.name in TOGETHER or item.path.parent.name == "distributed":  # whose processes start once a file
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(ROOT))))
    if not GPU:
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names what no test of this run could reach on this machine: a run without it says nothing about it."""
    missing = list(untested())
    if missing:
        terminalreporter.section("not tested on this machine", sep="-")
        for line in missing:
            terminalreporter.write_line(line)


def untested() -> Iterator[str]:
    """The instruction-set levels above this process's own, and GPUs where there is none, each with the reason."""
    if reason := cpu_library().reason:
        yield f"kernels of all instruction-set levels: {reason}"
    else:
        for level in ISA_LEVELS[ISA_LEVELS.index(torch.ops.bigkernels.cpu_isa()) + 1 :]:
            instead = "; test_tiles.py runs it with tiles in plain C++" if emulates(level) else ""
            yield f"kernels of level {level}: {why_not(level)}{instead}"
    if not GPU:
        yield "kernels on GPUs (tests/gpu): no CUDA device; the interpreter and the ahead-of-time tests stand for them"


def emulates(level: str) -> bool:
    """Whether this processor has all of a level but tiles."""
    below = ISA_LEVELS[1 : ISA_LEVELS.index(level)] if level in ISA_LEVELS else ()
    return level == "amx" and not ARM and set().union(*(FEATURES[name] for name in below)) <= flags()


def why_not(level: str) -> str:
    """Why this process does not run a level."""
    cpu = info()["cpu"]
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"it is for x86-64, not {platform.machine()}"
    if cpu["BIGKERNELS_CPU_ISA"]:
        return f"BIGKERNELS_CPU_ISA is {cpu['BIGKERNELS_CPU_ISA']}"
    lacking = sorted(set().union(*(FEATURES[name] for name in ISA_LEVELS[1 : ISA_LEVELS.index(level) + 1])) - flags())
    return f"{cpu['model']} lacks {', '.join(lacking)}" if lacking else "this build or this system does not have it"


def flags() -> set[str]:
    """The features that /proc/cpuinfo lists."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), ()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_mode_is_left() -> Iterator[None]:
    """A dispatch mode or a profiler that a test leaves behind changes what later tests of its worker run."""
    before = _modes()
    yield
    assert _modes() == before


def _modes() -> dict[str, object]:
    return {
        "dispatch": torch._C._len_torch_dispatch_stack(),
        "function": torch._C._len_torch_function_stack(),
        "profiler": torch._C._autograd._profiler_enabled(),
    }


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if GPU else ["cpu"])
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
    root: Path = ROOT  # where the package and the tests are

    def run(self, snippet: str, *arguments: str) -> str:
        """What a Python snippet prints at this level; its failure is the test's."""
        return _python(self, "-c", snippet, *arguments)

    def script(self, *arguments: str) -> str:
        """What a Python file prints at this level."""
        return _python(self, *arguments)

    def pytest(self, *arguments: str) -> str:
        """Run tests, given as pytest names them, at this level."""
        return _python(self, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def _python(isa: Isa, *arguments: str) -> str:
    path = os.pathsep.join(filter(None, (str(isa.root), str(isa.root / "tests"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"BIGKERNELS_CPU_ISA": isa.name, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=isa.root, capture_output=True, text=True)
    assert done.returncode == 0, f"at level {isa.name}:\n{done.stdout}\n{done.stderr}"
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
