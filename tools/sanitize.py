"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer: what the tests of its kernels and random calls
find. `make sanitize`, or in pieces:

    python tools/sanitize.py --levels base avx2 --tests tests/ops/test_recipe.py --calls 0
    python tools/sanitize.py --levels avx512 --calls 10000 --tests

Builds in `build/sanitize`, with -O1: every instruction-set level takes minutes. torch's own code is not instrumented,
but its tensors come from the allocator of AddressSanitizer, so that reads and writes beyond them are seen. Ends with 1
where something was found.

There is no ThreadSanitizer here: it has to see every synchronisation, and those of torch's thread pool (libgomp) are
made by code without instrumentation, so that each parallel region is reported as a race. What the threads of step
programs may do at a time is held by tests instead: `tests/program/test_threads.py` stops threads within each step.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "sanitize"
TREE = WORK / "tree"
LEVELS = ("base", "avx2", "avx512_vnni", "avx512", "amx")
# Each calls the kernels of its operators in all forms, at the level that is asked for.
TESTS = (
    "tests/ops/test_recipe.py",
    "tests/ops/test_attention.py",
    "tests/quantization/test_formats.py",
    "tests/optim/test_tensors.py",
)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def build(levels: tuple[str, ...], jobs: str) -> None:
    """The library of the given levels, and a package around it that is otherwise this checkout's."""
    import torch

    configure = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        WORK / "cmake",
        "-G",
        "Ninja",
        "-DBK_CUDA=OFF",
        "-DBK_SANITIZE=address,undefined",
        f"-DBK_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DBK_ONLY_LEVELS={';'.join(levels)}",
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", WORK / "cmake", "--target", "bigkernels_cpu", "--parallel", jobs], check=True)
    package = TREE / "bigkernels"
    shutil.rmtree(TREE, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (ROOT / "bigkernels").iterdir():
        if entry.suffix != ".so" and entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for other in ("tests", "csrc", "pyproject.toml", "tools", "docs", "README.md"):
        (TREE / other).symlink_to(ROOT / other)
    install = ["cmake", "--install", WORK / "cmake", "--prefix", package, "--component", "library"]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)


def environment(level: str) -> dict[str, str]:
    """The sanitizers go before everything; their interceptor of exceptions needs the C++ library beside it."""
    compiler = os.environ.get("CXX", "c++").split()[-1]
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    paths = os.pathsep.join((str(TREE), str(TREE / "tests"), str(ROOT / "tests" / "guard")))
    # One thread of torch's: the calls fork, and more threads would only be slower.
    chosen = {"LD_PRELOAD": " ".join(found), "PYTHONPATH": paths, "BIGKERNELS_CPU_ISA": level, "OMP_NUM_THREADS": "2"}
    return os.environ | chosen | OPTIONS | {"PYTHONMALLOC": "malloc"}


def fuzz(level: str, calls: int, seed: int) -> int:
    """Runs in the instrumented process: a quarter of the calls random, the rest hostile, as `make guard` makes them."""
    import torch

    torch.set_num_threads(1)  # this process may have no threads when it forks
    import children
    import hostile_calls
    import random_calls

    import bigkernels

    assert Path(bigkernels.__file__).is_relative_to(TREE), "not the instrumented package"
    if torch.ops.bigkernels.cpu_isa() != level:
        print(f"{level}: not run, this machine has {torch.ops.bigkernels.cpu_isa()}")
        return 0
    random, valid, wrong = calls // 4, hostile_calls.calls(seed), 0
    for kind, count, call in (
        ("random", random, lambda n: random_calls.call(n, seed)),
        ("hostile", calls - random, lambda n: hostile_calls.call(n, seed, valid)),
    ):
        for number, fault in children.run(count, call):
            wrong += 1
            print(f"{level}: {kind} call {number} of seed {seed}: {fault}", flush=True)
    print(f"{level}: {random} random and {calls - random} hostile calls, {wrong} wrong")
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", default=["base", "avx2", "avx512_vnni", "avx512"], choices=LEVELS)
    parser.add_argument("--tests", nargs="*", default=list(TESTS), metavar="FILE", help="none: calls alone")
    parser.add_argument("--calls", type=int, default=10_000, help="random and hostile ones, at each level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", default=os.environ.get("MAX_JOBS", str(os.cpu_count())))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return fuzz(given.child, given.calls, given.seed)
    build(LEVELS[: 1 + max(map(LEVELS.index, given.levels))], given.jobs)
    failed = False
    for level in given.levels:
        if given.tests:
            # pytest would keep what is written to file descriptors, and a finding ends the process.
            command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider"]
            command += given.tests
            failed |= subprocess.run(command, cwd=TREE, env=environment(level)).returncode != 0
        if given.calls:
            command = [sys.executable, __file__, "--child", level, "--calls", str(given.calls)]
            command += ["--seed", str(given.seed)]
            failed |= subprocess.run(command, cwd=TREE, env=environment(level)).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
