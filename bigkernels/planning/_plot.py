"""Stacked bars of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from ._run import TAGS

if TYPE_CHECKING:
    from ._report import MemoryPlan

_COLOURS = dict(
    zip(
        TAGS,
        ("#14532d", "#6b8f71", "#7fb2e5", "#2a6fb0", "#f2a65a", "#b3261e", "#a678c8", "#c9c9c9", "#5c6bc0", "#9aa0a6"),
        strict=True,
    )
)


def write(plan: MemoryPlan, path: Path) -> None:
    """One bar for what is held at the peak, in parts, and one for the most that each phase holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9, 1.9 + 0.42 * (1 + len(plan.phases))), layout="constrained")
    axes = figure.add_subplot()
    left = 0.0
    for tag in TAGS:
        size = plan.at_peak.get(tag, 0) / 1e9
        if size:
            axes.barh(0, size, left=left, height=0.8, color=_COLOURS[tag], label=f"{tag} ({size:.3g} GB)")
            left += size
    for position, phase in enumerate(plan.phases, 1):
        bar = axes.barh(position, phase.peak / 1e9, height=0.8, color="#d8dcdf")
        axes.bar_label(bar, [f"{phase.peak / 1e9:.3g} GB"], padding=4, fontsize=8)
    if plan.limit is not None:
        axes.axvline(
            plan.limit / 1e9, color="#b3261e", linestyle="--", linewidth=1.2, label=f"limit ({plan.limit / 1e9:.3g} GB)"
        )
    axes.set_yticks(range(1 + len(plan.phases)), ["at the peak", *(p.name for p in plan.phases)], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(plan.peak, plan.limit or 0) / 1e9 or 1)
    axes.set_xlabel("GB")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.suptitle(plan.title(), fontsize=9, x=0.01, ha="left")
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
