"""Interleaved timing and its statistics."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from .._torch_private import gpu_sleep

_SAMPLE_SECONDS = 1e-3  # a shorter step is repeated within a sample: the clock and the loop cost about 0.1 us
_SLEEP_SECONDS = 2e-4  # of the device, while the host queues a sample; longer where that takes longer
_LONGEST_SLEEP = 0.1
_CYCLES_PER_SECOND = 2e9  # at least those of any GPU so far: a sleep may last longer and not shorter
_FLUSH_BYTES = 256 * 2**20  # larger than the last cache of any GPU so far

Step = Callable[[], object]


@dataclass(frozen=True)
class Statistics:
    """Seconds a step: the median, the quartiles, the least, and how many samples they come from."""

    median: float
    q1: float
    q3: float
    least: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Statistics:
        if len(seconds) == 1:
            only = seconds[0]
            return cls(only, only, only, only, 1)
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, q1, q3, min(seconds), len(seconds))

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a part of the median."""
        return (self.q3 - self.q1) / self.median


class CpuTimer:
    """Times steps that are done when they return."""

    def __call__(self, step: Step, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats


class CudaTimer:
    """Times steps on the current stream by events; with `cold`, caches are flushed before each sample.

    The device sleeps while the host queues a sample, for longer than that takes: what is timed are kernels, one behind
    the other, and no launches. A step that waits for the device cannot be queued so, and is timed as it comes. How long
    the host took is kept in `host`, by step: the least of all samples.
    """

    def __init__(self, cold: bool):
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda") if cold else None
        self.host: dict[Step, float] = {}
        self._sleeps: dict[Step, float] = {}  # seconds

    def __call__(self, step: Step, repeats: int) -> float:
        if self.flush is not None:
            repeats = 1
        while True:
            sleep = self._sleeps.setdefault(step, _SLEEP_SECONDS)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.flush is not None:
                self.flush.zero_()
            gpu_sleep(int(sleep * _CYCLES_PER_SECOND))
            start.record()
            begin = time.perf_counter()
            for _ in range(repeats):
                step()
            host = time.perf_counter() - begin
            end.record()
            end.synchronize()
            if host < 0.8 * sleep or sleep >= _LONGEST_SLEEP:
                self.host[step] = min(self.host.get(step, math.inf), host / repeats)
                return start.elapsed_time(end) / 1e3 / repeats
            self._sleeps[step] = min(2 * host, _LONGEST_SLEEP)


def interleave(
    steps: Mapping[str, Step],
    timer: Callable[[Step, int], float],
    *,
    rounds: int,
    seconds: float,
    once: Container[str] = (),
) -> dict[str, list[float]]:
    """Time the steps in turn, A B C A B C ..., so that whatever slows the machine slows them all alike.

    Args:
        steps: by name; each has run before.
        timer: `timer(step, repeats)` gives the seconds of one step.
        rounds: the least number of turns.
        seconds: turns go on until this long has passed.
        once: those that take no turns, because one measurement takes long enough.

    Returns:
        The seconds of a step, one value a turn, by name.
    """
    first = {name: timer(step, 1) for name, step in steps.items()}
    repeats = {name: max(1, math.ceil(_SAMPLE_SECONDS / max(taken, 1e-7))) for name, taken in first.items()}
    found: dict[str, list[float]] = {name: [first[name]] if name in once else [] for name in steps}
    turns = {name: step for name, step in steps.items() if name not in once}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, turn = time.perf_counter(), 0
        while turns and (turn < rounds or time.perf_counter() - start < seconds):
            for name, step in turns.items():
                found[name].append(timer(step, repeats[name]))
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return found
