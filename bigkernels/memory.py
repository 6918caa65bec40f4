"""Memory of torch's allocators: a pool that reuses it on the CPU, and what a piece of code needs at its peak."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ._load import cpu_library
from ._memory import reuse_memory
from ._torch_private import is_profiled

__all__ = [
    "Peak",
    "Pool",
    "PoolStats",
    "limit_workspaces",
    "peak",
    "pool",
    "release_workspaces",
    "reuse_memory",
    "workspaces",
]

torch.library.define("bigkernels::pool_on", "(int limit, bool huge_pages) -> str")
torch.library.define("bigkernels::pool_off", "() -> ()")
torch.library.define("bigkernels::pool_trim", "() -> int")
torch.library.define("bigkernels::pool_stats", "() -> (int, int, int, int, int, int, int)")
torch.library.define("bigkernels::workspaces_kept", "() -> int")
torch.library.define("bigkernels::release_workspaces", "() -> int")
torch.library.define("bigkernels::limit_workspaces", "(int nbytes) -> int")

_UNLIMITED = 2**62
_TRIED = (
    1 << 20
)  # bytes of a tensor that shows whether torch's memory comes from the pool; above the pool's smallest block


@dataclass(frozen=True)
class PoolStats:
    """What the pool holds and has done, in bytes and in blocks.

    Attributes:
        in_use: bytes of the tensors in it (rounded up by at most 1/16, or 16 KB).
        cached: bytes free for the next tensor, whose pages the process keeps.
        reserved: bytes of addresses opened so far, with pages or without.
        peak: the most that `in_use` has been.
        hits: tensors that got cached bytes.
        misses: tensors that needed new pages.
        given_back: bytes whose pages went back to the system.
    """

    in_use: int
    cached: int
    reserved: int
    peak: int
    hits: int
    misses: int
    given_back: int

    @property
    def held(self) -> int:
        """Bytes whose pages the process has: in use or cached."""
        return self.in_use + self.cached


_settings: tuple[int, bool] | None = None  # of the pool that is on
_switch = threading.Lock()


class Pool:
    """A handle on the process's pool, and a context manager that puts back what was before `pool()`.

    Attributes:
        active: whether the pool was switched on.
        reason: why not, else None.
    """

    def __init__(self, reason: str | None, before: tuple[int, bool] | None = None):
        self.active = reason is None
        self.reason = reason
        self._before = before

    def stats(self) -> PoolStats:
        """Of the process's pool since the first `pool()`; zeros where there is none."""
        if cpu_library().reason is not None:
            return PoolStats(0, 0, 0, 0, 0, 0, 0)
        return PoolStats(*torch.ops.bigkernels.pool_stats())

    def trim(self) -> int:
        """Give the memory of free blocks back to the system, and return how many bytes.

        Where the pool is on huge pages (2 MB), whole ones: a block that shares one with a live tensor keeps its part.
        """
        return torch.ops.bigkernels.pool_trim() if cpu_library().reason is None else 0

    def off(self) -> None:
        """Let torch's memory come from malloc again. Tensors in the pool live on; their memory goes back when they are
        freed."""
        with _switch:
            self.active = False
            _set(None)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        with _switch:
            if self.active:
                self.active = self._before is not None
                _set(self._before)

    def __repr__(self) -> str:
        return f"Pool(active={self.active}, reason={self.reason!r}, {self.stats()})"


def pool(limit: int | float | None = None, huge_pages: bool = True) -> Pool:
    """Let large CPU tensors (256 KB and more) take over the memory of freed ones. Linux; for the whole process.

    A fresh tensor pays for each of its pages when it is first written: the system finds, clears and maps them, which
    takes longer than most operators. glibc gives large blocks back as soon as they are freed, and the tensor that
    follows pays again. While the pool is on, torch's CPU allocator takes large blocks from one range of addresses whose
    free blocks keep their pages: best fit, and free neighbours are joined. Fragmentation is bounded: before cached and
    used bytes exceed 9/8 of the most bytes ever in use plus 64 MB, pages that have been free for longest go back.
    Numbers do not change.

        with bigkernels.memory.pool():
            train()

        bigkernels.memory.pool(limit=0.25)  # for the rest of the process, at most a quarter of the memory cached

    Only what torch's allocator asks for is affected, by rebinding what its library (libc10.so) imports as
    `posix_memalign` and `free`; malloc stays as it is for everybody else. `reuse_memory` is the other way:
    it changes malloc for the whole process, by two glibc settings, cannot be undone or bounded, uses no huge pages, and
    works on memory that is not torch's, too. The two go together. Forked processes keep the pool; tensors may be freed
    after the pool they came from is off, and by any thread.

    Args:
        limit: the most free bytes to keep: bytes (int), a part of the machine's memory (float from 0 to 1), or None for
            as many as have been needed. More are given back to the system when a tensor is freed. It limits what is
            cached; live tensors always get memory.
        huge_pages: ask the system for huge pages (`madvise`), which cost fewer faults and address look-ups. Memory that
            the pool already has stays as it is.

    Returns:
        A handle. Where there can be no pool (no Linux, no compiled library, a torch whose allocator calls another
        malloc by its own name) its `active` is False and `reason` says why. Called again, it changes the settings.

    Raises:
        TypeError, ValueError: if `limit` is not of these kinds, or out of range.
    """
    limit = _bytes(limit)
    global _settings
    with _switch:
        before = _settings
        reason = cpu_library().reason or _set((limit, bool(huge_pages)))
        return Pool(reason, before)


def _bytes(limit: int | float | None) -> int:
    if limit is None:
        return _UNLIMITED
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(
            f"bigkernels.memory.pool: limit must be bytes (int), a part of the memory (float) or None, got {limit!r}"
        )
    if isinstance(limit, float):
        if not 0 <= limit <= 1:
            raise ValueError(f"bigkernels.memory.pool: a limit given as a float must be from 0 to 1, got {limit}")
        return int(limit * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if sys.platform == "linux" else 0
    if limit < 0:
        raise ValueError(f"bigkernels.memory.pool: limit must not be negative, got {limit}")
    return min(limit, _UNLIMITED)


def _set(settings: tuple[int, bool] | None) -> str | None:
    """Switch the pool on, with these settings, or off; why it is not on then."""
    global _settings
    if settings is None:
        if _settings is not None:
            torch.ops.bigkernels.pool_off()
            _settings = None
        return None
    # The loader may bind an import at its first call, which must not be after ours.
    torch.empty(1, dtype=torch.float32, device="cpu")
    if reason := torch.ops.bigkernels.pool_on(*settings):
        return reason
    _settings = settings
    before = _blocks()
    torch.empty(_TRIED, dtype=torch.uint8, device="cpu")
    if _blocks() == before:
        _set(None)
        return "torch's CPU allocator does not take its memory from the C library"
    return None


def _blocks() -> int:
    *_, hits, misses, _ = torch.ops.bigkernels.pool_stats()
    return hits + misses


def workspaces() -> int:
    """Bytes that operators on CPU keep for their next call: each thread up to two workspaces of at most 64 MB, all
    threads together 512 MB, or what `limit_workspaces` says; and what step programs keep, seldom more than four times
    32 MB. Fresh memory would be paid for in page faults, call by call."""
    return torch.ops.bigkernels.workspaces_kept() if cpu_library().reason is None else 0


def release_workspaces() -> int:
    """Give the memory of workspaces that no call uses back, of all threads, and return how many bytes. The next calls
    make new ones."""
    return torch.ops.bigkernels.release_workspaces() if cpu_library().reason is None else 0


def limit_workspaces(nbytes: int) -> int:
    """Keep at most so many bytes of workspaces between calls, of all threads together; 0 keeps none. A call has what it
    needs in any case.

    Returns:
        The limit before, in bytes.

    Raises:
        TypeError, ValueError: it is no integer, or negative.
    """
    if isinstance(nbytes, bool) or not isinstance(nbytes, int):
        raise TypeError(f"bigkernels.memory.limit_workspaces: nbytes must be an int, got {nbytes!r}")
    if nbytes < 0:
        raise ValueError(f"bigkernels.memory.limit_workspaces: nbytes must not be negative, got {nbytes}")
    if cpu_library().reason is not None:
        return 0
    return torch.ops.bigkernels.limit_workspaces(min(nbytes, _UNLIMITED))


class Peak:
    """What a region needed, of the memory of torch's allocator; there once the region has ended.

    Attributes:
        bytes: the most held at once, beyond what was held at its start.
        end: held at its end, beyond what was held at its start; negative if it freed more than it allocated.
    """

    def __init__(self) -> None:
        self.bytes = self.end = 0

    def __repr__(self) -> str:
        return f"Peak(bytes={self.bytes}, end={self.end})"


class _Cuda:
    """A section of the program, by the counters of torch's CUDA allocator."""

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def stop(self) -> tuple[int, int]:
        torch.cuda.synchronize(self.device)
        most, held = torch.cuda.max_memory_allocated(self.device), torch.cuda.memory_allocated(self.device)
        return most - self.before, held - self.before


class _Cpu:
    """A section of the program, by the profiler's record of every allocation of this thread and its backward passes."""

    def __init__(self, device: torch.device):
        from torch.profiler import ProfilerActivity, profile

        if is_profiled():
            raise RuntimeError("bigkernels.memory.peak: another profiler is running, and there can be only one")
        # Not with profile_all_threads: torch 2.13 then records no memory at all (pytorch issue 166121).
        self.record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with quiet_stderr():
            self.record.start()

    def stop(self) -> tuple[int, int]:
        with quiet_stderr():
            self.record.stop()
        profiler: Any = self.record.profiler
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most, held


_open: dict[torch.device, list[Peak]] = {}  # a device's regions that have not ended, outermost first
_sections: dict[torch.device, _Cpu | _Cuda] = {}


def _cut(device: torch.device) -> None:
    """End a device's section of the program, if one runs, and add it to the regions that it lies in."""
    if (section := _sections.pop(device, None)) is None:
        return
    most, held = section.stop()
    for region in _open.get(device, ()):
        region.bytes = max(region.bytes, region.end + most)
        region.end += held


@contextmanager
def peak(device: str | torch.device = "cpu") -> Iterator[Peak]:
    """Measure the memory that a region of the program needs beyond what is there at its start.

        with bigkernels.memory.peak() as p:
            loss = model(ids, labels=ids).loss
            loss.backward()
        print(p.bytes, p.end)

    On CPU it is summed from the profiler's record of every allocation that torch makes in the region, in the thread
    that opened it and in the threads of its backward passes: exact and the same each time, unlike the resident set,
    with `memory.pool` or without. Other threads' allocations, and those outside of torch's allocator (scratch memory of
    libraries), are not in it; nor is the freeing of what was allocated before any region began, whose size torch does
    not know (it says so on stderr): there `bytes` and `end` are upper bounds. The record makes the region slower and
    takes memory of its own, for every operator call: measure a step, not a training. On CUDA both are read from the
    allocator's counters, whose peak is reset (`torch.cuda.reset_peak_memory_stats`), and the device is synchronised on
    both sides.

    Regions may lie in each other, on one thread. A region that raises has been measured all the same.

    Args:
        device: "cpu", "cuda", or one CUDA device.

    Raises:
        ValueError: if it is another device.
        RuntimeError: on CPU, if a profiler is running already.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"bigkernels.memory.peak: device must be a CPU or CUDA device, got {device}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    start = _Cpu if device.type == "cpu" else _Cuda
    regions, region = _open.setdefault(device, []), Peak()
    _cut(device)
    _sections[device] = start(device)
    regions.append(region)
    try:
        yield region
    finally:
        _cut(device)
        regions.remove(region)
        if regions:
            _sections[device] = start(device)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr: the profiler announces itself there."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
