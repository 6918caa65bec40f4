"""Builds the compiled libraries with CMake.

Environment variables:
  BIGKERNELS_SKIP_BUILD=1    install without compiled kernels
  BIGKERNELS_CUDA=1|0        build the CUDA library or not (default: where a CUDA compiler works; CUDACXX names another)
  BIGKERNELS_CUDA_ARCHS      for which GPUs, as CMAKE_CUDA_ARCHITECTURES (default: compute capability 7.5 and newer)
  BIGKERNELS_NATIVE=1|0      build bigkernels._native or not (default: in development builds that find Python's headers)
  BIGKERNELS_TORCH_DIR       the torch package to build against (default: the one in the environment)
  BIGKERNELS_BUILD_DIR       where CMake works (default: build/cmake)
  BIGKERNELS_BUILD_TYPE      CMake's build type (default: Release)
  MAX_JOBS                   parallel compilations (default: one a core)
  CXX, CMAKE_ARGS            as CMake understands them
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

try:
    from setuptools import Extension, find_packages, setup
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_ext import build_ext
    from setuptools.command.build_py import build_py
except ImportError:
    sys.exit("bigkernels: building needs setuptools >= 77 (pip install -U setuptools cmake ninja)")

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)


def why_not_compiled() -> str | None:
    """Why this installation gets no compiled kernels; None if it gets them."""
    if os.environ.get("BIGKERNELS_SKIP_BUILD", "0") != "0":
        return "BIGKERNELS_SKIP_BUILD was set at install time"
    if sys.platform != "linux":
        return f"compiled kernels are built on Linux only, not on {sys.platform}"
    if cxx := os.environ.get("CXX"):
        found = shutil.which(shlex.split(cxx)[0])
        return None if found else f"no C++ compiler at install time (CXX={cxx} does not exist)"
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler at install time (install g++ or clang++, then bigkernels again)"
    return None


def torch_dir() -> Path:
    """The installed torch package, found without importing it.

    pip's build isolation hides torch from `sys.path`, but `sys.prefix` is still the environment being installed into.
    Other front ends build in an environment of their own; a torch in the active one is taken there.
    """
    places = []
    if given := os.environ.get("BIGKERNELS_TORCH_DIR"):
        places = [Path(given)]
    else:
        if (spec := importlib.util.find_spec("torch")) and spec.origin:
            places.append(Path(spec.origin).parent)
        for prefix in (sys.prefix, os.environ.get("VIRTUAL_ENV")):
            if prefix:
                base = {"base": prefix, "platbase": prefix}
                places += [Path(sysconfig.get_path(name, vars=base)) / "torch" for name in ("platlib", "purelib")]
    for place in places:
        if (version := place / "version.py").exists():
            found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", version.read_text())
            if found and tuple(map(int, found.groups())) < OLDEST_TORCH:
                sys.exit(f"bigkernels: needs torch >= 2.10; {place} is older")
            return place
    sys.exit(
        "bigkernels: found no installed torch to build against.\n"
        "Install it first (pip install 'torch>=2.10'), then bigkernels again. A front end other than pip may also\n"
        "need --no-build-isolation, or BIGKERNELS_TORCH_DIR=<site-packages>/torch. BIGKERNELS_SKIP_BUILD=1 installs\n"
        "without compiled kernels."
    )


def pybind11_dir() -> str:
    """pybind11's CMake folder, or "" where an extension for this Python cannot be built."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists() or not importlib.util.find_spec("pybind11"):
        return ""
    import pybind11

    return pybind11.get_cmake_dir()


def program(name: str) -> str:
    """A build tool of this environment, activated or not, else one on PATH.

    In this order, so that builds with and without isolation use one version of CMake: another one writes other command
    lines, and everything would be compiled again.
    """
    if found := shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name):
        return found
    sys.exit(f"bigkernels: building needs {name} (pip install cmake ninja), or build with pip's isolation")


def run(*command: str | Path) -> None:
    """A step of the build; its own output says what went wrong."""
    sys.stdout.flush()
    if subprocess.run(command).returncode:
        sys.exit(f"bigkernels: the build failed in: {shlex.join(map(str, command))}")


class CMakeBuild(build_ext):
    """Builds all libraries in one CMake run and installs them into the package.

    Wheels and in-place builds share one build directory, so that an incremental build of either takes seconds.
    """

    def in_tree(self) -> bool:
        return bool(self.inplace or getattr(self, "editable_mode", False))

    def destination(self) -> Path:
        return (ROOT if self.in_tree() else Path(self.build_lib).resolve()) / "bigkernels"

    def run(self) -> None:
        if not self.extensions:
            return
        build = Path(os.environ.get("BIGKERNELS_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
        pybind11 = pybind11_dir()
        native = os.environ.get("BIGKERNELS_NATIVE")
        if native == "1" and not pybind11:
            sys.exit("bigkernels: BIGKERNELS_NATIVE=1 needs pybind11 and Python's headers (python3-dev)")
        cmake, ninja = program("cmake"), program("ninja")
        configuration = {
            "CMAKE_MAKE_PROGRAM": ninja,  # always: the one in the cache may have been an isolated environment's
            "CMAKE_BUILD_TYPE": os.environ.get("BIGKERNELS_BUILD_TYPE", "Release"),
            "BK_TORCH_DIR": torch_dir(),
            "BK_PYBIND11_DIR": pybind11,
            "BK_CUDA": {"0": "OFF", "1": "ON"}.get(os.environ.get("BIGKERNELS_CUDA", ""), "AUTO"),
            "BK_CUDA_ARCHS": os.environ.get("BIGKERNELS_CUDA_ARCHS", ""),
            "Python_EXECUTABLE": sys.executable,
        }
        if ccache := shutil.which("ccache"):
            configuration["CMAKE_CXX_COMPILER_LAUNCHER"] = ccache
        targets = {"bigkernels_cpu": "library"}
        if pybind11 and native != "0" and (native == "1" or self.in_tree()):
            targets["_native"] = "native"
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))

        definitions = [f"-D{name}={value}" for name, value in configuration.items()]
        definitions += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions)
        if not self.no_cuda(build):
            targets["bigkernels_cuda"] = "cuda"
        run(cmake, "--build", build, "--parallel", jobs, "--target", *targets)
        for component in targets.values():
            run(cmake, "--install", build, "--prefix", self.destination(), "--component", component)

    def no_cuda(self, build: Path) -> bool:
        """Whether there is to be no CUDA library; what CMake says about it goes into the package, for `info`."""
        reason = (build / "cuda_not_compiled.txt").read_text()
        record = self.destination() / "_cuda_not_compiled.txt"
        if not reason:
            record.unlink(missing_ok=True)
            return False
        print(f"bigkernels: no CUDA kernels: {reason}", file=sys.stderr)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"libbigkernels_cuda.so was not built: {reason}\n")
        record.with_name("libbigkernels_cuda.so").unlink(missing_ok=True)  # of an earlier build
        return True

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        records = self.destination().glob("_cuda_not_compiled.txt")
        return [str(path) for path in (*sorted(self.destination().glob("*.so")), *records)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Package(build_py):
    """Records in the package why it has no compiled kernels, for `bigkernels info`."""

    def run(self) -> None:
        super().run()
        package = (ROOT if getattr(self, "editable_mode", False) else Path(self.build_lib)) / "bigkernels"
        record = package / "_not_compiled.txt"
        if REASON:
            record.write_text(REASON + "\n")
        else:
            record.unlink(missing_ok=True)


class Wheel(bdist_wheel):
    """A wheel for any Python 3 of one platform, or for any platform if nothing is compiled."""

    def run(self) -> None:
        # Whatever lies there goes into the wheel: modules that are deleted by now, or another build's libraries.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if os.environ.get("BIGKERNELS_NATIVE") == "1" else ("py3", "none", platform)


REASON = why_not_compiled()
if REASON:
    print(f"bigkernels: no compiled kernels, everything runs on the references: {REASON}", file=sys.stderr)

setup(
    packages=find_packages(include=["bigkernels", "bigkernels.*"]),
    # Named so that setuptools makes a wheel for one platform; CMakeBuild builds everything.
    ext_modules=[] if REASON else [Extension("bigkernels.libbigkernels_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": Package, "bdist_wheel": Wheel},
    zip_safe=False,
)
