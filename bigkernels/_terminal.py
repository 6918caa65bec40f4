"""Tables and progress bars: by rich where it is installed, plain text otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

try:
    import rich.box
    import rich.console
    import rich.progress
    import rich.table
    import rich.text
except ImportError:
    rich = None

DEVICE_HELP = "default: cuda where there is one, otherwise cpu"
_FILE_WIDTH = 200  # of a table that goes to a file or a pipe, where nothing says how wide is too wide


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print a table; the columns named in `right` are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    if rich is None:
        print(plain_table(title, columns, cells, right=right), flush=True)
        return
    console = rich.console.Console(width=None if sys.stdout.isatty() else _FILE_WIDTH, highlight=False)
    grid = rich.table.Table(title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD)
    for name in columns:
        grid.add_column(name, justify="right" if name in right else "left", no_wrap=name in right, overflow="fold")
    for row in cells:
        grid.add_row(*map(rich.text.Text, row))
    console.print(grid)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """The table as text with aligned columns."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if n in right else c.ljust(w) for c, w, n in zip(cells, widths, columns, strict=True))
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join((title, line(columns), rule, *map(line, rows))) + "\n"


class Steps:
    """A row of steps, each of which is announced when it begins. Here: one line a step, on stderr."""

    def __init__(self, total: int):
        self.total, self.begun = total, 0

    def begin(self, what: str) -> None:
        self.begun += 1
        print(f"[{self.begun}/{self.total}] {what}", file=sys.stderr, flush=True)

    def note(self, what: str) -> None:
        """Say what the current step is doing now; shown by a bar only."""


class _Bar(Steps):
    def __init__(self, total: int, bar: rich.progress.Progress):
        super().__init__(total)
        self.bar, self.task = bar, bar.add_task("", total=total)

    def begin(self, what: str) -> None:
        self.what = what
        self.bar.update(self.task, completed=self.begun, description=what)
        self.begun += 1

    def note(self, what: str) -> None:
        self.bar.update(self.task, description=f"{self.what}: {what}")


@contextmanager
def progress(total: int) -> Iterator[Steps]:
    """A progress bar over `total` steps, on stderr: lines without rich, or where stderr is no terminal."""
    if rich is None or not sys.stderr.isatty():
        yield Steps(total)
        return
    columns = (
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.description}", markup=False),
    )
    console = rich.console.Console(stderr=True)
    # What is printed meanwhile goes above the bar, unless it goes to a file.
    redirect = sys.stdout.isatty()
    with rich.progress.Progress(*columns, console=console, transient=True, redirect_stdout=redirect) as bar:
        yield _Bar(total, bar)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
