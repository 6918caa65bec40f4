"""Weights on huge pages, where they are: a step reads all of them, and the tables of small pages cost as much again.
Memory of its own that a program reads is on huge pages from the beginning.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

_PAGE = 2**21
_HUGEPAGE = 14  # MADV_HUGEPAGE: of pages that come to be
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1: pages become a huge one at the same address
_WORTH = 2**23  # bytes: what is less stays in the caches
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def prefer_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Ask for huge pages under tensors that already have memory. Nothing but the time of reads changes; where the
    system has none, or was told to use none, nothing does.

    Returns:
        How many huge pages there are now.
    """
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.device.type == "cpu" and t.nbytes)
    if sum(end - begin for begin, end in ranges) < _WORTH or (advise := _advise()) is None:
        return 0
    pages = sorted({page for begin, end in ranges for page in range(begin // _PAGE, -(-end // _PAGE))})
    return sum(advise(page * _PAGE, _PAGE, _COLLAPSE) == 0 for page in pages)


def empty_on_huge_pages(size: int) -> Tensor:
    """(size,) bytes that nobody has touched, from the beginning of a page on."""
    page = _PAGE if size >= _WORTH else 4096
    memory = torch.empty(size + page, dtype=torch.uint8, device="cpu")
    begin = -memory.data_ptr() % page
    memory = memory[begin : begin + size]
    if size >= _WORTH and (advise := _advise()) is not None:
        advise(memory.data_ptr(), size // page * page, _HUGEPAGE)
    return memory


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        if "[never]" in _SETTING.read_text():
            return None
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.restype, function.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
