"""What users install: the wheel in an empty environment, and the package where nothing can be compiled."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent

# Run where only the installed package is: forces the compiled kernel, and compares with PyTorch.
USE_KERNEL = """
import bigkernels, torch, torch.nn.functional as F
x, weight = torch.randn(5, 70), torch.randn(70)
with bigkernels.use("cpu"):
    y = bigkernels.functional.rms_norm(x, weight, 1e-6)
torch.testing.assert_close(y, F.rms_norm(x, (70,), weight, 1e-6))
print(bigkernels.__file__, torch.ops.bigkernels.cpu_isa(), torch.__version__, sep="\\n")
"""

USE_REFERENCE = """
import bigkernels, torch, torch.nn.functional as F
from bigkernels._info import info
x, weight = torch.randn(5, 70), torch.randn(70)
torch.testing.assert_close(bigkernels.functional.rms_norm(x, weight, 1e-6), F.rms_norm(x, (70,), weight, 1e-6))
print(bigkernels.__file__, info()["libraries"]["cpu"]["reason"], sep="\\n")
"""


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, env=inherited | environment, cwd="/", capture_output=True, text=True)


def pip_wheel(to: Path, **environment: str) -> subprocess.CompletedProcess:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--wheel-dir", to]
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / ".wheels").open("w") as lock:  # all are made in one folder of the checkout, one at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        return run(sys.executable, "-m", "pip", "wheel", *options, ROOT, **environment)


def only_wheel(folder: Path) -> Path:
    (wheel,) = folder.iterdir()
    return wheel


class Environment:
    """An environment with nothing of its own, which finds torch where `python` has it."""

    def __init__(self, folder: Path, python: str = sys.executable, torch_site: Path = TORCH.parent):
        done = run(python, "-m", "venv", "--without-pip", folder)
        assert done.returncode == 0, done.stderr
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        # A folder named in a .pth file comes after the environment's own packages, and its own .pth files are not read:
        # no other bigkernels, in development mode or not, is seen from here.
        (self.site / "torch.pth").write_text(f"{torch_site}\n")

    def install(self, wheel: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check"]
        done = run(*pip, "install", "--no-index", "--no-compile", "--force-reinstall", "--no-deps", wheel)
        assert done.returncode == 0, done.stderr

    def lines(self, snippet: str) -> list[str]:
        done = run(self.python, "-c", snippet)
        assert done.returncode == 0, done.stderr
        where, *rest = done.stdout.splitlines()
        assert Path(where).is_relative_to(self.site)
        return rest


@pytest.fixture(scope="session")
def wheel(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = pip_wheel(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return only_wheel(folder)


def test_one_wheel_for_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"bigkernels-[\w.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    metadata = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert top == {"bigkernels", metadata}  # no tests, no sources of the kernels
    built = [name for name in ("cpu", "cuda") if (ROOT / f"bigkernels/libbigkernels_{name}.so").exists()]
    assert {name for name in names if name.endswith(".so")} == {f"bigkernels/libbigkernels_{name}.so" for name in built}
    # The reason for what is missing comes along.
    assert ("bigkernels/_cuda_not_compiled.txt" in names) == ("cuda" not in built)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "bigkernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "v")
    environment.install(wheel)
    isa, version = environment.lines(USE_KERNEL)
    assert isa == torch.ops.bigkernels.cpu_isa()
    assert version == torch.__version__
    command = run(environment.python.with_name("bigkernels"), "info")
    assert command.returncode == 0, command.stderr
    assert "libbigkernels_cpu.so" in command.stdout
    assert "libbigkernels_cuda.so" in command.stdout  # its path, or that it was not built


def other_pythons() -> list[tuple[str, Path]]:
    """Pythons of another minor version on this machine that have a torch, with the folder it is in."""
    names = [f"python3.{minor}" for minor in range(10, 16) if minor != sys.version_info.minor]
    candidates = [path for name in names if (path := shutil.which(name))]
    for name in names:
        candidates += map(str, Path.home().glob(f".pyenv/versions/{name.removeprefix('python')}.*/bin/python"))
    found = []
    for python in candidates:
        done = run(python, "-c", "import torch; print(torch.__file__)")
        if done.returncode == 0:
            found.append((python, Path(done.stdout.strip()).parent.parent))
    return found


def test_the_same_wheel_under_another_python(wheel: Path, tmp_path: Path) -> None:
    others = other_pythons()
    if not others:
        pytest.skip("no other Python with a torch on this machine; tools/check_torch.py makes one")
    for number, (python, torch_site) in enumerate(others):
        environment = Environment(tmp_path / str(number), python, torch_site)
        environment.install(wheel)
        isa, _ = environment.lines(USE_KERNEL)
        assert isa == torch.ops.bigkernels.cpu_isa()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler at install time (CXX=/nonexistent/c++ does not exist)"),
        ({"PATH": "/nonexistent"}, "no C++ compiler at install time"),
        ({"BIGKERNELS_SKIP_BUILD": "1"}, "BIGKERNELS_SKIP_BUILD was set at install time"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_without_a_compiler(setting: dict[str, str], reason: str, tmp_path: Path) -> None:
    done = pip_wheel(tmp_path / "wheel", **setting)
    assert done.returncode == 0, done.stdout + done.stderr
    pure = only_wheel(tmp_path / "wheel")
    assert pure.name.endswith("-py3-none-any.whl")
    environment = Environment(tmp_path / "v")
    environment.install(pure)
    (shown,) = environment.lines(USE_REFERENCE)
    assert shown.startswith(reason)
    command = run(environment.python.with_name("bigkernels"), "info")
    assert command.returncode == 0, command.stderr
    assert reason in " ".join(command.stdout.split())


def test_a_failing_compiler_is_an_error(tmp_path: Path) -> None:
    setting = {"CXX": shutil.which("false"), "BIGKERNELS_BUILD_DIR": str(tmp_path / "build")}
    done = pip_wheel(tmp_path / "wheel", **setting)
    assert done.returncode != 0
    assert "bigkernels: the build failed in: " in done.stdout + done.stderr
    assert not (tmp_path / "wheel").exists() or not any((tmp_path / "wheel").iterdir())


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_no_torch_is_said(tmp_path: Path) -> None:
    setting = {"BIGKERNELS_TORCH_DIR": str(tmp_path), "BIGKERNELS_BUILD_DIR": str(tmp_path / "build")}
    done = pip_wheel(tmp_path / "wheel", **setting)
    assert done.returncode != 0
    assert "found no installed torch to build against" in done.stdout + done.stderr


def test_torch_is_found_when_isolation_hides_it(tmp_path: Path) -> None:
    # As pip's isolated builds do: torch is not importable, but sys.prefix is still this environment's.
    site = [sysconfig.get_path(name) for name in ("platlib", "purelib")]
    hidden = f"""
import setuptools, sys
sys.path[:] = [path for path in sys.path if path not in {site!r}]
setuptools.setup = lambda **arguments: None
sys.path.insert(0, {str(ROOT)!r})
import setup
print(setup.torch_dir())
"""
    done = run(sys.executable, "-c", hidden)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == TORCH
