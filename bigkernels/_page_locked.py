"""Page-locked host memory in the size that is asked for."""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_SMALL = 2**20  # bytes: registering takes longer than what is saved is worth


def page_locked(nbytes: int) -> Tensor:
    """Bytes (nbytes,) in host memory that a GPU reads and writes while neither side waits.

    torch's own page-locked memory comes in powers of two (pytorch #171662): a tensor of 1.1 GB holds 2 GB. Here pages
    of the system are registered with the driver, and given back with the tensor. Where it refuses, it is
    torch's own.
    """
    if nbytes < _SMALL:
        return _of_torch(nbytes)
    whole = -(-nbytes // _PAGE) * _PAGE
    try:
        pages = mmap.mmap(-1, whole)  # shared with forks, so that writing does not move them
    except (OSError, ValueError):
        return _of_torch(nbytes)
    locked = torch.frombuffer(pages, dtype=torch.uint8)
    address, runtime = locked.data_ptr(), torch.cuda.cudart()
    try:
        refused = int(runtime.cudaHostRegister(address, whole, 0)) != 0
    except RuntimeError:
        refused = True
    if refused:
        return _of_torch(nbytes)
    # Storages end with what tensors and views are made of them. At the end of the process the driver is gone first.
    weakref.finalize(locked.untyped_storage(), _release, pages, address).atexit = False
    return locked[:nbytes]


def _release(pages: mmap.mmap, address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


def _of_torch(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True, device="cpu")
