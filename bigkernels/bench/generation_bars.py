"""What the generation family is held to: ratios of its rows, beside what they have to be and what is aimed at."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .._terminal import table
from .case import EAGER, OURS
from .engine import Row
from .generation import ALONE, BEFORE, BIG, EAGER32, GGUF, INT4, INT8, INT8_CACHE, LOOKUP, OURS32, Q4_0_HEAD, Q4_1


@dataclass(frozen=True)
class Bar:
    """One line: what was measured, None where a row is missing, and whether at least or at `most` the bar is asked."""

    name: str
    measured: float | None
    bar: float | None
    aim: float | None
    unit: str = "x"
    most: bool = False

    @property
    def met(self) -> bool | None:
        """None where nothing was measured, or nothing is asked."""
        if self.measured is None or self.bar is None:
            return None
        return self.measured <= self.bar if self.most else self.measured >= self.bar

    def as_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "met": self.met}

    def cells(self) -> tuple[str, ...]:
        """What the table shows."""
        passed = {None: "", True: "met", False: "MISSED"}[self.met]
        return (self.name, *(_text(value, self.unit) for value in (self.measured, self.bar, self.aim)), passed)


class _Rows:
    """The timed rows of a run, by what they are about; None where there is no such row."""

    def __init__(self, rows: Sequence[Row]):
        self.timed = {(row.case, row.candidate): row for row in rows if row.seconds}
        self.threads = sorted({row.threads for row in rows if row.threads}) or [1]

    def row(self, start: str, name: str, threads: int | None = None) -> Row | None:
        """Of a candidate in the case whose name starts so."""
        threads = threads or self.threads[-1]
        return next(
            (
                row
                for (case, candidate), row in self.timed.items()
                if case.startswith(start) and candidate == name and row.threads == threads
            ),
            None,
        )

    def decode(self, name: str, context: int, threads: int | None = None, batch: int = 1) -> Row | None:
        plural = "s" if (threads or self.threads[-1]) > 1 else ""
        return self.row(
            f"decode B {batch}, context {context}, {threads or self.threads[-1]} thread{plural}", name, threads
        )


def bars(rows: Sequence[Row], quick: bool = False) -> list[Bar]:
    """All of them, from the rows of a run; `quick` as in its settings, whose contexts are an eighth."""
    part = 8 if quick else 1
    short, middle, long = 64 // part, 512 // part, 4096 // part
    measured = _Rows(rows)
    prompt = f"prefill B 1, {middle} tokens"
    bars = []
    for count in measured.threads:
        with_threads = f"{count} thread{'s' * (count > 1)}"
        bars += [
            Bar(
                f"the GGUF's codes against llama.cpp, {with_threads}",
                _ratio(measured.decode(GGUF, middle, count), measured.decode(Q4_1, middle, count)),
                1.8,
                2.0,
            ),
            Bar(
                f"int4 and head against llama.cpp's Q4_0 and 4-bit head, {with_threads}",
                _ratio(measured.decode(INT4, middle, count), measured.decode(Q4_0_HEAD, middle, count)),
                1.3,
                1.5,
            ),
        ]
    narrow, wide = measured.decode(OURS, middle), measured.decode(OURS32, middle)
    bars += [
        Bar("bfloat16 decoding against eager", _ratio(narrow, measured.decode(EAGER, middle)), 2.6, None),
        Bar("bfloat16 decoding, of the byte limit", _limit(narrow), None, 80, " %"),
        Bar("float32 decoding against eager", _ratio(wide, measured.decode(EAGER32, middle)), 2.4, None),
        Bar("float32 decoding, of the byte limit", _limit(wide), 70, None, " %"),
    ]
    for name, bar in ((OURS, 1.2), (INT4, 1.4), (INT8, 1.4), (OURS32, 1.5)):
        before = measured.row(prompt, BEFORE[name])
        bars.append(
            Bar(
                f"prefill, {_format(name)}, against the baseline", _ratio(measured.row(prompt, name), before), bar, None
            )
        )
    quantized, one = measured.row(prompt, INT4), measured.decode(INT4, short)
    batched = _ratio(measured.decode(INT4, short, batch=8), one)
    bars += [
        Bar(
            "prefill, the GGUF's codes, against llama.cpp",
            _ratio(measured.row(prompt, GGUF), measured.row(prompt, Q4_1)),
            7,
            None,
        ),
        Bar("prefill, int4", quantized.tokens_per_second if quantized else None, None, 5000, " tokens/s"),
        Bar("tokens a second of batch 8 against 1, int4", None if batched is None else 8 * batched, 4, 6),
        Bar("context 3900 against 64, bfloat16", _more(measured, OURS, short, long), 3.5, 2.8, " ms", most=True),
        Bar(
            "context 3900 against 64, int8 cache", _more(measured, INT8_CACHE, short, long), None, 1.4, " ms", most=True
        ),
    ]
    for name in (OURS, GGUF):
        copying = (measured.row("copying", name + suffix) for suffix in (LOOKUP, ""))
        taken = (measured.row("decode, one core taken", name + suffix) for suffix in ("", ALONE))
        bars += [
            Bar(f"prompt lookup, {_format(name)}", _ratio(*copying), 1.5, 2.0),
            Bar(f"one core taken, against one thread alone, {_format(name)}", _ratio(*taken), 0.8, 0.95),
        ]
    few = {case: "operator alone, " + case for case in ("int4, 1 x", "int4, 16 x", "int8, 1 x", "16 x")}
    bars += [
        Bar("a Llama of 1 B, int4, of the byte limit", _limit(measured.row("Llama 1 B, decode", BIG)), 75, 90, " %"),
        Bar("int4 linear, 1 token, of reading", _limit(measured.row(few["int4, 1 x"], OURS)), 85, None, " %"),
        Bar(
            "int4 linear, 16 tokens, against the baseline",
            _ratio(measured.row(few["int4, 16 x"], OURS), measured.row(few["int4, 16 x"], BEFORE[OURS])),
            2.5,
            None,
        ),
        Bar(
            "bfloat16 linear, 16 tokens, against F.linear",
            _ratio(measured.row(few["16 x"], OURS), measured.row(few["16 x"], EAGER)),
            1.8,
            None,
        ),
        Bar("int8 linear, 1 token, of reading", _limit(measured.row(few["int8, 1 x"], OURS)), 80, None, " %"),
        Bar("perplexity added by the arithmetic, int4", _added(quantized), 0.5, 0.3, " %", most=True),
        Bar(
            "perplexity added by the arithmetic, the GGUF's codes",
            _added(measured.row(prompt, GGUF)),
            0.5,
            0.3,
            " %",
            most=True,
        ),
    ]
    return bars


def print_bars(rows: Sequence[Row], quick: bool = False) -> None:
    """The table of all lines that were measured."""
    lines = [bar.cells() for bar in bars(rows, quick) if bar.measured is not None]
    if lines:
        table("generation: ratios", ["what", "measured", "bar", "aim", ""], lines, right=("measured", "bar", "aim"))


def _ratio(one: Row | None, other: Row | None) -> float | None:
    """How many times faster the first is."""
    return other.seconds.median / one.seconds.median if one and other else None


def _limit(row: Row | None) -> float | None:
    return row.limit_percent if row else None


def _more(found: _Rows, name: str, short: int, long: int) -> float | None:
    """Milliseconds that a token takes more behind 3900 tokens than behind 64."""
    one, other = found.decode(name, short), found.decode(name, long)
    if not one or not other:
        return None
    return 1e3 * (other.seconds.median - one.seconds.median) * (3900 - 64) / (4096 - 64)


def _added(row: Row | None) -> float | None:
    """Per cent of perplexity beyond that of the same codes in float32."""
    whole = row.figures.get("perplexity of the modules in float32") if row else None
    return 100 * (row.figures["perplexity"] / whole - 1) if whole else None


def _format(name: str) -> str:
    return {OURS: "bfloat16", GGUF: "the GGUF's codes"}.get(name) or name.removeprefix(OURS).strip()


def _text(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.0f}{unit}" if abs(value) >= 100 else f"{value:.3g}{unit}"
