"""What a plan says: numbers, a table, JSON and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

SCHEMA = 1  # raise it when a field of the JSON changes its meaning


@dataclass(frozen=True)
class PhasePlan:
    """A part of a step.

    Attributes:
        name: "forward", "backward" and "optimizer"; or "prefill", "first token" and "last token".
        peak: bytes held at most while it runs, everything included.
        flops: operations of matrix products, convolutions and attention.
        bytes: read and written by all operators.
        seconds: the least time that the limits of the machine allow for its operators, one after the other.
    """

    name: str
    peak: int
    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Choice:
    """One combination of policies, and what it needs. `problem` is why it could not be planned, or None."""

    checkpointing: str | None
    state_dtype: str | None
    patch: str
    peak: int
    seconds: float
    fits: bool
    problem: str | None = None

    def __str__(self) -> str:
        state = f", {self.state_dtype} states" if self.state_dtype else ""
        return f"checkpointing {self.checkpointing or 'none'}{state}, patched: {self.patch}"


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs. Sizes are in bytes, times in seconds.

    Attributes:
        model, mode, batch, seq, new_tokens, device, dtype, autocast, optimizer, state_dtype, checkpointing, patch: the
            setting.
        held: what lives on after the phase that makes it: "parameters", "buffers", "inputs"; in training "activations"
            (saved for backward), "logits", "gradients" and "optimizer state"; in inference "logits", "kv cache" and,
            patched on CPUs, "program": about what a language model's step program takes for values and tables.
        at_peak: what is held where most is, by the same names and "temporary".
        peak: the sum of that.
        phases: the parts of a step.
        flops, seconds: of a training step; of reading the prompt and making all new tokens.
        limits: what the times follow from: copy in bytes a second, matrix in FLOP a second by dtype.
        limit: bytes that the run may take, or None.
        choices: with a limit: combinations of policies that fit, by predicted time, then those that do not, by size.
        reason: with a limit that nothing fits: why.
    """

    model: str
    mode: str
    batch: int
    seq: int
    new_tokens: int
    device: str
    dtype: str
    autocast: str | None
    optimizer: str | None
    state_dtype: str | None
    checkpointing: str | None
    patch: str
    held: dict[str, int]
    at_peak: dict[str, int]
    peak: int
    phases: tuple[PhasePlan, ...]
    flops: int
    seconds: float
    limits: dict[str, Any]
    limit: int | None = None
    choices: tuple[Choice, ...] = field(default=())
    reason: str | None = None

    # ---- single numbers ---------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> int:
        return self.held.get("parameters", 0)

    @property
    def gradients(self) -> int:
        return self.held.get("gradients", 0)

    @property
    def optimizer_state(self) -> int:
        return self.held.get("optimizer state", 0)

    @property
    def activations(self) -> int:
        """What forward saves for backward, without the logits."""
        return self.held.get("activations", 0)

    @property
    def logits(self) -> int:
        return self.held.get("logits", 0)

    @property
    def kv_cache(self) -> int:
        """With all new tokens."""
        return self.held.get("kv cache", 0)

    @property
    def fits(self) -> bool | None:
        """Whether the setting fits the limit; None without one."""
        return None if self.limit is None else self.peak <= self.limit

    @property
    def best(self) -> Choice | None:
        """The fastest choice that fits."""
        return next((c for c in self.choices if c.fits), None)

    @property
    def tokens_per_second(self) -> float:
        """At most; of a training step those it reads, of inference the new ones, or those read where none are made."""
        count = self.seq if self.mode == "train" or not self.new_tokens else self.new_tokens
        return self.batch * count / self.seconds if self.seconds else 0.0

    # ---- ways out ---------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self, path: str | PathLike | None = None) -> str:
        """The plan as JSON, also written to `path`; `from_json` reads it."""
        text = json.dumps(self.as_dict(), indent=1)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls, text: str) -> MemoryPlan:
        """
        Raises:
            ValueError: it is of another schema.
        """
        report = json.loads(text)
        if report.get("schema") != SCHEMA:
            raise ValueError(
                f"bigkernels.planning.MemoryPlan: schema {report.get('schema')!r}; this version reads {SCHEMA}"
            )
        report["phases"] = tuple(PhasePlan(**p) for p in report["phases"])
        report["choices"] = tuple(Choice(**c) for c in report["choices"])
        return cls(**{f.name: report[f.name] for f in fields(cls)})

    def plot(self, path: str | PathLike) -> None:
        """Write stacked bars of what is held, as a picture of the kind that the name of `path` ends in.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from ._plot import write

        write(self, Path(path))

    def __str__(self) -> str:
        from .._terminal import plain_table

        return "\n".join(plain_table(title, columns, rows, right=right) for title, columns, rows, right in tables(self))

    def title(self) -> str:
        what = f"batch {self.batch}, sequence {self.seq}"
        if self.mode == "train":
            state = f" ({self.state_dtype} states)" if self.state_dtype else ""
            what += f", {self.optimizer or 'no optimizer'}{state}, checkpointing {self.checkpointing or 'none'}"
        elif self.new_tokens:
            what += f", {self.new_tokens} new tokens"
        cast = f" under {self.autocast} autocast" if self.autocast else ""
        return f"{self.model}, {self.mode} on {self.device}: {what}, {self.dtype}{cast}, patched: {self.patch}"


Table = tuple[str, list[str], list[list[str]], tuple[str, ...]]


def tables(plan: MemoryPlan) -> list[Table]:
    """The plan as tables: title, columns, rows, and the columns that are aligned to the right."""
    size, duration = _size, _duration
    sizes = {name: (plan.held.get(name, 0), plan.at_peak.get(name, 0)) for name in (*plan.held, *plan.at_peak)}
    rows = [[name, *map(size, both)] for name, both in sizes.items() if any(both)]
    rows.append(["together", "", size(plan.peak)])
    tables: list[Table] = [(plan.title(), ["what", "size", "at the peak"], rows, ("size", "at the peak"))]
    rows = [[p.name, size(p.peak), f"{p.flops / 1e12:.3g}", size(p.bytes), duration(p.seconds)] for p in plan.phases]
    columns = ["phase", "peak", "TFLOP", "moved", "at least"]
    rows.append(["together", size(plan.peak), f"{plan.flops / 1e12:.3g}", "", duration(plan.seconds)])
    tables.append((f"Phases; at most {plan.tokens_per_second:.3g} tokens/s", columns, rows, tuple(columns[1:])))
    if plan.limit is not None:
        verdict, advice = "fits" if plan.fits else "does not fit", plan.reason or f"Fastest that fits: {plan.best}"
        rows = [
            [
                c.checkpointing or "none",
                c.state_dtype or "",
                c.patch,
                size(c.peak) if c.peak else "",
                duration(c.seconds) if c.seconds else "",
                c.problem or ("yes" if c.fits else "no"),
            ]
            for c in plan.choices
        ]
        columns = ["checkpointing", "states", "patched", "peak", "at least", "fits"]
        tables.append(
            (f"Limit {size(plan.limit)}: the setting {verdict}. {advice}", columns, rows, ("peak", "at least"))
        )
    return tables


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
