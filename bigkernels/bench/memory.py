"""How much memory a step needs beyond what is there before it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def extra_peak(step: Callable[[], object], device: str) -> int:
    """The largest number of bytes that torch's allocator holds at once during `step`, beyond those before it.

    On CPU this is summed from the profiler's record of every allocation: exact and the same each time, unlike the
    resident set. Memory that a kernel takes outside torch's allocator is not in it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = step()
    del kept
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
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
