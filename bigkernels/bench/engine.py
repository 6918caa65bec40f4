"""Runs cases: check every candidate, time them in turn, measure their memory, and judge."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from .._compare import compare_all, worst
from .case import EAGER, Case, Contest, Missing, Settings, direction
from .limits import Limits
from .memory import extra_peak
from .timing import CpuTimer, CudaTimer, Statistics, interleave

# How many roundings the candidates of others may add to the criterion: they have to compute the same thing, and may
# round after every operation. Ours are held to `Contest.roundings`.
_ROUNDINGS_OF_OTHERS = 16.0


@dataclass
class Row:
    """What one candidate did in one case.

    Attributes:
        status: "ok"; "wrong" and "failed" (raised) are not timed; "missing" is not installed or not for this device.
        reason: what was wrong, or why it is missing.
        error_ratio: the worst error as a part of what the criterion allows.
        seconds: of a step; None unless the status is "ok".
        gbps: the bytes of the case by the median time. A candidate that moves more bytes than needed gets a low figure.
        limit_percent: the least time on this machine's measured limits by the median time.
        extra_bytes: the peak of the memory allocated during a step.
        vs_eager: how many times faster than eager.
        vs_best_other: for ours, how many times faster than the fastest candidate that is not ours.
    """

    family: str
    case: str
    device: str
    dtype: str
    backward: bool
    candidate: str
    ours: bool
    metric: str
    bytes: int
    flops: int
    status: str = "ok"
    reason: str | None = None
    error_ratio: float | None = None
    seconds: Statistics | None = None
    gbps: float | None = None
    tflops: float | None = None
    tokens_per_second: float | None = None
    limit_percent: float | None = None
    extra_bytes: int | None = None
    vs_eager: float | None = None
    vs_best_other: float | None = None

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """The same for all candidates of a case."""
        return self.family, self.case, self.dtype, self.backward

    @property
    def direction(self) -> str:
        return direction(self.backward)

    def as_dict(self) -> dict:
        return asdict(self)


def run(
    case: Case, limits: Limits, settings: Settings, announce: Callable[[str], None] = lambda what: None
) -> list[Row]:
    """Run one case.

    Args:
        announce: is told what is being done, for a progress bar.
    """
    announce("inputs and reference")
    try:
        contest = case.prepare()
    except Missing as reason:
        return [_missing(case, "all", str(reason))]
    rows = {c.name: _row(case, c.name, c.ours) for c in contest.candidates}
    with torch.set_grad_enabled(case.backward):
        _check(contest, rows, announce)
        steps = {c.name: c.step for c in contest.candidates if rows[c.name].status == "ok"}
        announce("timing")
        for step in steps.values():
            step()
        timer = CudaTimer(case.cold) if case.device == "cuda" else CpuTimer()
        seconds = interleave(steps, timer, rounds=settings.rounds, seconds=settings.seconds) if steps else {}
        announce("memory")
        for name, step in steps.items():
            rows[name].seconds = Statistics.of(seconds[name])
            rows[name].extra_bytes = extra_peak(step, case.device)
    _judge(case, limits, rows)
    return [*rows.values(), *(_missing(case, name, reason) for name, reason in contest.missing.items())]


def failed(rows: list[Row]) -> list[Row]:
    """The rows of ours that are wrong or raised: what makes a run fail."""
    return [row for row in rows if row.ours and row.status in ("wrong", "failed")]


def _row(case: Case, name: str, ours: bool) -> Row:
    return Row(case.family, case.name, case.device, case.dtype, case.backward, name, ours, case.metric,
               case.bytes, case.flops)  # fmt: skip


def _missing(case: Case, name: str, reason: str) -> Row:
    row = _row(case, name, False)
    row.status, row.reason = "missing", reason
    return row


def _check(contest: Contest, rows: dict[str, Row], announce: Callable[[str], None]) -> None:
    """Compare what each candidate computes with the float64 results.

    "PyTorch in the same dtype" of the criterion is the eager candidate, which is itself compared with the reference
    in the same dtype.
    """
    exact, plain = contest.exact(), contest.plain()
    for candidate in contest.candidates:
        row = rows[candidate.name]
        announce(f"{candidate.name}: checking")
        try:
            results = candidate.results()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others can still be timed
            row.status, row.reason = "failed", "".join(traceback.format_exception_only(error)).splitlines()[0]
            continue
        roundings = contest.roundings if candidate.ours else _ROUNDINGS_OF_OTHERS
        name, comparison = worst(compare_all(results, plain, exact, roundings=roundings))
        row.error_ratio = comparison.ratio
        if not comparison.ok:
            row.status, row.reason = "wrong", f"{name}: {comparison}"
        elif candidate.name == EAGER:
            plain = results


def _judge(case: Case, limits: Limits, rows: dict[str, Row]) -> None:
    timed = [row for row in rows.values() if row.seconds is not None]
    others = [row.seconds.median for row in timed if not row.ours]
    eager = rows[EAGER].seconds if EAGER in rows else None
    least = limits.least_seconds(bytes=case.bytes, flops=case.flops, dtype=case.dtype)
    for row in timed:
        median = row.seconds.median
        row.gbps = case.bytes / median / 1e9 if case.bytes else None
        row.tflops = case.flops / median / 1e12 if case.flops else None
        row.tokens_per_second = case.tokens / median if case.tokens else None
        row.limit_percent = 100 * least / median if least else None
        row.vs_eager = eager.median / median if eager else None
        row.vs_best_other = min(others) / median if row.ours and others else None
