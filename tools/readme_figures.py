"""Writes the tables between the figure marks of README.md from files that `bigkernels bench --json` made.

python tools/readme_figures.py benchmarks/results/*.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
MARKS = re.compile(r"(<!-- figures:begin.*?-->\n).*?(<!-- figures:end -->)", re.S)
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


def main() -> None:
    tables = ("\n".join(lines(json.loads(Path(path).read_text()))) for path in sys.argv[1:])
    text = "\n## Figures\n\n" + "\n\n".join(tables) + "\n\n"
    README.write_text(MARKS.sub(lambda m: m[1] + text + m[2], README.read_text()))


if __name__ == "__main__":
    main()
