"""Runs cases: check every candidate, time them in turn, measure their memory, and judge."""

# mypy: ignore-errors

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch

from .._compare import worst
from .case import EAGER, OURS, Candidate, Case, Missing, Settings, direction
from .limits import Limits
from .memory import extra_peak
from .timing import CpuTimer, CudaTimer, Statistics, Step, interleave

Announce = Callable[[str], None]


@dataclass
class Row:
    """What one candidate did in one case.

    Attributes:
        status: "ok"; "wrong" and "failed" (raised) are not timed; "missing" is not installed or not for this device.
        reason: what was wrong, why it is missing, or what has to be said beside the figures.
        error_ratio: the worst error as a part of what the criterion allows.
        seconds: of a step; None unless the status is "ok".
        bytes: of the case, or of the candidate where its formats make that another number.
        host_seconds: on GPUs, that the host takes to queue a step, at least; `seconds` do not hold them.
        gbps: these bytes by the median time. A candidate that moves more bytes than needed gets a low figure.
        limit_percent: the least time on this machine's measured limits by the median time.
        limit_gbps: the bandwidth among these limits: of as many bytes, in caches or memory, and as many threads.
        speedup: in a sweep of threads, how many times faster than with the fewest of them.
        extra_bytes: the peak of the memory allocated during a step.
        state_bytes: for optimizers, what is kept from one step to the next, in bytes a parameter.
        kept_bytes: for checkpoints, what is kept between forward and backward.
        figures: what else a candidate says: for generation, `cpu`, the processor seconds of a step by all threads,
            `peak`, the most bytes held, weights included, and `perplexity`.
        threads: that the case is about; 0 where those of the process are.
        part: of the work of the case, which is what was timed; `seconds` are scaled up to the whole.
        slow: timed once.
        vs_eager: how many times faster than eager.
        vs_best_other: for ours, how many times faster than the fastest candidate that is not ours.
    """

    family: str
    case: str
    device: str
    dtype: str
    backward: bool | None
    candidate: str
    ours: bool
    metric: str
    bytes: int
    flops: int
    status: str = "ok"
    reason: str | None = None
    error_ratio: float | None = None
    seconds: Statistics | None = None
    host_seconds: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    tokens_per_second: float | None = None
    limit_percent: float | None = None
    limit_gbps: float | None = None
    speedup: float | None = None
    extra_bytes: int | None = None
    state_bytes: float | None = None
    kept_bytes: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    threads: int = 0
    part: float = 1.0
    slow: bool = False
    vs_eager: float | None = None
    vs_best_other: float | None = None

    @property
    def key(self) -> tuple[str, str, str, bool | None, int]:
        """The same for all candidates of a case."""
        return self.family, self.case, self.dtype, self.backward, self.threads

    @property
    def direction(self) -> str:
        return direction(self.backward)

    def as_dict(self) -> dict:
        return asdict(self)


def run(case: Case, limits: Limits, settings: Settings, announce: Announce = lambda what: None) -> list[Row]:
    """Run one case.

    Args:
        announce: is told what is being done, for a progress bar.
    """
    with torch.set_grad_enabled(bool(case.backward)), _threads(case.threads):
        candidates, rows = _check(case, announce)
        steps = {name: candidate.step for name, candidate in candidates.items()}
        by_name = {row.candidate: row for row in rows}
        announce("timing")
        timer = CudaTimer(case.cold) if case.device == "cuda" else CpuTimer()
        themselves = {candidate.step for candidate in candidates.values() if candidate.timed}
        once = {name for name in steps if by_name[name].slow}
        seconds = interleave(
            steps,
            lambda step, repeats: step() if step in themselves else timer(step, repeats),
            rounds=settings.rounds,
            seconds=settings.seconds,
            once=once,
        )
        announce("memory")
        for name, candidate in candidates.items():
            row = by_name[name]
            row.seconds = Statistics.of([taken / row.part for taken in seconds[name]])
            row.host_seconds = getattr(timer, "host", {}).get(candidate.step)
            row.figures = candidate.figures() if candidate.figures else {}
            row.reason = (candidate.remark() if candidate.remark else "") or None
            row.extra_bytes = None if row.slow or candidate.timed else extra_peak(candidate.step, case.device)
    _judge(case, limits.at(case.threads), by_name)
    return rows


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(case: Case, announce: Announce = lambda what: None) -> tuple[dict[str, Step], list[Row]]:
    """Make a case ready and compare what each candidate computes with the float64 results.

    Returns:
        The steps of the candidates that are right, each run before; and a row, not timed yet, for every candidate.
    """
    candidates, rows = _check(case, announce)
    return {name: candidate.step for name, candidate in candidates.items()}, rows


def _check(case: Case, announce: Announce) -> tuple[dict[str, Candidate], list[Row]]:
    announce("inputs and reference")
    try:
        with torch.enable_grad():  # patching a model also compares gradients
            contest = case.prepare()
        exact, plain = contest.exact(), contest.plain()
    except Missing as reason:
        return {}, [_row(case, "all", status="missing", reason=str(reason))]
    except Exception as error:  # noqa: BLE001 - the other cases can still run
        return {}, [_row(case, "all", status="failed", reason=_first_line(error), ours=True)]
    right, rows = {}, []
    for candidate in contest.candidates:
        announce(f"{candidate.name}: checking")
        row = _row(case, candidate.name, ours=candidate.ours)
        row.bytes, row.part, row.slow = candidate.bytes or case.bytes, candidate.part, candidate.slow
        rows.append(row)
        try:
            results = candidate.results()
            if not candidate.slow:
                candidate.step()
            row.state_bytes = candidate.state_bytes() if candidate.state_bytes else None
            row.kept_bytes = candidate.kept_bytes() if candidate.kept_bytes else None
        except Missing as reason:
            row.status, row.reason = "missing", str(reason)
            continue
        except Exception as error:  # noqa: BLE001 - whatever it is, the others can still be timed
            row.status, row.reason = "failed", _first_line(error)
            continue
        # What the compiler makes of our reference is its own arithmetic.
        roundings = contest.roundings if candidate.name == OURS else contest.others
        name, comparison = worst(contest.compare(results, plain, exact, roundings=roundings))
        row.error_ratio = comparison.ratio
        if not comparison.ok:
            row.status, row.reason = "wrong", f"{name}: {comparison}"
            continue
        right[candidate.name] = candidate
        if candidate.name == EAGER:
            # The criterion's "PyTorch in the same dtype" is what models run; it has been compared with the reference.
            plain = results
    rows += [_row(case, name, status="missing", reason=reason) for name, reason in contest.missing.items()]
    return right, rows


def compare_threads(rows: list[Row]) -> None:
    """Set `speedup` of rows that differ in their number of threads alone."""
    fewest: dict[tuple, Row] = {}
    for row in sorted((r for r in rows if r.seconds), key=lambda r: r.threads):
        first = fewest.setdefault((*row.key[:-1], row.candidate), row)
        if first is not row:
            first.speedup, row.speedup = 1.0, first.seconds.median / row.seconds.median


def failed(rows: list[Row]) -> list[Row]:
    """The rows of ours that are wrong or raised: what makes a run fail. What the compiler adds up is its own."""
    return [r for r in rows if r.ours and (r.status == "failed" or (r.status == "wrong" and r.candidate == OURS))]


def _row(case: Case, candidate: str, *, ours: bool = False, status: str = "ok", reason: str | None = None) -> Row:
    return Row(
        case.family,
        case.name,
        case.device,
        case.dtype,
        case.backward,
        candidate,
        ours,
        case.metric,
        case.bytes,
        case.flops,
        status,
        reason,
        threads=case.threads,
    )


def _first_line(error: Exception) -> str:
    return "".join(traceback.format_exception_only(error)).splitlines()[0]


def _judge(case: Case, limits: Limits, rows: dict[str, Row]) -> None:
    timed = [row for row in rows.values() if row.seconds is not None]
    others = [row.seconds.median for row in timed if not row.ours]
    eager = rows[EAGER].seconds if EAGER in rows else None
    kind = {"only_read": case.only_read, "in_place": case.in_place}
    for row in timed:
        products = case.products or case.dtype
        least = limits.least_seconds(bytes=row.bytes, flops=case.flops, dtype=products, **kind)
        row.limit_gbps = limits.bandwidth(row.bytes, **kind) / 1e9 if row.bytes else None
        median = row.seconds.median
        row.gbps = row.bytes / median / 1e9 if row.bytes else None
        row.tflops = case.flops / median / 1e12 if case.flops else None
        row.tokens_per_second = case.tokens / median if case.tokens else None
        row.limit_percent = 100 * least / median if least else None
        row.vs_eager = eager.median / median if eager else None
        row.vs_best_other = min(others) / median if row.ours and others else None
