"""`bigkernels check`: every operator, forward and backward, against its float64 reference."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch

from .._compare import worst
from .._samples import SAMPLES, Sample, widen
from .._terminal import DEVICE_HELP, default_device, progress, table
from ..ops import OPERATORS
from ..ops.registry import KERNEL_DTYPES


@dataclass
class Tally:
    """What one implementation of one operator did in one dtype."""

    operator: str
    dtype: torch.dtype
    implementation: str
    cases: int = 0
    ratio: float = 0.0
    where: str = ""
    failures: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help=DEVICE_HELP)


def run(args: argparse.Namespace) -> int:
    device = args.device or default_device()
    if device == "cuda" and not torch.cuda.is_available():
        print("bigkernels check: there is no CUDA device here", file=sys.stderr)
        return 2
    tallies: list[Tally] = []
    unserved: dict[tuple[str, str], list[torch.dtype]] = {}  # (operator, why): dtypes
    with progress(len(SAMPLES) * len(KERNEL_DTYPES)) as steps:
        for name in SAMPLES:
            for dtype in KERNEL_DTYPES:
                steps.begin(f"{name} {_short(dtype)}")
                refusals = OPERATORS[name].refusals(device, dtype)
                runnable = [
                    i for i, reason in refusals.items() if reason is None and i not in ("reference", "torch", "gluon")
                ]
                tallies += [check(name, dtype, implementation, device) for implementation in runnable]
                if not runnable:
                    why = "; ".join(f"{i}: {reason}" for i, reason in refusals.items() if reason)
                    unserved.setdefault((name, why), []).append(dtype)
    _report(device, tallies, unserved)
    return 1 if any(t.failures for t in tallies) else 0


def check(operator: str, dtype: torch.dtype, implementation: str, device: str) -> Tally:
    """Compare every sample of an operator, computed by one implementation, with the float64 reference."""
    tally = Tally(operator, dtype, implementation)
    for sample in SAMPLES[operator]:
        ratio, failure = _check_sample(sample, dtype, implementation, device)
        tally.cases += 1
        if ratio >= tally.ratio:
            tally.ratio, tally.where = ratio, sample.name
        if failure:
            tally.failures += (f"{operator} {_short(dtype)} by {implementation}, {sample.name}: {failure}",)
    return tally


def _check_sample(sample: Sample, dtype: torch.dtype, implementation: str, device: str) -> tuple[float, str | None]:
    """The worst error as a part of what is allowed, and what is wrong (or None)."""
    inputs = sample.inputs(dtype, device)
    exact = sample.results(widen(inputs), backend="reference")
    plain = sample.results(inputs, backend="reference")
    given = {name: t.clone() for name, t in inputs.items()}
    try:
        ours = sample.results(inputs, backend=implementation)
        # Without gradients the public function takes another path.
        plainly = sample.results(inputs, backend=implementation, backward=False)
        ours |= {f"{k} without grad": v for k, v in plainly.items()}
    except Exception as error:  # noqa: BLE001 - a raising kernel is a finding, and hides no other
        return float("inf"), f"raised {type(error).__name__}: {error}"
    for name, t in inputs.items():
        if not torch.equal(t, given[name]):
            return float("inf"), f"wrote to its input {name}"
    for results in (exact, plain):
        results |= {f"{k} without grad": v for k, v in results.items() if k.startswith("out")}
    name, comparison = worst(sample.judge(ours, plain, exact))
    return comparison.ratio, None if comparison.ok else f"{name} {comparison}"


def _report(device: str, tallies: list[Tally], unserved: dict[tuple[str, str], list[torch.dtype]]) -> None:
    rows = [
        [
            t.operator,
            _short(t.dtype),
            t.implementation,
            t.cases,
            f"{t.ratio:.2f}",
            t.where,
            f"{len(t.failures)} WRONG" if t.failures else "ok",
        ]
        for t in tallies
    ]
    columns = ["operator", "dtype", "implementation", "cases", "error / allowed", "worst case", "result"]
    if rows:
        table(f"Check on {device}, forward and backward", columns, rows, right=("cases", "error / allowed"))
    if unserved:
        rows = [[name, ", ".join(map(_short, dtypes)), why] for (name, why), dtypes in unserved.items()]
        table("Not checked: no kernel supports these, the reference runs", ["operator", "dtypes", "why"], rows)
    for failure in (f for t in tallies for f in t.failures):
        print(failure)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
