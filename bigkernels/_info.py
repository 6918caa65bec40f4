"""What this machine offers and what bigkernels can use of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from ._load import Library, cpu_library, cuda_library, triton_unavailable
from ._version import __version__
from .memory import workspaces
from .ops import OPERATORS
from .ops.registry import KERNEL_DTYPES
from .ops.routes import TABLE, routes

_PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "numpy")
# The features that each of the CPU kernels' ISA levels adds to the one before it, as /proc/cpuinfo names them.
_X86_FEATURES = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512_vnni": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"),
    "avx512": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16", "amx_int8"),
}
_ARM_FEATURES = {"dotprod": ("asimddp",)}
ISA_FEATURES = _ARM_FEATURES if platform.machine() == "aarch64" else _X86_FEATURES
_CPU_FEATURES = (*(f for features in ISA_FEATURES.values() for f in features), "avx512_fp16", "amx_fp16")


def info() -> dict:
    """Versions, processor, memory, GPUs, libraries, and the implementations of every operator.

    Returns:
        A dictionary that `json.dumps` accepts. `["operators"][op][device][dtype]` maps each implementation to None
        where it can run and to the reason where it cannot, in the order in which they are tried. `["programs"]` says
        whether models decode in step programs here, what memory these keep, and what became of each patched model of
        the process: its state, calls answered by the program and by the modules, and why. `["routes"]` lists
        who computes what on GPUs, for the newest of this machine or, where there is none, for each range of compute
        capabilities.
    """
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "memory": _memory(),
        "gpus": _gpus(),
        "libraries": _libraries(),
        "operators": _operators(),
        "programs": _programs(),
        "routes": _routes(),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "bigkernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _cpu() -> dict:
    fields = _cpuinfo()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "features": [f for f in _CPU_FEATURES if f in flags],
        "isa": _isa(),
        "isa_lacks": _lacking(flags),
        "BIGKERNELS_CPU_ISA": os.environ.get("BIGKERNELS_CPU_ISA"),
    }


def _lacking(flags: list[str]) -> dict[str, list[str]]:
    """What the CPU lacks of each ISA level, where it lacks something; empty where the system does not say."""
    lacks = {level: [f for f in needed if f not in flags] for level, needed in ISA_FEATURES.items()}
    return {level: missing for level, missing in lacks.items() if missing and flags}


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _isa() -> str | None:
    """The ISA level that the CPU kernels chose; None without the library, which implements the operator."""
    return torch.ops.bigkernels.cpu_isa() if cpu_library().reason is None else None


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> dict[str, int]:
    """Bytes; empty where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {"total": kilobytes["MemTotal"] * 1024, "available": kilobytes["MemAvailable"] * 1024}


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [
        {
            "name": p.name,
            "memory": p.total_memory,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
        }
        for p in properties
    ]


def _libraries() -> dict[str, dict]:
    """For each: whether it can be used, where it is, and why not."""
    triton = triton_unavailable()
    native = importlib.util.find_spec("bigkernels._native")
    return {
        "cpu": _library(cpu_library()),
        "cuda": _library(cuda_library()),
        "triton": {"loaded": triton is None, "path": None, "reason": triton},
        "native": {
            "loaded": native is not None,
            "path": native.origin if native else None,
            "reason": None if native else "only development builds have it",
        },
    }


def _library(library: Library) -> dict:
    path = str(library.path) if library.path else None
    return {"loaded": library.reason is None, "path": path, "reason": library.reason}


def _programs() -> dict:
    from .program import _encoder_stack as encoders
    from .program._state import living

    return {"reason": cpu_library().reason, "workspaces": workspaces(), "models": [*living(), *encoders.living()]}


def _routes() -> list[dict]:
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count() if _gpus() else 0)]
    rows = routes(max(gpus)) if gpus else TABLE
    return [asdict(row) for row in rows]


def _operators() -> dict:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        name: {
            device: {str(dtype).removeprefix("torch."): operator.refusals(device, dtype) for dtype in KERNEL_DTYPES}
            for device in devices
        }
        for name, operator in OPERATORS.items()
    }
