"""What the machine can do at most: bandwidth of copying, reading and updating in place, and matrix products by dtype.

A development build measures them with its own loops (`bigkernels._native`). Otherwise torch does, and the matrix figure
is then what torch achieves, which may be well below what the hardware could, as may its matrix times a vector that
reading is measured by: within a few per cent of our loop on an Intel machine, two thirds of it on an AMD one.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch

from .timing import CpuTimer, CudaTimer

_LARGE = 256 * 2**20  # bytes moved at a time, which no cache holds
_SMALLER = tuple(2**n for n in (18, 20, 22, 24, 26))  # which some caches hold
_MATRIX = {"cpu": 2048, "cuda": 8192}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_METHODS = {
    "native": "bigkernels._native",
    "copy": "torch.Tensor.copy_",
    "matmul": "torch.matmul, achieved and not a peak",
    "mv": "torch.mv",
    "add": "torch.Tensor.add_",
}


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second.

    Attributes:
        copy: reads and writes counted.
        read: where nothing is written; 0 where that was not measured.
        update: reads and writes counted, where most of what is read is written back to its place: the caches then need
            not fetch what is written, as a copy's do; 0 where that was not measured.
    """

    copy: float
    read: float = 0.0
    update: float = 0.0

    def of(self, only_read: bool, in_place: bool) -> float:
        return (only_read and self.read) or (in_place and self.update) or self.copy


@dataclass(frozen=True)
class Limits:
    """Measured limits.

    Attributes:
        copy, read, update: as of `Bandwidth`, in memory.
        matrix: FLOP a second by dtype.
        copy_method, matrix_method, read_method, update_method: what measured them.
        by_bytes: bandwidths by the bytes that are moved at a time, which caches may hold; empty where the caches are
            flushed before each step.
        by_threads: the same with other numbers of CPU threads.
    """

    device: str
    copy: float
    matrix: dict[str, float]
    copy_method: str
    matrix_method: str
    read: float = 0.0
    read_method: str = _METHODS["mv"]
    update: float = 0.0
    update_method: str = _METHODS["add"]
    by_bytes: dict[int, Bandwidth] = field(default_factory=dict)
    by_threads: dict[int, Limits] = field(default_factory=dict)

    def at(self, threads: int) -> Limits:
        """Those of so many threads; of this one, where they were not measured."""
        return self.by_threads.get(threads, self)

    def bandwidth(self, bytes: int, *, only_read: bool = False, in_place: bool = False) -> float:
        """Of a working set of so many bytes; between those that were measured, on the line between the two."""
        curve = {n: b.of(only_read, in_place) for n, b in sorted(self.by_bytes.items())}
        curve[_LARGE] = Bandwidth(self.copy, self.read, self.update).of(only_read, in_place)
        sizes = list(curve)
        at = min(max(bytes, sizes[0]), sizes[-1])
        for below, above in pairwise(sizes):
            if at <= above:
                part = math.log(at / below) / math.log(above / below)
                return curve[below] ** (1 - part) * curve[above] ** part
        return curve[_LARGE]

    def least_seconds(
        self, *, bytes: int, flops: int, dtype: str, only_read: bool = False, in_place: bool = False
    ) -> float:
        """The time below which this machine cannot move so many bytes and do so many operations; 0 if unknown."""
        peak = self.matrix.get(dtype)
        moving = bytes / self.bandwidth(bytes, only_read=only_read, in_place=in_place)
        return max(moving, flops / peak if flops and peak else 0.0)


def measure(device: str, *, seconds: float = 1.0, threads: Collection[int] = (), caches: bool = True) -> Limits:
    """Measure the limits of "cpu" or "cuda", about `seconds` for each figure, and on CPU by other `threads` too.

    Args:
        caches: also measure the bandwidths of what CPU caches hold; a model's layers have the memory's.
    """
    limits = _measure(device, seconds, caches)
    before = torch.get_num_threads()
    try:
        for count in sorted({*threads} - {0, before}):
            torch.set_num_threads(count)
            limits.by_threads[count] = _measure(device, seconds, caches)
    finally:
        torch.set_num_threads(before)
    return limits


def _measure(device: str, seconds: float, caches: bool) -> Limits:
    native = _native() if device == "cpu" else None
    of_bytes = _by_native if native is not None else partial(_by_torch, device)
    large = of_bytes(_LARGE, seconds)
    smaller = {n: of_bytes(n, seconds / 5) for n in _SMALLER if caches and device == "cpu"}
    if native is not None:
        threads = torch.get_num_threads()
        matrix = {dtype: native.matrix_peak(dtype, seconds, threads) for dtype in native.matrix_dtypes()}
        copy = products = read = update = _METHODS["native"]
    else:
        matrix = {name: _matmul(device, dtype, seconds) for name, dtype in _DTYPES.items()}
        copy, products, read, update = (_METHODS[name] for name in ("copy", "matmul", "mv", "add"))
    return Limits(device, large.copy, matrix, copy, products, large.read, read, large.update, update, smaller)


def _by_native(moved: int, seconds: float) -> Bandwidth:
    native, threads = _native(), torch.get_num_threads()
    return Bandwidth(
        native.copy_bandwidth(moved // 2, seconds, threads),
        native.read_bandwidth(moved, seconds, threads),
        native.update_bandwidth(4 * moved // 7, seconds, threads),
    )


def _by_torch(device: str, moved: int, seconds: float) -> Bandwidth:
    return Bandwidth(_copy(device, moved, seconds), _read(device, moved, seconds), _update(device, moved, seconds))


def _native():
    try:
        from .. import _native
    except ImportError:
        return None
    return _native


def _best(step, device: str, seconds: float) -> float:
    """The least time of a step: interruptions only ever add to it."""
    timer = CudaTimer(cold=False) if device == "cuda" else CpuTimer()
    step()
    spent = least = timer(step, 1)
    while spent < seconds:
        taken = timer(step, 1)
        least, spent = min(least, taken), spent + taken
    return least


def _random(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Values as kernels meet them: GPUs multiply constant ones up to 13 % faster, as they then draw less power."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def _copy(device: str, moved: int, seconds: float) -> float:
    source, target = (_random(moved // 8, dtype=torch.float32, device=device) for _ in range(2))
    return 8 * (moved // 8) / _best(lambda: target.copy_(source), device, seconds)


def _read(device: str, moved: int, seconds: float) -> float:
    matrix = _random(moved // 4, dtype=torch.float32, device=device).view(-1, 4096)
    vector, out = (_random(n, device=device, dtype=torch.float32) for n in (matrix.shape[1], matrix.shape[0]))
    return moved / _best(lambda: torch.mv(matrix, vector, out=out), device, seconds)


def _update(device: str, moved: int, seconds: float) -> float:
    target, source = (_random(moved // 12, dtype=torch.float32, device=device) for _ in range(2))
    return 12 * (moved // 12) / _best(lambda: target.add_(source), device, seconds)


def _matmul(device: str, dtype: torch.dtype, seconds: float) -> float:
    size = _MATRIX[device]
    a, b, out = (_random(size, size, dtype=dtype, device=device) for _ in range(3))
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds)
