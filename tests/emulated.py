"""A package whose CPU library has the tile instructions of the amx level in plain C++ (tests/tiles_on_host)."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tree(build: Path | None = None) -> Path:
    """A folder with that package and the tests: built where it is not up to date, at first in a minute or two.

    Skips the test where there is no CMake build to take the other objects from.
    """
    build = build or Path(os.environ.get("BIGKERNELS_BUILD_DIR", ROOT / "build" / "cmake"))
    cmake = shutil.which("cmake")
    if cmake is None or not (build / "build.ninja").exists():
        pytest.skip(
            f"tile instructions are emulated by a library of their own, which takes CMake and a build in {build}"
        )
    folder = build / "tiles"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:  # one of several test processes builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        command = [cmake, "--build", build, "--parallel", jobs, "--target", "bigkernels_cpu_tiles"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        _arrange(folder / "tree", folder / "libbigkernels_cpu.so")
    return folder / "tree"


def _arrange(tree: Path, library: Path) -> None:
    package = tree / "bigkernels"
    package.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in (ROOT / "bigkernels").iterdir() if entry.name not in ("__pycache__", library.name)]
    for link, to in [
        *((package / entry.name, entry) for entry in entries),
        *((tree / name, ROOT / name) for name in ("tests", "csrc", "tools", "docs", "pyproject.toml", "README.md")),
        (package / library.name, library),
    ]:
        if not link.is_symlink():
            link.symlink_to(to)
