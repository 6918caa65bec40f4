"""Random and hostile calls under the guard allocator: python tests/guard/run.py [--calls N] [--seed S] [--levels ...]

Each level of the CPU kernels that the machine has runs in a process of its own. Exits with 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEVELS = ("base", "avx2", "avx512_vnni", "avx512", "amx")


def check(level: str, calls: int, seed: int, guard: Path) -> subprocess.CompletedProcess:
    """A quarter of the calls random, and the rest, which are quicker, hostile."""
    paths = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))
    environment = {"GUARD": "mixed"} | os.environ
    environment |= {"BIGKERNELS_CPU_ISA": level, "LD_PRELOAD": str(guard)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, __file__, "--child", level, "--calls", str(calls), "--seed", str(seed)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _child(level: str, calls: int, seed: int) -> int:
    import torch

    torch.set_num_threads(1)  # this process may have no threads when it forks
    import children
    import hostile_calls
    import random_calls

    import bigkernels  # noqa: F401

    chosen = torch.ops.bigkernels.cpu_isa()
    if chosen != level:
        print(f"{level}: not run, this machine has {chosen}")
        return 0
    assert children.ALLOCATIONS is not None and children.ALLOCATIONS.value > 0, "the guard allocator is not in use"
    random = calls // 4
    wrong = 0
    for number, fault in children.run(random, lambda n: random_calls.call(n, seed)):
        wrong += 1
        print(f"{level}: random call {number} of seed {seed}: {fault}", flush=True)
    valid = hostile_calls.calls(seed)
    for number, fault in children.run(calls - random, lambda n: hostile_calls.call(n, seed, valid)):
        wrong += 1
        print(f"{level}: hostile call {number} of seed {seed}: {fault}", flush=True)
    print(f"{level}: {random} random and {calls - random} hostile calls, {wrong} wrong")
    return wrong > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="at each level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", nargs="+", default=LEVELS, choices=LEVELS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return _child(given.child, given.calls, given.seed)
    import children

    failed = False
    with tempfile.TemporaryDirectory() as folder:
        guard = children.library(Path(folder))
        for level in given.levels:
            done = check(level, given.calls, given.seed, guard)
            print(done.stdout, done.stderr[-3000:] if done.returncode not in (0, 1) else "", sep="", flush=True)
            failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
