"""Writes the tables of docs/ between their marks from files that `bigkernels bench --json` made.

python tools/readme_figures.py benchmarks/results/*.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
MARKS = re.compile(r"(<!-- figures:begin.*?-->\n).*?(<!-- figures:end -->)", re.S)
GENERATION = re.compile(r"(<!-- generation:begin.*?-->\n).*?(<!-- generation:end -->)", re.S)
DIRECTIONS = {False: "fwd", True: "fwd + bwd", None: "step"}
OTHERS = ("eager", "builtin", "compile")


def time(row: dict | None) -> str:
    if row is None or row["status"] != "ok":
        return "-"
    seconds = row["seconds"]["median"]
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def lines(content: dict) -> Iterator[str]:
    cpu, limits = content["machine"]["cpu"], content["limits"]
    yield f"`{content['command']}`, commit {content['commit'][:10]}, {content['date'][:10]}:"
    yield f"{cpu['model']} (level {cpu['isa']}),"
    yield f"{cpu['cores']} cores, copy bandwidth {limits['copy'] / 1e9:.1f} GB/s. Shared host: read the ratios."
    yield ""
    yield "| case | eager | builtin | torch.compile | bigkernels | vs eager | vs best other | of the limit |"
    yield "|---|---|---|---|---|---|---|---|"
    key = lambda r: (r["family"], r["case"], r["dtype"], r["backward"])  # noqa: E731
    for (family, case, dtype, backward), group in groupby(content["rows"], key):
        by_name = {row["candidate"]: row for row in group}
        ours = by_name.get("bigkernels")
        if ours is None or ours["status"] != "ok":
            continue
        limit = f"{ours['limit_percent']:.0f} %" if ours["limit_percent"] and ours["metric"] != "us" else "-"
        yield (
            f"| {family} {case}, {dtype}, {DIRECTIONS[backward]} | "
            + " | ".join(time(by_name.get(name)) for name in (*OTHERS, "bigkernels"))
            + f" | {ratio(ours['vs_eager'])} | {ratio(ours['vs_best_other'])} | {limit} |"
        )


_FIGURES = {"peak": lambda x: f"{x / 1e6:.0f} MB", "perplexity": "{:.2f}".format}


def generation(content: dict) -> Iterator[str]:
    """Tokens a second of every model in the cases that all of them are in, and what these come to as ratios."""
    cpu = content["machine"]["cpu"]
    yield f"`{content['command']}`, commit {content['commit'][:10]}, {content['date'][:10]}, {cpu['model']}"
    yield f"(level {cpu['isa']}), {cpu['cores']} cores. Tokens a second (in brackets per cent of the byte limit):"
    yield ""
    rows = {(row["case"], row["candidate"]): row for row in content["rows"] if row["status"] == "ok"}
    cases = [
        case
        for case in dict.fromkeys(case for case, _ in rows)
        if case.startswith(("prefill B", "decode B")) and "without" not in case
    ]
    names = dict.fromkeys(name for case, name in rows if case in cases)
    figures = {name: {} for name in names}
    for case in cases:
        for name in names:
            figures[name].update(rows.get((case, name), {}).get("figures", {}))
    known = {key: write for key, write in _FIGURES.items() if any(key in made for made in figures.values())}
    yield f"| | {' | '.join([*map(_short, cases), *known])} |"
    yield "|---" * (len(cases) + len(known) + 1) + "|"
    for name in names:
        cells = [_speed(rows.get((case, name))) for case in cases]
        cells += [write(figures[name][key]) if key in figures[name] else "" for key, write in known.items()]
        yield f"| {name} | {' | '.join(cells)} |"
    yield from ("", "| as ratios | measured |", "|---|---|")
    for bar in content["ratios"]:
        if bar["measured"] is not None:
            yield f"| {bar['name']} | {bar['measured']:.3g}{bar['unit']} |"


def _short(case: str) -> str:
    """Of "decode B 8, context 512, 2 threads": "decode, batch 8, context 512, 2 threads"; a batch of 1 goes unsaid."""
    return case.replace(" B 1,", ",").replace(" B ", ", batch ")


def _speed(row: dict | None) -> str:
    if row is None:
        return ""
    limit = f" ({row['limit_percent']:.0f} %)" if row["limit_percent"] else ""
    return f"{row['tokens_per_second']:.0f}{limit}"


def main() -> None:
    contents = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
    contents = [content for content in contents if isinstance(content, dict) and "machine" in content]
    of_generation = [content for content in contents if "ratios" in content]
    tables = ["\n".join(lines(content)) for content in contents if content not in of_generation]
    if tables:
        _write(DOCS / "figures.md", MARKS, "\n\n".join(tables))
    if of_generation:
        made = ("\n".join(generation(content)) for content in of_generation)
        _write(DOCS / "guide" / "generation.md", GENERATION, "\n\n".join(made))


def _write(path: Path, marks: re.Pattern, tables: str) -> None:
    path.write_text(marks.sub(lambda m: f"{m[1]}\n{tables}\n\n{m[2]}", path.read_text()))


if __name__ == "__main__":
    main()
