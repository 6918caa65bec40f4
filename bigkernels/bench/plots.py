"""Bar charts of a run, one PNG a family, made from the JSON document."""

# mypy: ignore-errors

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .case import BUILTIN, COMPILE, EAGER, OURS, OURS_COMPILED, direction
from .families import FAMILIES

_COLOURS = {EAGER: "#9aa0a6", BUILTIN: "#7fb2e5", COMPILE: "#f2a65a", OURS: "#2e8b57", OURS_COMPILED: "#14532d"}
_PEER_COLOUR = "#a678c8"
_UNITS = {
    "GB/s": "GB/s of the bytes that have to move",
    "us": "microseconds a call (less is better)",
    "tokens/s": "tokens a second",
    "TFLOP/s": "TFLOP/s",
}
_FIELDS = {"GB/s": "gbps", "tokens/s": "tokens_per_second", "TFLOP/s": "tflops"}
_LOG_RANGE = 30.0  # largest by smallest value from which on a linear axis hides the small ones
_FAR = 3.0  # a limit so many times the longest bar is not drawn: it would leave no room for the bars
_BAR = 0.24  # inches


def write(document: dict, folder: Path) -> list[Path]:
    """Write `<family>.png` for each family of the document into `folder`, and of a sweep of threads
    `<family>-threads.png`; returns the paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for family in dict.fromkeys(row["family"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["family"] == family and row["seconds"]]
        if rows:
            paths.append(folder / f"{family}.png")
            _figure(family, rows, document).savefig(paths[-1], dpi=110)
        if any(row.get("speedup") for row in rows):
            paths.append(folder / f"{family}-threads.png")
            _sweep(family, [row for row in rows if row["speedup"]], document).savefig(paths[-1], dpi=110)
    return paths


def value(row: dict) -> float:
    """What the bar of a row shows."""
    if row["metric"] == "us":
        return row["seconds"]["median"] * 1e6
    return row[_FIELDS[row["metric"]]]


def _figure(family: str, rows: list[dict], document: dict) -> Figure:
    kinds = dict.fromkeys((row["backward"], row["metric"]) for row in rows)
    panels = [
        [row for row in rows if (row["backward"], row["metric"]) == kind]
        for kind in sorted(kinds, key=lambda kind: (False, True, None).index(kind[0]))
    ]
    lines = max(len(part) + len(list(groupby(part, key=_case))) for part in panels)
    height = 1.9 + _BAR * lines
    figure = Figure(figsize=(7.5 * len(panels), height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.85 / height))
    machine, limits = document["machine"], document["limits"]
    cpu = machine["cpu"]
    where = machine["gpus"][0]["name"] if limits["device"] == "cuda" else cpu["model"]
    threads = "" if limits["device"] == "cuda" else f", {cpu['threads']} threads, ISA {cpu['isa']}"
    title = FAMILIES.get(family, family)
    figure.suptitle(title[0].upper() + title[1:], x=0.01, y=1 - 0.08 / height, ha="left", va="top", weight="bold")
    about = f"{where}{threads}, torch {machine['versions']['torch']}, {document['date'][:10]}"
    figure.text(0.01, 1 - 0.36 / height, about, fontsize=8, va="top", color="#555555")
    scales = {row["metric"]: _scale([r for r in rows if r["metric"] == row["metric"]]) for row in rows}
    for axes, part in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, part, scales[part[0]["metric"]])
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper left",
        bbox_to_anchor=(0.005, 1 - 0.52 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )
    return figure


class _Scale(NamedTuple):
    """The axis of all panels that show one metric, so that bars of forward and backward can be compared."""

    logarithmic: bool
    begin: float
    end: float
    most: float  # limits above it are not drawn


def _scale(rows: Sequence[dict]) -> _Scale:
    values = [value(row) for row in rows]
    logarithmic = max(values) / min(values) > _LOG_RANGE
    most = math.inf if logarithmic else _FAR * max(values)
    marks = [limit for limit in map(_limit, rows) if limit and limit < most]
    begin = min(values) / 3 if logarithmic else 0.0
    return _Scale(logarithmic, begin, max(values + marks) * (4 if logarithmic else 1.25), most)


def _panel(axes: Axes, rows: Sequence[dict], scale: _Scale) -> None:
    """Horizontal bars, grouped by case; a dashed mark at the limit of each case."""
    axes.set_xscale("log" if scale.logarithmic else "linear")
    position, ticks, labels = 0.0, [], []
    for _, group in groupby(rows, key=_case):
        group = list(group)
        top = position
        for row in group:
            colour = _COLOURS.get(row["candidate"], _PEER_COLOUR)
            bar = axes.barh(
                position, value(row), height=0.85, color=colour, label=f"{row['candidate']}, {row['metric']}"
            )
            # Above the mark of the limit, with a background that interrupts it.
            text = {"fontsize": 8, "zorder": 5, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.6}}
            axes.bar_label(bar, [_label(row)], padding=4, **text)
            position += 1
        ticks.append((top + position - 1) / 2)
        threads = f", threads: {group[0]['threads']}" if group[0].get("speedup") else ""
        labels.append(f"{group[0]['case']}\n{group[0]['dtype']}{threads}")
        limit = _limit(group[0])
        if limit and limit < scale.most:
            unit = group[0]["metric"]
            line = {"color": "#b3261e", "linestyle": "--", "linewidth": 1.2}
            axes.plot([limit] * 2, [top - 0.5, position - 0.5], label=f"measured limit, {unit}", **line)
        position += 1
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(position - 1, -1)
    axes.set_xlim(scale.begin, scale.end)
    percent = " (per cent of the limit)" if any(map(_limit, rows)) else ""
    axes.set_xlabel(_UNITS[rows[0]["metric"]] + percent + (", logarithmic" if scale.logarithmic else ""), fontsize=9)
    axes.set_title(direction(rows[0]["backward"]), fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _sweep(family: str, rows: list[dict], document: dict) -> Figure:
    """A panel for each candidate: the speed-up of each case over the fewest threads, beside the ideal."""
    counts = sorted({row["threads"] for row in rows})
    candidates = list(dict.fromkeys(row["candidate"] for row in rows))
    figure = Figure(figsize=(5 * len(candidates), 5.5), layout="constrained")
    cpu = document["machine"]["cpu"]
    figure.suptitle(f"{FAMILIES.get(family, family)}, {cpu['model']}, ISA {cpu['isa']}", fontsize=10)
    panels = figure.subplots(1, len(candidates), squeeze=False, sharey=True)[0]
    for axes, candidate in zip(panels, candidates, strict=True):
        axes.plot(counts, [n / counts[0] for n in counts], color="#555555", linestyle="--", label="ideal")
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["candidate"] == candidate:
                name = f"{row['case']}, {row['dtype']}, {direction(row['backward'])}"
                lines.setdefault(name, {})[row["threads"]] = row["speedup"]
        for name, line in lines.items():
            axes.plot(list(line), list(line.values()), marker="o", markersize=3, label=name)
        axes.set_xticks(counts)
        axes.set_xlabel("threads")
        axes.set_title(candidate, fontsize=10, loc="left")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"times as fast as with {counts[0]}")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", fontsize=7, frameon=False, ncols=2)
    return figure


def _case(row: dict) -> tuple[str, str, int]:
    return row["case"], row["dtype"], row.get("threads", 0)


def _limit(row: dict) -> float | None:
    """The value that the machine's limits allow; None for latencies, which they do not bound."""
    if row["metric"] == "us" or not row["limit_percent"]:
        return None
    return value(row) * 100 / row["limit_percent"]


def _label(row: dict) -> str:
    shown = value(row)
    number = f"{shown:.3g}" if shown < 1000 else f"{shown:,.0f}"
    return f"{number} ({row['limit_percent']:.0f} %)" if _limit(row) else number
