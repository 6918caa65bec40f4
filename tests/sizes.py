"""Kernels change their form with the size of a call and the number of threads: here small calls take every form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Bytes from which on a second thread helps, and from which on outputs go past the caches (csrc/include/.../stable.h).
DEFAULTS = (64 * 1024, 1 << 20)


@contextmanager
def every_size(threads: int) -> Iterator[None]:
    """Every call of a CPU kernel is split among so many threads, as far as its rows go, and streams its outputs."""
    count, before = torch.get_num_threads(), torch.ops.bigkernels.thresholds(1, 0)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        torch.ops.bigkernels.thresholds(*before)
