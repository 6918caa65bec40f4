"""How the demo shows itself: the tables, the last line, and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._terminal import table
from .measure import VARIANTS, Generation, Training, ratio


def dtype_name(training: Training) -> str:
    return str(training.dtype).removeprefix("torch.")


def print_speed_and_memory(trainings: Sequence[Training], generation: Generation) -> None:
    rows = []
    for t in trainings:
        for name in VARIANTS:
            losses, working = t.losses[name], t.working[name]
            steps = str(len(losses))
            rows.append(
                (
                    f"fine-tuning, {dtype_name(t)}, {name}",
                    steps,
                    f"{losses[0]:.3f}",
                    f"{losses[-1]:.3f}",
                    f"{t.speed[name]:.1f}",
                    _times(name, t.speed),
                    _megabytes(working),
                    _megabytes(t.resting + working),
                )
            )
    for name in VARIANTS:
        rows.append(
            (
                f"greedy generation, float32, {name}",
                "",
                "",
                "",
                f"{generation.speed[name]:.1f}",
                _times(name, generation.speed),
                "",
                "",
            )
        )
    columns = ("", "steps", "first loss", "last loss", "tokens/s", "ratio", "memory of a step", "in all")
    table("Speed and memory", columns, rows, right=columns[1:])
    print(
        "tokens/s: in the fastest step, in the fastest of three generations; memory of a step: what torch\n"
        "allocates at most while it runs, gradients included; in all: plus weights and optimizer\n"
    )


def gain(generation: Generation, trainings: Sequence[Training], passed: bool) -> str:
    """One line that says what was gained."""
    parts = []
    for t in trainings:
        parts.append(
            f"{ratio(t.speed):.2f}x the training speed and {ratio(t.working):.2f}x the memory of a step in "
            f"{dtype_name(t)}"
        )
    parts.append(f"{ratio(generation.speed):.2f}x the generation speed")
    result = "the results agree" if passed else "THE RESULTS DO NOT AGREE"
    return f"bigkernels.patch against eager: {', '.join(parts)}; {result}."


def _times(variant: str, speed: dict[str, float]) -> str:
    return f"{ratio(speed):.2f}x" if variant == "patched" else ""


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def figure(path: Path, trainings: Sequence[Training], generation: Generation) -> None:
    """Write a PNG: the loss curves of each run, the speed bars and the memory of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(VARIANTS, ("#9aa5b1", "#1f6fb2"), strict=True))
    panels = len(trainings) + 2
    columns = 2 if panels == 4 else panels
    fig, grid = plt.subplots(
        panels // columns,
        columns,
        figsize=(4.8 * columns, 3.8 * (panels // columns)),
        layout="constrained",
        squeeze=False,
    )
    axes = grid.flat
    for axis, training in zip(axes, trainings, strict=False):
        steps = range(1, len(training.losses["eager"]) + 1)
        axis.plot(steps, training.losses["eager"], color=colours["eager"], linewidth=5, label="eager")
        axis.plot(
            steps,
            training.losses["patched"],
            color=colours["patched"],
            linewidth=1.5,
            marker="o",
            markersize=3,
            label="patched",
        )
        axis.set(title=f"Fine-tuning, {dtype_name(training)}", xlabel="step", ylabel="loss (nats per token)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    speeds = {f"train\n{dtype_name(t)}": t.speed for t in trainings} | {"generate\nfloat32": generation.speed}
    ratios = {group: {"eager": 1.0, "patched": ratio(values)} for group, values in speeds.items()}
    notes = {group: {v: f"{values[v]:.0f}/s" for v in VARIANTS} for group, values in speeds.items()}
    _bars(axes[len(trainings)], ratios, notes, colours, "Speed, eager = 1 (labels: tokens per second)")
    memory = {dtype_name(t): {v: t.working[v] / 1e6 for v in VARIANTS} for t in trainings}
    notes = {group: {v: f"{values[v]:.0f}" for v in VARIANTS} for group, values in memory.items()}
    _bars(axes[panels - 1], memory, notes, colours, "Memory of a step (MB)")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _bars(axis, groups, notes, colours, title) -> None:
    for offset, variant in zip((-0.2, 0.2), VARIANTS, strict=True):
        bars = axis.bar(
            [i + offset for i in range(len(groups))],
            [values[variant] for values in groups.values()],
            0.38,
            color=colours[variant],
            label=variant,
        )
        axis.bar_label(bars, [note[variant] for note in notes.values()], padding=2, fontsize=9)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_title(title)
    axis.margins(y=0.2)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend()
