"""What the machine can do at most: bandwidth of copying, reading and updating in place, and matrix products by dtype.

A development build measures them with its own loops (`bigkernels._native`). Otherwise torch does, and the matrix figure
is then what torch achieves, which may be well below what the hardware could, as may its matrix times a vector that
reading is measured by: within a few per cent of our loop on an Intel machine, two thirds of it on an AMD one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from .timing import CpuTimer, CudaTimer

_COPY_BYTES = 256 * 2**20
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
class Limits:
    """Measured limits.

    Attributes:
        copy: bytes a second, reads and writes counted.
        matrix: FLOP a second by dtype.
        copy_method, matrix_method, read_method, update_method: what measured them.
        read: bytes a second where nothing is written; 0 where that was not measured.
        update: bytes a second, reads and writes counted, where most of what is read is written back to its place: the
            caches then need not fetch what is written, as a copy's do; 0 where that was not measured.
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
    by_threads: dict[int, Limits] = field(default_factory=dict)

    def at(self, threads: int) -> Limits:
        """Those of so many threads; of this one, where they were not measured."""
        return self.by_threads.get(threads, self)

    def least_seconds(
        self, *, bytes: int, flops: int, dtype: str, only_read: bool = False, in_place: bool = False
    ) -> float:
        """The time below which this machine cannot move so many bytes and do so many operations; 0 if unknown."""
        peak = self.matrix.get(dtype)
        bandwidth = (only_read and self.read) or (in_place and self.update) or self.copy
        return max(bytes / bandwidth, flops / peak if flops and peak else 0.0)


def measure(device: str, *, seconds: float = 1.0, threads: Collection[int] = ()) -> Limits:
    """Measure the limits of "cpu" or "cuda", about `seconds` for each figure, and on CPU by other `threads` too."""
    limits = _measure(device, seconds)
    before = torch.get_num_threads()
    try:
        for count in sorted({*threads} - {0, before}):
            torch.set_num_threads(count)
            limits.by_threads[count] = _measure(device, seconds)
    finally:
        torch.set_num_threads(before)
    return limits


def _measure(device: str, seconds: float) -> Limits:
    native = _native() if device == "cpu" else None
    if native is not None:
        threads = torch.get_num_threads()
        read = native.read_bandwidth(_COPY_BYTES, seconds, threads)
        copy = native.copy_bandwidth(_COPY_BYTES, seconds, threads)
        update = native.update_bandwidth(_COPY_BYTES, seconds, threads)
        matrix = {dtype: native.matrix_peak(dtype, seconds, threads) for dtype in native.matrix_dtypes()}
        by = _METHODS["native"]
        return Limits(device, copy, matrix, by, by, read, by, update, by)
    matrix = {name: _matmul(device, dtype, seconds) for name, dtype in _DTYPES.items()}
    return Limits(
        device,
        _copy(device, seconds),
        matrix,
        _METHODS["copy"],
        _METHODS["matmul"],
        read=_read(device, seconds),
        update=_update(device, seconds),
    )


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


def _copy(device: str, seconds: float) -> float:
    source, target = (_random(_COPY_BYTES // 4, dtype=torch.float32, device=device) for _ in range(2))
    return 2 * _COPY_BYTES / _best(lambda: target.copy_(source), device, seconds)


def _read(device: str, seconds: float) -> float:
    matrix = _random(_COPY_BYTES // 4, dtype=torch.float32, device=device).view(-1, 4096)
    vector, out = (_random(n, device=device, dtype=torch.float32) for n in (4096, matrix.shape[0]))
    return _COPY_BYTES / _best(lambda: torch.mv(matrix, vector, out=out), device, seconds)


def _update(device: str, seconds: float) -> float:
    target, source = (_random(_COPY_BYTES // 4, dtype=torch.float32, device=device) for _ in range(2))
    return 3 * _COPY_BYTES / _best(lambda: target.add_(source), device, seconds)


def _matmul(device: str, dtype: torch.dtype, seconds: float) -> float:
    size = _MATRIX[device]
    a, b, out = (_random(size, size, dtype=dtype, device=device) for _ in range(3))
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds)
