"""The table of mutants, as Markdown."""

from __future__ import annotations

import platform
import re
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path

import torch

from .operators import OPERATORS

LEVELS = ("avx2", "avx512", "interpreter")


def write_table(root: Path, reasons: dict[str, str], results: list[dict]) -> None:
    """Writes tools/mutants.md; reasons: why a mutant survives, by its name."""
    counts: dict[str, Counter] = defaultdict(Counter)
    kinds: dict[str, Counter] = defaultdict(Counter)
    hows, survivors = Counter(), {}
    for record in results:
        name, level = record["name"], record["level"]
        owner = next(key for key, operator in OPERATORS.items() if record["path"] in operator.files)
        killed = record["status"] == "killed"
        equivalent = not killed and reasons.get(name, "").startswith(("equivalent", "AMX"))
        for counter in (counts[owner], kinds[record["kind"]]):
            counter.update({(level, "all"): 1, (level, "killed"): killed, (level, "equivalent"): equivalent})
        if killed:
            hows[re.sub(r" \(.*", "", record["how"])] += 1
        else:
            survivors.setdefault(name, (record, {}))[1][level] = record["status"]
    total = sum(counts.values(), Counter())
    tried = len({record["name"] for record in results})

    def cell(counter: Counter, levels: tuple[str, ...] = LEVELS) -> str:
        every, killed, same = (
            sum(counter[level, what] for level in levels) for what in ("all", "killed", "equivalent")
        )
        if not every:
            return ""
        return f"{killed} of {every - same}" + (f" ({100 * killed / (every - same):.0f} %)" if len(levels) > 1 else "")

    def rows(table: dict[str, Counter]) -> list[str]:
        lines = [
            f"| {name} | {' | '.join(cell(c, (level,)) for level in LEVELS)} | {cell(c)} |" for name, c in table.items()
        ]
        return ["|---|---|---|---|---|", *lines]

    same = sum(total[level, "equivalent"] for level in LEVELS)
    lines = [
        "# Mutants of kernel lines",
        "",
        "Made by `tools/mutants.py`, which says what a mutant is and how they are tried. Not a part of CI.",
        "",
        f"{date.today()}, {_processor()}, torch {torch.__version__}: {tried} mutants, "
        f"{sum(total[level, 'all'] for level in LEVELS)} runs, of which "
        f"{sum(total[level, 'killed'] for level in LEVELS)} were noticed ("
        + ", ".join(f"{n} by {how}" for how, n in _words(hows))
        + f") and {same} change no result on this machine, by the reasons below. The tables leave these out.",
        "",
        "Bindings and headers that know no instruction-set level run at the highest one only. Lines for AMX are not"
        " mutated on a machine without it.",
        "",
        "| operator | AVX2 | AVX-512 | Triton, interpreted | together |",
        *rows({name: counts[name] for name in OPERATORS if name in counts} | {"**all**": total}),
        "",
        "| kind | AVX2 | AVX-512 | Triton, interpreted | together |",
        *rows(dict(sorted(kinds.items()))),
        "",
        "## Survivors",
        "",
        "| where | as it is, and the mutant | level | why |",
        "|---|---|---|---|",
    ]
    for name, (m, levels) in sorted(survivors.items(), key=lambda item: (item[1][0]["path"], item[1][0]["line"])):
        change = name.removeprefix(f"{m['path']}: ").replace("|", "\\|").replace(" -> ", "<br>")
        where = ", ".join(levels) + (" (not reached)" if set(levels.values()) == {"not reached"} else "")
        lines.append(f"| {m['path']}:{m['line']} | {change} | {where} | {reasons.get(name, '')} |")
    (root / "tools/mutants.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[10 : 10 + len(counts) + 4]))


def _words(hows: Counter) -> list[tuple[str, int]]:
    words = {"failed": "a failing test", "crash": "a crash", "no end": "running on"}
    return [(words.get(how, how), n) for how, n in hows.most_common()]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()
