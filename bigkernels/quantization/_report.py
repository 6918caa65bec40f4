"""What `quantize` says about each layer."""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Row(NamedTuple):
    """One layer: what became of it, its bytes before and after, and the error of the weight relative to its size (root
    mean squares); None where it was skipped or has no values (meta device).
    """

    path: str
    what: str
    before: int
    after: int
    error: float | None


@dataclass
class QuantizeReport:
    """The outcome of `quantize`: `quantized` and `skipped` are lists of `Row`; `str()` joins equal rows."""

    quantized: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for title, rows in (("quantized", self.quantized), ("skipped", self.skipped)):
            groups = collections.defaultdict(list)
            for row in rows:
                groups[re.sub(r"\b\d+\b", "*", row.path), re.sub(r"\b\d+\b", "*", row.what)].append(row)
            if rows:
                before, after = (sum(getattr(row, name) for row in rows) for name in ("before", "after"))
                lines.append(f"{title}: {len(rows)}, {_bytes(before)} -> {_bytes(after)}")
            for (path, _), members in groups.items():
                errors = [row.error for row in members if row.error is not None]
                error = f", weight error up to {max(errors):.1e}" if errors else ""
                lines.append(f"  {len(members):>4}  {path}: {members[0].what}{error}")
        return "\n".join(lines) if lines else "no linear layers"

    def skip(self, path: str, reason: str, nbytes: int) -> None:
        """Note a layer that is left alone."""
        self.skipped.append(Row(path, reason, nbytes, nbytes, None))


def _bytes(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n} B"
