"""Tables and progress bars: by rich where it is installed, plain text otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

try:
    import rich.box
    import rich.console
    import rich.progress
    import rich.table
    import rich.text
except ImportError:
    rich = None

_FILE_WIDTH = 200  # of a table that goes to a file or a pipe, where nothing says how wide is too wide


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print a table; the columns named in `right` are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    if rich is None:
        print(plain_table(title, columns, cells, right=right), flush=True)
        return
    console = rich.console.Console(width=None if sys.stdout.isatty() else _FILE_WIDTH, highlight=False)
    made = rich.table.Table(title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in cells:
        made.add_row(*map(rich.text.Text, row))
    console.print(made)


def plain_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()
) -> str:
    """The table as text with aligned columns."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if n in right else c.ljust(w) for c, w, n in zip(cells, widths, columns, strict=True))
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join((title, line(columns), rule, *map(line, rows))) + "\n"


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show how many of `total` steps are done, on stderr; yields a function that announces the next step.

    Without rich, or where stderr is no terminal, each step is a line.
    """
    done = 0
    if rich is None or not sys.stderr.isatty():

        def advance(what: str) -> None:
            nonlocal done
            done += 1
            print(f"[{done}/{total}] {what}", file=sys.stderr, flush=True)

        yield advance
        return
    columns = (
        rich.progress.MofNCompleteColumn(), rich.progress.BarColumn(), rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(), rich.progress.TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(what: str) -> None:
            nonlocal done
            bar.update(task, completed=done, description=what)
            done += 1

        yield advance


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
