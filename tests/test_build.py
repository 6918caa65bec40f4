"""What the compiled libraries contain and need: one binary is for every Python, torch >= 2.10 and processor."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ISA_LEVELS

ROOT = Path(__file__).resolve().parent.parent

# What a library may need besides torch: the C++ runtime, and nothing of Python, OpenMP or CUDA.
NEEDED = {"libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
# Newest symbol versions a release may ask for: Ubuntu 22.04 and Debian 12 have them.
CEILINGS = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}
RELEASE_GLIBC = (2, 36)  # a newer system links against newer versions of the same symbols; releases are not built there

# What each level has, and those below it have not: registers, and of AVX-512's second part instructions.
OWN = {
    "base": r"%xmm",
    "avx2": r"%ymm",
    "avx512_vnni": r"%(zmm|k[0-7]\b|[xy]mm(1[6-9]|2\d|3[01]))",
    "avx512": r"\tv(dpbf16ps|cvtne2?ps2bf16)",
    "amx": r"%tmm",
}

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels above the first are for x86-64")


def tool(*command: str | Path) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (binutils)")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernel_objects(level: str) -> list[Path]:
    build = Path(os.environ.get("BIGKERNELS_BUILD_DIR", ROOT / "build" / "cmake"))
    objects = sorted((build / "CMakeFiles" / f"kernels_{level}.dir").glob("**/*.o"))
    if not objects:
        pytest.skip(f"no object files of level {level} under {build}: not a build from this checkout")
    sources = {path.name for path in (ROOT / "csrc/cpu/kernels").glob("*.cpp")}
    return [path for path in objects if path.name.removesuffix(".o") in sources]


@pytest.mark.parametrize("level", ["base", *(pytest.param(level, marks=x86_only) for level in ISA_LEVELS[1:])])
class TestKernelObjects:
    def test_no_weak_symbols(self, level: str) -> None:
        # The linker keeps one copy of a weak symbol for all callers: it could be AVX-512 code on an AVX2 machine.
        for path in kernel_objects(level):
            symbols = [line.split() for line in tool("nm", "--format=posix", path).splitlines()]
            assert len(symbols) > 1
            assert [name for name, kind, *_ in symbols if kind in "WwVvu"] == [], path

    def test_call_only_c(self, level: str) -> None:
        # Functions of the C++ library or torch, called from here, could be compiled here as well.
        for path in kernel_objects(level):
            undefined = tool("nm", "--format=posix", "--undefined-only", path).splitlines()
            foreign = [line for line in undefined if line.startswith("_Z") and "10bigkernels" not in line]
            assert foreign == [], path

    @x86_only
    def test_no_instructions_of_higher_levels(self, level: str) -> None:
        code = "".join(tool("objdump", "-d", "--no-show-raw-insn", path) for path in kernel_objects(level))
        assert re.search(OWN[level], code), "the level does not use what it has beyond those below it"
        for higher in ISA_LEVELS[ISA_LEVELS.index(level) + 1 :]:
            found = re.search(f".*{OWN[higher]}.*", code)
            assert found is None, f"{higher} code at level {level}: {found[0]}"


CHOSEN = "import torch, bigkernels; print(torch.ops.bigkernels.cpu_isa())"


def test_each_level_can_be_chosen(isa) -> None:
    assert isa.run(CHOSEN).strip() == isa.name


def test_the_variable_only_lowers_the_level(library: Path) -> None:
    assert _with_level("amx").stdout == _with_level("").stdout
    assert _with_level("base").stdout.strip() == "base"


@pytest.mark.parametrize("wish", ["AVX2", "sse", "default", "avx512 "])
def test_an_unknown_level_is_an_error_that_lists_the_levels(library: Path, wish: str) -> None:
    done = _with_level(wish)
    assert done.returncode != 0
    accepted = f"{', '.join(ISA_LEVELS[:-1])} and {ISA_LEVELS[-1]}"
    assert f"BIGKERNELS_CPU_ISA is '{wish}'; accepted are {accepted}" in done.stderr


def _with_level(wish: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"BIGKERNELS_CPU_ISA": wish}
    return subprocess.run([sys.executable, "-c", CHOSEN], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(params=["cpu", "cuda"])
def either_library(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("library" if request.param == "cpu" else "cuda_library")


def test_library_dependencies(either_library: Path) -> None:
    dynamic = tool("readelf", "--dynamic", "--wide", either_library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert {name for name in needed if not name.startswith("ld-linux")} <= NEEDED
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_library_asks_for_no_python_openmp_or_unstable_torch(either_library: Path) -> None:
    names = [line.split()[-1] for line in tool("nm", "--dynamic", "--undefined-only", either_library).splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    unwanted = re.compile(r"_?Py[A-Z_]|GOMP_|omp_|__kmpc_|_ZN?K?(2at|3c10|5torch)")
    assert [name for name in names if unwanted.match(name)] == []


def test_library_exports_nothing_of_its_own(either_library: Path) -> None:
    # Hidden symbols cannot clash with those of another library, nor be replaced by them.
    exported = tool("nm", "--dynamic", "--defined-only", either_library)
    assert [line for line in exported.splitlines() if "10bigkernels" in line] == []


def test_library_symbol_versions(either_library: Path) -> None:
    glibc = tuple(map(int, platform.libc_ver()[1].split(".")))
    if glibc > RELEASE_GLIBC:
        pytest.skip(f"built against glibc {platform.libc_ver()[1]}; releases are built where it is at most 2.36")
    symbols = tool("objdump", "--dynamic-syms", either_library)
    versions = {(kind, tuple(map(int, v.split(".")))) for kind, v in re.findall(r"\b([A-Z]+)_(\d[\d.]*)\b", symbols)}
    assert any(kind == "GLIBC" for kind, _ in versions)
    assert [(kind, version) for kind, version in versions if kind in CEILINGS and version > CEILINGS[kind]] == []


def test_abi_audit(either_library: Path) -> None:
    pytest.importorskip("torch_abi_audit")
    command = [sys.executable, "-m", "torch_abi_audit.cli", "--json", str(either_library)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (audited,) = report["bundled_libs"]
    assert audited["torch"]["stable"], audited["torch"]["unstable_symbols"]
    assert audited["torch"]["min_torch_version"] == "2.10.0"
    assert audited["torch"]["unknown_shim_symbols"] == []
