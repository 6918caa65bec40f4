"""Time our kernels in two built trees against each other, in turn: is a change slower than what was there before?

    git worktree add ../before COMMIT; build it there (python setup.py build_ext --inplace); then
    python tools/compare_trees.py ../before . rms_norm attention optimizers

Each tree has a process of its own, which makes the benchmark cases of that tree and times the candidate `bigkernels`
of one case whenever it is told to: old, new, old, new, ... so that whatever slows the machine slows both alike. One of
the processes is always idle. A ratio is new time by old time: above 1 the new tree is slower. Cases that one of the
trees lacks are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

_SAMPLE_SECONDS = 2e-2  # of one turn: long enough that waking a process up does not show


class Tree:
    """The process of one tree."""

    def __init__(self, tree: Path, threads: int, quick: bool):
        environment = os.environ | {"PYTHONPATH": str(tree)}
        command = [sys.executable, __file__, "--worker", str(tree), "--threads", str(threads)]
        self.process = subprocess.Popen(
            command + ["--quick"] * quick, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *words: object) -> object:
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def work(tree: Path, threads: int, quick: bool) -> None:
    """Answer questions on standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what is printed meanwhile is no answer
    import torch

    import bigkernels
    from bigkernels._memory import reuse_memory
    from bigkernels.bench.case import OURS, Settings
    from bigkernels.bench.families import cases
    from bigkernels.bench.timing import CpuTimer

    if Path(bigkernels.__file__).resolve().parent.parent != tree.resolve():
        raise SystemExit(f"{tree} is not what Python imports: {bigkernels.__file__}")
    torch.set_num_threads(threads)
    reuse_memory()
    settings = Settings.quickly() if quick else Settings(compile=False)
    listed, step, backward, timer = {}, None, None, CpuTimer()
    for line in sys.stdin:
        question, *given = json.loads(line)
        if question == "list":
            listed = {str(case): case for case in cases(given[0], settings)}
            answer = list(listed)
        elif question == "prepare":
            step = answer = None
            case = listed[given[0]]
            backward = bool(case.backward)
            candidates = {c.name: c for c in case.prepare().candidates}
            if OURS in candidates:
                step = candidates[OURS].step
                with torch.set_grad_enabled(backward):
                    candidates[OURS].results()  # makes what backward starts from
                    answer = min(timer(step, 1) for _ in range(3))
        elif question == "time":
            with torch.set_grad_enabled(backward):
                answer = timer(step, given[0])
        print(json.dumps(answer), file=answers, flush=True)


def compare(old: Tree, new: Tree, family: str, rounds: int) -> list[tuple[str, float, float, float, float]]:
    """(case, old seconds, new seconds, ratio of the medians, spread of the ratios of single turns)."""
    here = set(old.ask("list", family))
    found = []
    for name in new.ask("list", family):
        if name not in here:
            continue
        first = [tree.ask("prepare", name) for tree in (old, new)]
        if None in first:
            continue
        repeats = max(1, math.ceil(_SAMPLE_SECONDS / max(first)))
        turns = []
        for turn in range(rounds):
            pair = (old, new) if turn % 2 == 0 else (new, old)
            taken = {tree: tree.ask("time", repeats) for tree in pair}
            turns.append((taken[old], taken[new]))
        before, after = (statistics.median(column) for column in zip(*turns, strict=True))
        ratios = statistics.quantiles([b / a for a, b in turns], n=4)
        found.append((name, before, after, statistics.median(b / a for a, b in turns), ratios[2] - ratios[0]))
        print(f"{family}: {name}: {before * 1e6:.1f} -> {after * 1e6:.1f} us, {found[-1][3]:.3f}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("families", nargs="*")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: the cost of a call, and whether this runs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.threads, args.quick)
    if not args.families:
        parser.error("say two trees and at least one benchmark family")
    old, new = (Tree(tree.resolve(), args.threads, args.quick) for tree in (args.old, args.new))
    print("| family | case | old, us | new, us | new / old | quartiles apart |\n|---|---|---:|---:|---:|---:|")
    for family in args.families:
        for name, before, after, ratio, spread in compare(old, new, family, args.rounds):
            print(f"| {family} | {name} | {before * 1e6:.1f} | {after * 1e6:.1f} | {ratio:.3f} | {spread:.3f} |")


if __name__ == "__main__":
    main()
