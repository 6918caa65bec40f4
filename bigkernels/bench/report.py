"""What a run says: tables for people, JSON for programs."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from .._info import info
from .._terminal import table
from .case import Settings
from .engine import Row
from .limits import Limits

SCHEMA = 1  # raise it when a field of the JSON changes its meaning


def document(rows: Sequence[Row], limits: Limits, settings: Settings, command: str) -> dict:
    """Everything needed to judge the figures later, as `json.dumps` accepts it.

    Args:
        command: the command line that made the rows.
    """
    machine = info()
    del machine["operators"], machine["routes"], machine["programs"]
    return {
        "schema": SCHEMA,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "settings": asdict(settings),
        "machine": machine,
        "limits": asdict(limits),
        "rows": [row.as_dict() for row in rows],
    }


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def commit() -> str | None:
    """The commit of the checkout that the package runs from, with "+changes" if files differ; None outside one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(("git", "-C", str(root), *what), capture_output=True, text=True, check=True).stdout.strip()
            for what in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes else "")


def print_limits(limits: Limits) -> None:
    rows = [["copy, read + write", f"{limits.copy / 1e9:.1f} GB/s", limits.copy_method]]
    if limits.read:
        rows.append(["read", f"{limits.read / 1e9:.1f} GB/s", limits.read_method])
    if limits.update:
        rows.append(["update in place, read + write", f"{limits.update / 1e9:.1f} GB/s", limits.update_method])
    for dtype, peak in limits.matrix.items():
        rows.append([f"matrix product, {dtype}", f"{peak / 1e12:.2f} TFLOP/s", limits.matrix_method])
    table(f"Limits of this machine ({limits.device})", ["what", "measured", "by"], rows, right=("measured",))
    if limits.by_bytes:
        cells = [[size(n), *(f"{v / 1e9:.0f}" for v in (b.copy, b.read, b.update))] for n, b in limits.by_bytes.items()]
        heads = ["bytes moved at a time", "copy", "read", "update"]
        table("GB/s of what caches may hold", heads, cells, right=heads)


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """One table of a family's rows, and below it what is missing or wrong.

    "limit" is the part of the measured limit that was reached, "speed-up" that over the fewest threads of a sweep,
    "host" the time in which the host queues a step for a GPU, "memory" the peak during a step, "peak" that of all that
    a model holds, "cpu" the processor time of a step by all threads, "kept" what is held between forward and backward,
    "state" the bytes a parameter that an optimizer keeps, "vs best" how many times faster than the best candidate that
    is not ours, and "error" the part of the allowed error that was used.
    """
    shown = [row for row in rows if row.status != "missing"]
    # Latencies of small calls are not bounded by bandwidth.
    columns = {
        name: text
        for name, text in _COLUMNS.items()
        if any(text(r) for r in shown) and not (name in ("GB/s", "limit") and all(r.metric == "us" for r in shown))
    }
    swept = any(row.speedup for row in shown)
    cells: list[list[str]] = []
    for _, group in groupby(shown, key=lambda row: row.key):
        same_case = list(group)
        if cells:
            cells.append([""] * (1 + len(columns)))
        first = same_case[0]
        threads = f", {first.threads} thread{'s' * (first.threads != 1)}" if swept else ""
        cells.append([f"{first.case}, {first.dtype}, {first.direction}{threads}", *[""] * len(columns)])
        cells += [[f"  {row.candidate}", *(text(row) for text in columns.values())] for row in same_case]
    if cells:
        table(title, ["case", *columns], cells, right=list(columns))
    for line in remarks(rows):
        print(line)


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the table does not show: candidates that are missing, failed or wrong, or were not timed like the others."""
    lines = [f"{row.candidate}: missing, {row.reason}" for row in rows if row.status == "missing"]
    lines += [
        f"{row.candidate} in {row.case} {row.dtype} {row.direction}: {row.status.upper()}, not timed: {row.reason}"
        for row in rows
        if row.status in ("wrong", "failed")
    ]
    lines += [f"{row.candidate} in {row.case}: {row.reason}" for row in rows if row.status == "ok" and row.reason]
    lines += [
        f"{row.candidate} in {row.case} {row.dtype} {row.direction}: "
        + " ".join(["timed once"] * row.slow + [f"on {100 * row.part:.3g} % of the work, and scaled"] * (row.part < 1))
        for row in rows
        if row.seconds and (row.slow or row.part < 1)
    ]
    return list(dict.fromkeys(lines))


def _number(value: float | None) -> str:
    return f"{value:.3g}" if value is not None and value < 100 else f"{value:.0f}" if value is not None else ""


def _times(value: float | None) -> str:
    return f"{value:.2f}x" if value is not None else ""


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "median": lambda r: duration(r.seconds.median) if r.seconds else r.status.upper(),
    "spread": lambda r: f"{100 * r.seconds.spread:.0f} %" if r.seconds else "",
    "host": lambda r: duration(r.host_seconds) if r.host_seconds else "",
    "GB/s": lambda r: _number(r.gbps),
    "TFLOP/s": lambda r: _number(r.tflops),
    "tokens/s": lambda r: _number(r.tokens_per_second),
    "limit": lambda r: f"{r.limit_percent:.0f} %" if r.limit_percent else "",
    "memory": lambda r: size(r.extra_bytes) if r.extra_bytes is not None else "",
    "peak": lambda r: size(int(r.figures["peak"])) if r.figures.get("peak") else "",
    "cpu": lambda r: duration(r.figures["cpu"]) if r.figures.get("cpu") else "",
    "perplexity": lambda r: f"{r.figures['perplexity']:.2f}" if r.figures.get("perplexity") else "",
    "kept": lambda r: size(r.kept_bytes) if r.kept_bytes is not None else "",
    "state": lambda r: f"{r.state_bytes:.2f} B" if r.state_bytes is not None else "",
    "speed-up": lambda r: _times(r.speedup),
    "vs eager": lambda r: _times(r.vs_eager),
    "vs best": lambda r: _times(r.vs_best_other),
    "error": lambda r: f"{r.error_ratio:.2f}" if r.error_ratio is not None else "",
}
