"""`bigkernels bench`."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from .._info import cores
from .._memory import reuse_memory
from .._terminal import DEVICE_HELP, default_device, progress, table
from ..bench import engine, limits, report
from ..bench.case import Case, Settings
from ..bench.families import FAMILIES, cases
from ..bench.generation_bars import bars, print_bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"default: all of {', '.join(FAMILIES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help=DEVICE_HELP)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions, limits and every row")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a PNG for each family (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, without torch.compile: shows that it runs")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument(
        "--threads",
        type=_counts,
        metavar="N[,N...]",
        help="CPU threads (default: all cores); of several numbers, cases run with each",
    )
    parser.add_argument("--seconds", type=float, help="time the candidates of a case at least so long (default 3)")
    parser.add_argument("--rounds", type=int, help="time each candidate at least so often (default 5)")
    parser.add_argument("--batch", type=int, help="batch of the model family (default 1)")
    parser.add_argument("--length", type=int, help="sequence length of the model family (default 1024)")
    parser.add_argument(
        "--fresh-memory",
        action="store_true",
        help="do not keep freed memory for the next tensor (bigkernels.memory.reuse_memory), for any candidate",
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose name has all of these words in it")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="of the generation family; default: all")
    parser.add_argument("--model", default="", metavar="DIR", help="of the generation family (default: the demo's)")
    parser.add_argument(
        "--baseline",
        default="",
        metavar="DIR",
        help="another checkout, built: the generation family measures its patch, too",
    )
    parser.add_argument("--list", action="store_true", help="list the cases and stop")


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = {int(part) for part in text.split(",")}
    except ValueError:
        counts = {0}
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers of threads such as 2 or 1,2,4")
    return tuple(sorted(counts))


def _swept(listed: list[Case], counts: tuple[int, ...]) -> list[Case]:
    """Each case with each number of threads, but for those that are about a number of their own."""
    return [c for case in listed for c in ([case] if case.threads else [replace(case, threads=n) for n in counts])]


def run(args: argparse.Namespace) -> int:
    if unknown := [f for f in args.families if f not in FAMILIES]:
        return _refuse(f"there is no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    args.device = args.device or default_device()
    if args.device == "cuda" and not torch.cuda.is_available():
        return _refuse("there is no CUDA device here")
    settings = _settings(args)
    line_up = {
        family: [case for case in cases(family, settings) if all(word in str(case) for word in args.only or ())]
        for family in args.families or FAMILIES
    }
    counts = args.threads or (cores(),)
    if len(counts) > 1:
        line_up = {family: _swept(listed, counts) for family, listed in line_up.items()}
    if args.list:
        listed = [[c.family, c, ", ".join(c.candidates)] for some in line_up.values() for c in some]
        table("Cases", ["family", "case", "candidates"], listed)
        return 0
    if args.plot:
        try:
            from ..bench import plots
        except ImportError as error:
            return _refuse(f"--plot needs matplotlib (pip install 'bigkernels[bench]'): {error}")
    # Otherwise every large output is paid for in page faults, which hide what the kernels do.
    if not (settings.fresh_memory or settings.quick or reuse_memory()):
        settings = replace(settings, fresh_memory=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(counts[-1])
        rows, measured = _measure(line_up, settings)
        content = report.document(rows, measured, settings, shlex.join(("bigkernels", *sys.argv[1:])))
        if "generation" in line_up:
            content["ratios"] = [bar.as_dict() for bar in bars(rows, settings.quick)]
    finally:
        torch.set_num_threads(threads)
    if args.json:
        report.write_json(args.json, content)
        print(f"wrote {args.json}")
    if args.plot:
        for path in plots.write(content, args.plot):
            print(f"wrote {path}")
    wrong = engine.failed(rows)
    for row in wrong:
        print(f"bigkernels bench: {row.candidate} is {row.status} in {row.family} {row.case}", file=sys.stderr)
    return 1 if wrong else 0


def _measure(line_up: dict, settings: Settings) -> tuple[list[engine.Row], limits.Limits]:
    rows = []
    with progress(1 + sum(map(len, line_up.values()))) as steps:
        steps.begin("limits of the machine")
        threads = {case.threads for listed in line_up.values() for case in listed} - {0}
        measured = limits.measure(settings.device, seconds=0.05 if settings.quick else 1.0, threads=threads)
        report.print_limits(measured)
        for family, listed in line_up.items():
            of_family = []
            for case in listed:
                steps.begin(f"{case.family} {case}")
                of_family += engine.run(case, measured, settings, steps.note)
            engine.compare_threads(of_family)
            report.print_rows(f"{family}: {FAMILIES[family]}", of_family)
            if family == "generation":
                print_bars(of_family, settings.quick)
            rows += of_family
    return rows, measured


def _settings(args: argparse.Namespace) -> Settings:
    settings = Settings.quickly(args.device) if args.quick else Settings(args.device)
    names = ("rounds", "seconds", "batch", "length", "model", "baseline")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(
        settings,
        compile=settings.compile and not args.no_compile,
        fresh_memory=args.fresh_memory,
        candidates=tuple(args.candidates or ()),
        **given,
    )


def _refuse(message: str) -> int:
    print(f"bigkernels bench: {message}", file=sys.stderr)
    return 2
