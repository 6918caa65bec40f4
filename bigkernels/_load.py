"""Finds and loads the compiled libraries, and remembers why one is missing."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Library:
    """A compiled library: where it is, or why it is not loaded."""

    path: Path | None
    reason: str | None


def _load(name: str) -> Library:
    path = Path(__file__).parent / f"libbigkernels_{name}.so"
    if not path.exists():
        # Left by setup.py where it built nothing; an unbuilt checkout has neither.
        record = path.with_name("_not_compiled.txt")
        return Library(None, record.read_text().strip() if record.exists() else f"{path.name} was not built")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return Library(path, f"{path.name} does not load: {error}")
    return Library(path, None)


@functools.cache
def cpu_library() -> Library:
    """The CPU kernels; loading registers them with the dispatcher."""
    return _load("cpu")


@functools.cache
def cuda_library() -> Library:
    """The CUDA kernels; the library loads beside a torch without CUDA too, which then never calls it."""
    return _load("cuda")


@functools.cache
def triton_unavailable() -> str | None:
    """Why Triton kernels cannot run in this process; None if they can."""
    return triton_missing() if torch.cuda.is_available() else "no CUDA device"


def triton_missing() -> str | None:
    """Why this installation cannot run Triton kernels, whatever the machine has; asks no driver."""
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
