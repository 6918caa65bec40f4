"""Keeping freed memory for the next tensor."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def reuse_memory() -> bool:
    """Let this process keep the CPU memory that tensors free, and give it to the tensors that follow.

    By default glibc returns blocks of more than 32 MB to the system at once, and the next tensor of that size pays for
    every page again: writing a fresh tensor takes two to four times as long as overwriting one. After this call the
    process's memory stays at its high-water mark until it ends. It changes malloc for the whole process and cannot be
    undone, so it is never done on import; a process that runs under jemalloc or tcmalloc does not need it.

    `bigkernels.memory.pool` is the other way to it: for torch's tensors alone, on huge pages, with a limit, counters
    and a way back; memory that libraries allocate for themselves is kept by this one only.

    Returns:
        Whether the setting took effect: False where the C library is not glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
