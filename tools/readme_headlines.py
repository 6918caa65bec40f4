"""The README's figure and its table of measured rows, from files of `bigkernels bench --json`.

python tools/readme_headlines.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PICTURE = "docs/assets/headlines.png"
PICTURE_MARKS = re.compile(r"(<!-- picture:begin.*?-->\n).*?(<!-- picture:end -->)", re.S)
TABLE_MARKS = re.compile(r"(<!-- headlines:begin.*?-->\n).*?(<!-- headlines:end -->)", re.S)

GENERATION, MEMORY = "cpu-generation-peers-avx512", "cpu-memory-avx512"
TOKEN, TUNING = "decode B 1, context 512, 2 threads", "fine-tuning of 135 M parameters, B 4, S 1024"


class Headline(NamedTuple):
    """A row of a result file beside another candidate of the same case."""

    what: str
    file: str
    family: str
    case: str
    against: str
    ours: str = "bigkernels"
    backward: bool | None = False
    dtype: str = "bfloat16"


HEADLINES = (
    Headline("a token of SmolLM2-135M", GENERATION, "generation", TOKEN, "eager"),
    Headline("the same from a GGUF file, Q4_1", GENERATION, "generation", TOKEN, "llama.cpp Q4_1", "bigkernels gguf"),
    Headline("the same in 4 bits, head too", GENERATION, "generation", TOKEN, "llama.cpp Q4_0, 4-bit head",
             "bigkernels int4"),
    Headline("32 paragraphs embedded by MiniLM-L6", "cpu-encoders-avx512", "encoders",
             "MiniLM, 32 x mixed lengths, 2 threads", "openvino"),
    Headline("a step of fine-tuning 135 M parameters", MEMORY, "checkpointing", TUNING, "eager", backward=True),
    Headline("attention, 2048 tokens, D 128, forward and backward", "cpu-attention-amx", "attention", "S 2048, D 128",
             "builtin", backward=True),
    Headline("rms_norm, 4096 x 4096, forward and backward", "cpu-operators", "rms_norm", "4096x4096", "compile",
             backward=True),
    Headline("rope, 2048 tokens, forward and backward", "cpu-operators", "rope", "S 2048, heads 32/8, D 128", "compile",
             backward=True),
    Headline("cross entropy, 2048 x 128256, forward and backward", "cpu-operators", "cross_entropy", "2048x128256",
             "builtin", backward=True),
    Headline("AdamW, 20000 small tensors, a step", "cpu-optimizers-avx2", "optimizers", "AdamW, 20000 tensors",
             "builtin", backward=None, dtype="float32"),
)  # fmt: skip

NAMES = {"builtin": "PyTorch's fused function", "compile": "torch.compile", "eager": "PyTorch eager",
         "openvino": "OpenVINO, bf16"}  # fmt: skip


def content(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{file}.json").read_text())


def find(file: str, family: str, case: str, candidate: str, backward: bool | None, dtype: str) -> dict[str, Any]:
    """A row of a result file; KeyError where it has no such one that was measured."""
    for row in content(file)["rows"]:
        key = row["family"], row["case"], row["candidate"], row["backward"], row["dtype"], row["status"]
        if key == (family, case, candidate, backward, dtype, "ok"):
            return row
    raise KeyError(f"{file}.json has no measured row {(family, case, candidate, backward, dtype)}")


def time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def table() -> Iterator[str]:
    yield "| two cores, medians of one run | other | bigkernels | ratio | processor |"
    yield "|---|---|---|---|---|"
    for h in HEADLINES:
        ours, other = (find(h.file, h.family, h.case, name, h.backward, h.dtype) for name in (h.ours, h.against))
        seconds, against = ours["seconds"]["median"], other["seconds"]["median"]
        cpu = content(h.file)["machine"]["cpu"]
        model = re.sub(r"\(R\)| Processor", "", cpu["model"])
        yield (
            f"| {h.what} | {time(against)}, {NAMES.get(h.against, h.against)} | {time(seconds)} | "
            f"**{against / seconds:.2f}x** | {model}, {cpu['isa']} |"
        )


def picture(path: Path) -> None:
    """Bars: tokens a second of a real model, and time and memory of a step that trains it."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    def of(file, family, case, backward, names, value):
        rows = {label: find(file, family, case, name, backward, "bfloat16") for label, name in names.items()}
        return {label: value(row) for label, row in rows.items()}

    generation = {
        "PyTorch eager, bf16": "eager",
        "bigkernels, bf16": "bigkernels",
        "llama.cpp, Q4_1": "llama.cpp Q4_1",
        "bigkernels, same file": "bigkernels gguf",
        "llama.cpp, Q4_0 + 4-bit head": "llama.cpp Q4_0, 4-bit head",
        "bigkernels, int4 + head": "bigkernels int4",
    }
    tuning = {
        "PyTorch eager": "eager",
        "bigkernels": "bigkernels",
        "bigkernels, 8-bit activations\nand AdamW": "bigkernels int8, 8-bit AdamW",
    }
    panels = (
        (
            "Generation, tokens a second (longer is better)",
            "{:.0f}",
            of(GENERATION, "generation", TOKEN, False, generation, lambda r: r["tokens_per_second"]),
        ),
        (
            "Training step, seconds (shorter is better)",
            "{:.1f}",
            of(MEMORY, "checkpointing", TUNING, True, tuning, lambda r: r["seconds"]["median"]),
        ),
        (
            "Training step, peak GB (shorter is better)",
            "{:.2f}",
            of(MEMORY, "checkpointing", TUNING, True, tuning, lambda r: r["extra_bytes"] / 1e9),
        ),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 2.9), width_ratios=(1.2, 1, 1), layout="constrained")
    for axis, (title, form, bars) in zip(axes, panels, strict=True):
        colours = ["#3f51b5" if label.startswith("bigkernels") else "#b0b4c0" for label in bars]
        drawn = axis.barh(list(bars), list(bars.values()), color=colours, height=0.7)
        axis.bar_label(drawn, [form.format(v) for v in bars.values()], padding=3, fontsize=9)
        axis.set_title(title, fontsize=9, loc="left")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.tick_params(left=False, bottom=False, labelbottom=False, labelsize=9)
        axis.spines[:].set_visible(False)
    axes[2].tick_params(labelleft=False)  # those of the panel before it
    cpu = content(GENERATION)["machine"]["cpu"]
    about = "SmolLM2-135M, context 512; fine-tuning of a model of its size, 4 x 1024 tokens. Two cores of a Zen 4"
    figure.supxlabel(f"{about} ({cpu['model']}, {cpu['isa']}).", fontsize=8.5, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def main() -> None:
    picture(ROOT / PICTURE)
    text = README.read_text()
    shown = f"![Generation and training of SmolLM2-135M, PyTorch eager, llama.cpp and bigkernels]({PICTURE})\n"
    text = PICTURE_MARKS.sub(lambda m: m[1] + shown + m[2], text)
    made = "\n" + "\n".join(table()) + "\n\n"
    README.write_text(TABLE_MARKS.sub(lambda m: m[1] + made + m[2], text))


if __name__ == "__main__":
    main()
