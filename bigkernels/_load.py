"""Finds and loads the compiled libraries, and remembers why one is missing."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

_OLDEST_GPU = (7, 5)  # what CMakeLists.txt builds for


@dataclass(frozen=True)
class Library:
    """A compiled library: where it is, or why it is not loaded."""

    path: Path | None
    reason: str | None


def _load(name: str) -> Library:
    path = Path(__file__).parent / f"libbigkernels_{name}.so"
    if not path.exists():
        # Left by setup.py where it built nothing, or not this one; an unbuilt checkout has neither.
        records = (path.with_name(r) for r in ("_not_compiled.txt", f"_{name}_not_compiled.txt"))
        reasons = [record.read_text().strip() for record in records if record.exists()]
        return Library(None, reasons[0] if reasons else f"{path.name} was not built")
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
def cuda_unavailable() -> str | None:
    """Why CUDA kernels cannot run in this process; None if they can. Asks the driver."""
    if reason := cuda_library().reason:
        return reason
    if not torch.cuda.is_available() or not torch.cuda.device_count():
        return "no CUDA device"
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < _OLDEST_GPU:
        return f"a GPU here has compute capability {oldest[0]}.{oldest[1]}; the CUDA kernels need 7.5"
    return None


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
