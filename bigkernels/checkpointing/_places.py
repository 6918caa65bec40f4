"""Where saved tensors wait: page-locked memory beside a GPU, mapped files beside CPU memory."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from collections import defaultdict, deque
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._page_locked import page_locked
from ._policy import Host

_STEP = 2**21  # bytes: buffers come in multiples, so that tensors of about one size share them
_LEAVING = 2**27  # bytes on their way out of a GPU before computation waits: some milliseconds of copies


class Slot:
    """One tensor that waits. Its buffer goes back to the pool with it."""

    def __init__(self, pool: Pool, flat: Tensor):
        self.pool, self.dtype, self.count, self.device = pool, flat.dtype, flat.numel(), flat.device
        self.nbytes = flat.nbytes
        self.size, self.buffer = pool.take(-(-flat.nbytes // _STEP) * _STEP)
        self.write(flat)

    def __del__(self):
        if hasattr(self, "buffer"):
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
        self.lock = threading.RLock()  # a slot may be collected, and give, while another is taken
        self.held = 0  # bytes of all buffers that were made
        self.closed = False

    def put(self, flat: Tensor) -> Slot:
        return self.slot(self, flat)

    def take(self, size: int) -> tuple[int, Any]:
        """The size of a buffer, and the buffer: a free one up to twice as large, lest lengths that vary add up."""
        with self.lock:
            fits = [s for s, buffers in self.free.items() if buffers and size <= s <= 2 * size]
            if fits:
                return min(fits), self.free[min(fits)].pop()
        buffer = self.make(size)
        with self.lock:
            self.held += size
        return size, buffer

    def give(self, size: int, buffer) -> None:
        with self.lock:
            if not self.closed:
                self.free[size].append(buffer)

    def close(self) -> None:
        """No buffer is used again, or waits for it."""
        self.closed = True
        self.free.clear()

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
    """Parts of a file without a name, which ends with the process.

    A fork shares it: the child, and a parent some of whose tensors are in it, go on with another file, and only read
    what was written to this one before.
    """

    slot = _MappedSlot

    def __init__(self, directory: str | None):
        super().__init__()
        self.file = tempfile.TemporaryFile(prefix="bigkernels-", dir=directory)

    def busy(self) -> bool:
        """Whether tensors are in it."""
        return self.held > sum(size * len(buffers) for size, buffers in self.free.items())

    def make(self, size: int) -> mmap.mmap:
        with self.lock:
            offset = os.fstat(self.file.fileno()).st_size
            # Not only made longer: writing to a page that a full disk has no room for would end the process.
            os.posix_fallocate(self.file.fileno(), offset, size)
        return mmap.mmap(self.file.fileno(), size, offset=offset)


class _PinnedSlot(Slot):
    """Memory on the device is that of the stream that computes, and is taken and let go in this stream's order: however
    far the host is ahead, no more of it is in use than where it waits for each copy.
    """

    pool: Pinned
    leaving: Tensor | None = None  # what is being copied out
    back: Tensor | None = None  # what is being copied in

    def write(self, flat: Tensor) -> None:
        side, current = self.pool.stream, torch.cuda.current_stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._host().copy_(flat, non_blocking=True)
        self.leaving, self.gone = flat, side.record_event()
        self.pool.settle(current, _LEAVING, self)

    def let_go(self, stream: torch.cuda.Stream) -> None:
        stream.wait_event(self.gone)
        self.leaving = None

    def _host(self) -> Tensor:
        return self.buffer[: self.nbytes].view(self.dtype)

    def fetch(self) -> None:
        if self.back is not None:
            return
        self.to = torch.cuda.current_stream(self.device)
        self.pool.settle(self.to, 0)
        self.back = torch.empty(self.count, dtype=self.dtype, device=self.device)
        side = self.pool.stream
        side.wait_stream(self.to)  # what had this memory before may still be in use
        with torch.cuda.stream(side):
            self.back.copy_(self._host(), non_blocking=True)
        self.arrived = side.record_event()

    def get(self) -> Tensor:
        self.fetch()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.arrived)
        back, self.back = self.back, None
        assert back is not None  # as `fetch` has left it
        if current != self.to:
            back.record_stream(current)
        return back

    def __del__(self):
        for t in (self.leaving, self.back):  # nobody has waited for these copies
            if t is not None:
                t.record_stream(self.pool.stream)
        super().__del__()


class Pinned(Pool):
    """Page-locked host memory for one device. All its copies run in one stream beside the computation, in their order:
    a buffer is not written before what was read from it has arrived."""

    slot = _PinnedSlot

    def __init__(self, device: torch.device):
        super().__init__()
        self.stream = torch.cuda.Stream(device)
        self.leaving: deque[weakref.ref[_PinnedSlot]] = deque()

    def make(self, size: int) -> Tensor:
        return page_locked(size)

    def settle(self, stream: torch.cuda.Stream, most: int, slot: _PinnedSlot | None = None) -> None:
        """Make `stream` wait until no more than `most` bytes are being copied out, `slot`, the newest, aside."""
        done = []
        with self.lock:
            there = [s for r in self.leaving if (s := r()) is not None]
            held = sum(s.nbytes for s in there)
            while held > most and there:
                done.append(there.pop(0))
                held -= done[-1].nbytes
            if slot is not None:
                there.append(slot)
            self.leaving = deque(map(weakref.ref, there))
        for s in done:
            s.let_go(stream)


_pinned = cache(Pinned)
_files: dict[str | None, MappedFile] = {}
_files_lock = threading.RLock()


def _mapped(directory: str | None) -> MappedFile:
    with _files_lock:
        if directory not in _files:
            _files[directory] = MappedFile(directory)
        return _files[directory]


def _before_fork() -> None:
    _files_lock.acquire()  # a lock that another thread holds would stay locked in the child for ever
    for pool in _files.values():
        pool.lock.acquire()


def _in_parent() -> None:
    for directory, pool in list(_files.items()):
        if pool.busy():  # the child may read it
            pool.close()
            del _files[directory]
        pool.lock.release()
    _files_lock.release()


def _in_child() -> None:
    for pool in _files.values():
        pool.close()
        pool.lock.release()
    _files.clear()
    _files_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)


class Place:
    """The pool for each device's tensors."""

    def __init__(self, host: Host):
        self.host = host

    def put(self, flat: Tensor) -> Slot | Tensor:
        """Tensors of devices that have no such place stay."""
        if flat.nbytes < self.host.min_nbytes:
            return flat
        if flat.is_cuda:
            return _pinned(flat.device).put(flat)
        return _mapped(self.host.folder).put(flat) if flat.is_cpu else flat
