"""`bigkernels formats`: a pretrained model in every weight format: perplexity, size, speed and memory of each."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import patch, quantize
from .._assets import Unavailable, require_extras
from .._memory import reuse_memory
from .._terminal import progress, table
from ..bench.memory import extra_peak
from ..quantization import Format, Int4
from . import Input, _machine, _real_input
from .measure import perplexity, random_batches, windows

# What stands for each row: None for the model as it is, in bfloat16.
FORMATS: dict[str, str | Format | None] = {
    "bfloat16, eager": None,
    "bfloat16": None,
    "int8": "int8",
    "q8_0": "q8_0",
    "int8-dynamic": "int8-dynamic",
    "fp8": "fp8",
    "q4_1": "q4_1",
    "nf4": "nf4",
    "fp4": "fp4",
    "int4, rtn": Int4(64, "rtn"),
    "int4, hqq": Int4(64, "hqq"),
    "int4, gptq": Int4(64, "gptq"),
    "int4, awq": Int4(64, "awq"),
}
EAGER = "bfloat16, eager"
COLUMNS = ("weights", "perplexity", "file", "quantized in", "prefill", "decode", "peak memory")


@dataclass
class Row:
    """One format: perplexity in float32 arithmetic (nothing but the weights differs), bytes of the file and of memory
    at its peak in a prefill, seconds that quantizing took, and tokens a second.
    """

    name: str
    perplexity: float = 0.0
    file: int = 0
    quantized: float = 0.0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: int = 0

    def cells(self) -> tuple[str, ...]:
        return (
            self.name,
            f"{self.perplexity:.2f}",
            f"{self.file / 1e6:.0f} MB",
            f"{self.quantized:.1f} s" if self.quantized else "",
            f"{statistics.median(self.prefill):.0f} tokens/s",
            f"{statistics.median(self.decode):.1f} tokens/s",
            f"{self.peak / 1e6:.0f} MB",
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "SmolLM2-135M-Instruct in bfloat16 and in every weight format: perplexity on held-out Shakespeare, size of the "
        "file, speed of prefill and decode, peak memory. All but the first row are patched; GPTQ and AWQ see other "
        "plays. Exit code 2: something is missing and cannot be fetched."
    )
    parser.add_argument("--windows", type=int, default=24, help="of held-out text (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window and prompt (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded after a short prompt (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, in turn (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=FORMATS, metavar="ROW", help=f"some of: {'; '.join(FORMATS)}")
    parser.add_argument(
        "--integers",
        action="store_true",
        help="another table: perplexity by floats, and by the step program's integers",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> int:
    """Run the comparison; returns the exit code."""
    try:
        require_extras()
        given = _real_input()
    except Unavailable as error:
        print(f"bigkernels formats: {error}", file=sys.stderr)
        return 2
    reuse_memory()
    if args.integers:
        from . import rounding

        columns: Sequence[str] = rounding.COLUMNS
        rows: Sequence[Any] = rounding.compare(given, args)
    else:
        columns, rows = COLUMNS, compare(given, args)
    if args.markdown:
        lines = [columns, ["---"] * len(columns), *(row.cells() for row in rows)]
        print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    else:
        table(f"SmolLM2-135M-Instruct on {_machine(torch.device('cpu'))}", columns, [row.cells() for row in rows])
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        print(f"wrote {args.json}")
    return 0


def compare(given: Input, args: argparse.Namespace) -> list[Row]:
    """The rows, from a model in float32 and its texts."""
    chosen = {name: FORMATS[name] for name in args.only or FORMATS}
    held_out = windows(given.held_out_ids, args.windows, args.length)
    calibration = list(random_batches(given.training_ids, 32, 1, args.length))
    rows, models = [], {}
    with progress(len(chosen) + 1) as steps:
        for name, config in chosen.items():
            steps.begin(name)
            row = Row(name)
            model = copy.deepcopy(given.model)
            if config is not None:
                begin = time.perf_counter()
                quantize(model, config, calibration=calibration)
                row.quantized = time.perf_counter() - begin
            row.perplexity = perplexity(model, held_out)
            models[name] = model.to(torch.bfloat16).eval()
            if name != EAGER:
                patch(models[name])
            row.file = _file_size(models[name])
            rows.append(row)
        steps.begin("timing")
        prompt, start = given.held_out_ids[None, : args.length], given.prompt
        for number in range(-1, args.rounds):  # the first does not count
            for row in rows:
                seconds = _seconds(_prefill(models[row.name], prompt))
                times = _decode(models[row.name], start, args.tokens)
                if number >= 0:
                    row.prefill.append(prompt.numel() / seconds)
                    row.decode.append((len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0)
        for row in rows:
            held = {t.data_ptr(): t.nbytes for t in (*models[row.name].parameters(), *models[row.name].buffers())}
            row.peak = sum(held.values()) + extra_peak(_prefill(models[row.name], prompt), "cpu")
    return rows


def _prefill(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode():
            return model(input_ids=ids, logits_to_keep=1, use_cache=True)

    return step


def _decode(model: Any, ids: Tensor, tokens: int) -> list[float]:
    """When each new token was there: from the first on, nothing but decoding."""
    from transformers import StoppingCriteriaList

    times = []

    def note(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        times.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    model.generation_config.eos_token_id = None  # nothing ends the text early
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            stopping_criteria=StoppingCriteriaList([note]),
        )
    return times


def _seconds(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _file_size(model: nn.Module) -> int:
    from safetensors.torch import save_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, str(path))
        return path.stat().st_size
