"""`bigkernels formats --integers`: what rounding tokens to 8 bits costs, where the step program multiplies integers."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import load_gguf, patch, quantize
from .._assets import model_file
from .._terminal import progress
from ..quantization import Format, Int4
from . import Input
from .measure import perplexity, windows

AT_ONCE = 64  # tokens of a call: the program's
COLUMNS = ("weights", "perplexity, floats", "perplexity, program", "difference")


@dataclass
class Row:
    """One model: perplexity of its modules in float32, a window at once, and of these weights in bfloat16, where tokens
    are rounded: patched, and through the cache, `AT_ONCE` tokens a call.
    """

    name: str
    floats: float
    program: float

    def cells(self) -> tuple[str, ...]:
        return (
            self.name,
            f"{self.floats:.3f}",
            f"{self.program:.3f}",
            f"{100 * (self.program / self.floats - 1):+.2f} %",
        )


def _quantized(config: str | Format, **options: Any) -> Callable[[Input], nn.Module]:
    def make(given: Input) -> nn.Module:
        model = copy.deepcopy(given.model)
        quantize(model, config, **options)
        return model

    return make


_ALL = {"skip": (), "embeddings": True}
MODELS: dict[str, Callable[[Input], nn.Module]] = {
    "plain": lambda given: copy.deepcopy(given.model),
    "the GGUF file's codes": lambda given: load_gguf(model_file()),
    "int4 in groups of 64": _quantized(Int4(64)),
    "int4 in groups of 64, head too": _quantized(Int4(64), **_ALL),
    "int8, head too": _quantized("int8", **_ALL),
}


def compare(given: Input, args: argparse.Namespace, names: Iterable[str] = MODELS) -> list[Row]:
    """A row for each model, on held-out windows."""
    held_out, rows, names = windows(given.held_out_ids, args.windows, args.length), [], list(names)
    with progress(len(names)) as steps:
        for name in names:
            steps.begin(name)
            model = MODELS[name](given).eval()
            floats = perplexity(model, held_out)
            patch(model.to(torch.bfloat16))
            rows.append(Row(name, floats, perplexity(model, held_out, AT_ONCE)))
    return rows
