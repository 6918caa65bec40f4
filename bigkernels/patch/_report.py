"""What `patch` did and what it left alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Error(float):
    """The largest error of a kernel in a numerical check, relative to the largest value compared.

    Attributes:
        dtype: in which it was seen.
        eager: the error of the model's own code there, against the same float64.
    """

    dtype: torch.dtype
    eager: float

    def __new__(cls, value: float, dtype: torch.dtype, eager: float) -> Error:
        error = super().__new__(cls, value)
        error.dtype, error.eager = dtype, eager
        return error

    def __reduce__(self):
        return Error, (float(self), self.dtype, self.eager)

    def __str__(self) -> str:
        return f"{float(self):.1e} ({str(self.dtype).removeprefix('torch.')}; eager {self.eager:.1e})"


class Row(NamedTuple):
    """One place in the model.

    `what` is the kernel that computes it or the reason why it was left alone. `error` is the largest error of the
    numerical check, an `Error` with its dtype and that of the model's own code; None where nothing was compared.
    """

    path: str
    what: str
    error: float | None


@dataclass
class PatchReport:
    """The outcome of `patch`: `patched`, `inference` (what a kernel computes in calls without gradients alone, where it
    pays) and `skipped` are lists of `Row`; `str()` is a table with equal rows joined.
    """

    patched: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)
    inference: list[Row] = field(default_factory=list)
    programs: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def steps(self) -> list[Row]:
        """A row for each model that generates: its program, or why it has none, as far as that is known by now; it is
        looked for at the first call that can take it.
        """
        return [Row(path, steps.status(), None) for path, steps in self.programs.items()]

    def __str__(self) -> str:
        lines = _table("patched", self.patched) + _table("in inference", [*self.inference, *self.steps])
        lines += _table("skipped", self.skipped)
        return "\n".join(lines) if lines else "nothing to patch"


def _table(title: str, rows: list[Row]) -> list[str]:
    if not rows:
        return []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\b\d+\b", "*", row.path) or "(model)", row.what), []).append(row)
    cells = [("count", "module", "reason" if title == "skipped" else "kernel", "largest error")]
    for (path, what), members in groups.items():
        errors = [row.error for row in members if row.error is not None]
        path = members[0].path or "(model)" if len(members) == 1 else path
        worst = max(errors, default=None)
        shown = "-" if worst is None else str(worst) if isinstance(worst, Error) else f"{worst:.1e}"
        cells.append((str(len(members)), path, what, shown))
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    table = [f"{n:>{widths[0]}}  {path:<{widths[1]}}  {what:<{widths[2]}}  {error}" for n, path, what, error in cells]
    return [f"{title}: {len(rows)}", *("  " + line.rstrip() for line in table)]
