"""Where saved tensors wait: page-locked memory beside a GPU, mapped files beside CPU memory."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections import defaultdict
from functools import cache

import torch
from torch import Tensor

from ._policy import Host

_STEP = 2**21  # bytes: buffers come in multiples, so that tensors of about one size share them


class Slot:
    """One tensor that waits. Its buffer goes back to the pool with it."""

    def __init__(self, pool: Pool, flat: Tensor):
        self.pool, self.dtype, self.count, self.device = pool, flat.dtype, flat.numel(), flat.device
        self.size = -(-flat.nbytes // _STEP) * _STEP
        self.buffer = pool.take(self.size)
        self.nbytes = flat.nbytes
        self.write(flat)

    def __del__(self):
        self.pool.give(self.size, self.buffer)

    def write(self, flat: Tensor) -> None:
        raise NotImplementedError

    def fetch(self) -> None:
        """Begin to bring the tensor back."""

    def get(self) -> Tensor:
        raise NotImplementedError


class Pool:
    """Buffers that are used again: to get page-locked memory or a file takes longer than to fill it."""

    slot: type[Slot]

    def __init__(self):
        self.free: dict[int, list] = defaultdict(list)
        self.lock = threading.Lock()
        self.held = 0  # bytes of all buffers that were made

    def put(self, flat: Tensor) -> Slot:
        return self.slot(self, flat)

    def take(self, size: int):
        with self.lock:
            if self.free[size]:
                return self.free[size].pop()
            self.held += size
        return self.make(size)

    def give(self, size: int, buffer) -> None:
        with self.lock:
            self.free[size].append(buffer)

    def make(self, size: int):
        raise NotImplementedError


class _MappedSlot(Slot):
    def _tensor(self) -> Tensor:
        return torch.frombuffer(self.buffer, dtype=self.dtype, count=self.count)

    def write(self, flat: Tensor) -> None:
        self._tensor().copy_(flat)
        # The pages stay in the system's file cache, which may write and drop them, and are no longer this process's.
        self.buffer.madvise(mmap.MADV_DONTNEED)

    def fetch(self) -> None:
        self.buffer.madvise(mmap.MADV_WILLNEED)

    def get(self) -> Tensor:
        out = self._tensor().clone()  # the buffer may be written again while this is still read
        self.buffer.madvise(mmap.MADV_DONTNEED)
        return out


class MappedFile(Pool):
    """Parts of a file without a name, which ends with the process."""

    slot = _MappedSlot

    def __init__(self, directory: str | None):
        super().__init__()
        self.file = tempfile.TemporaryFile(prefix="bigkernels-", dir=directory)

    def make(self, size: int) -> mmap.mmap:
        with self.lock:
            offset = os.fstat(self.file.fileno()).st_size
            self.file.truncate(offset + size)
        return mmap.mmap(self.file.fileno(), size, offset=offset)


class _PinnedSlot(Slot):
    def write(self, flat: Tensor) -> None:
        self.back: Tensor | None = None
        side = self.pool.stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._host().copy_(flat, non_blocking=True)
        flat.record_stream(side)

    def _host(self) -> Tensor:
        return self.buffer[: self.nbytes].view(self.dtype)

    def fetch(self) -> None:
        if self.back is not None:
            return
        with torch.cuda.stream(self.pool.stream(self.device)):
            self.back = self._host().to(self.device, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def get(self) -> Tensor:
        self.fetch()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.arrived)
        back, self.back = self.back, None
        back.record_stream(current)
        return back


class Pinned(Pool):
    """Page-locked host memory. All copies of a device run in one stream beside the computation, in their order: a
    buffer is not written before what was read from it has arrived."""

    slot = _PinnedSlot

    def __init__(self):
        super().__init__()
        self.streams: dict[int, torch.cuda.Stream] = {}

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        if device.index not in self.streams:
            self.streams[device.index] = torch.cuda.Stream(device)
        return self.streams[device.index]

    def make(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


_pinned = cache(Pinned)
_mapped = cache(MappedFile)


class Place:
    """The pool for each device's tensors."""

    def __init__(self, host: Host):
        self.host = host

    def put(self, flat: Tensor) -> Slot | Tensor:
        """Tensors of devices that have no such place stay."""
        if flat.nbytes < self.host.least:
            return flat
        if flat.is_cuda:
            return _pinned().put(flat)
        return _mapped(self.host.directory).put(flat) if flat.is_cpu else flat
