"""Kernels for Arm64 on other machines: Debian's cross compiler (g++-aarch64-linux-gnu) and QEMU (qemu-user-static)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp"))
LEVELS = {"base": (), "dotprod": ("-march=armv8.2-a+dotprod",)}  # as CMakeLists.txt has them
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
INCLUDE = f"-I{ROOT}/csrc/include"
OPTIONS = ("-std=c++17", "-O1", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-Wno-psabi", INCLUDE)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed"),
]


def compile_kernel(source: Path, level: str, *options: str | Path) -> None:
    subprocess.run([COMPILER, *OPTIONS, *LEVELS[level], f"-DBK_ISA={level}", *options, source], check=True)


def test_the_levels_are_those_of_the_build():
    text = (ROOT / "CMakeLists.txt").read_text()
    assert f"set(BK_ISA_FLAGS_dotprod {' '.join(LEVELS['dotprod'])})" in text and "base dotprod)" in text


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_every_kernel_compiles(source: Path, level: str):
    compile_kernel(source, level, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized")


@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")
def test_products_of_integers_by_sdot(tmp_path: Path):
    for level in LEVELS:
        for name in ("linear_dynamic", "program_product", "program_blocks", "program_blocks_exact"):
            compile_kernel(ROOT / f"csrc/cpu/kernels/{name}.cpp", level, "-c", "-o", tmp_path / f"{level}_{name}.o")
    program = tmp_path / "integers"
    objects = sorted(tmp_path.glob("*.o"))
    source = ROOT / "tests/arm_on_host/integers.cpp"
    subprocess.run([COMPILER, *OPTIONS, "-static", "-o", program, source, *objects], check=True)
    done = subprocess.run([QEMU, "-cpu", "max", program], capture_output=True, text=True)
    assert done.returncode == 0 and ", 0 wrong" in done.stdout, done.stdout + done.stderr
