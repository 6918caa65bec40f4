"""Memory that the ranks of one host share, and the barrier that keeps them in step.

The segment is a file in /dev/shm that loses its name as soon as every rank has mapped it: nothing is left of it when
processes end, however they do. Each rank has a line of its own with a counter that it alone writes; a barrier adds one
to it, and waits for those of the others.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import Store

CHUNK = 2**20  # bytes that a rank gives at a time: what all ranks give stays in the cache
_FOLDER, _PREFIX = "/dev/shm", "bigkernels-"
_LINE = 64 // 8  # int64 of a rank's line: the counter, why it left, the process
_HEADER = 4096
_LEFT, _FAILED = 1, 2


class Segment:
    """Two turns of a chunk a rank, and one for results, which are used in alternation.

    Raises:
        OSError: there is no memory to share, or this rank cannot map it.
    """

    def __init__(self, path: str, rank: int, ranks: int, token: bytes | None = None) -> None:
        self.rank, self.ranks = rank, ranks
        size = _HEADER + 2 * (ranks + 1) * CHUNK
        descriptor = os.open(path, os.O_RDWR)
        try:
            if os.fstat(descriptor).st_size != size:
                raise OSError(f"{path} has another size")
            self._memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        if token is not None and self._memory[_HEADER : _HEADER + len(token)] != token:
            raise OSError(f"{path} is another host's")
        self._lines = memoryview(self._memory)[:_HEADER].cast("q")
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8, offset=_HEADER, count=size - _HEADER)
        self._lines[rank * _LINE + 2] = self._process = os.getpid()
        self._count = 0
        self._fence = threading.Lock()
        self._fence.acquire()
        self.broken: str | None = None

    def slots(self, turn: int) -> list[Tensor]:
        """The chunks of all ranks, CHUNK bytes each, and one more for a result."""
        begin = turn % 2 * (self.ranks + 1) * CHUNK
        return list(self._bytes[begin : begin + (self.ranks + 1) * CHUNK].split(CHUNK))

    def barrier(self, op: str, timeout: timedelta) -> None:
        """Wait until every rank has come here as often.

        Raises:
            DistBackendError: a rank did not within the time-out, ended, or had an error itself.
        """
        if self.broken is not None:
            raise dist.DistBackendError(f"bigkernels.distributed: {op} after an error of the group: {self.broken}")
        self._count = count = self._count + 1
        self._order()
        self._lines[self.rank * _LINE] = count
        deadline = None
        for other in range(self.ranks):
            at, spins = other * _LINE, 0
            while self._lines[at] < count:
                spins += 1
                if spins < 50:
                    continue
                if spins < 1000:
                    os.sched_yield()
                    continue
                now = time.monotonic()
                deadline = deadline or now + timeout.total_seconds()
                self._look_at(op, other, count, now >= deadline, timeout)
                time.sleep(min(20e-6 * (spins - 999), 2e-3))
        self._order()

    def _look_at(self, op: str, other: int, count: int, late: bool, timeout: timedelta) -> None:
        at, reason = other * _LINE, None
        if self._lines[at + 1] == _FAILED:
            reason = f"rank {other} had an error"
        elif self._lines[at + 1] == _LEFT:
            reason = f"rank {other} has ended"
        elif self._is_dead(self._lines[at + 2]):
            reason = f"rank {other}, process {self._lines[at + 2]}, has died"
        elif late:
            reason = f"rank {other} did not arrive within {timeout.total_seconds():g} s"
        if reason is not None and self._lines[at] < count:  # it may have come in the meantime, and left
            self.fail(reason)
            raise dist.DistBackendError(f"bigkernels.distributed: {op}: {reason}")

    def fail(self, reason: str) -> None:
        """This rank is out of step for good; the others hear of it."""
        self.broken = reason
        self._lines[self.rank * _LINE + 1] = _FAILED

    def leave(self) -> None:
        if self._process == os.getpid() and not self._lines[self.rank * _LINE + 1]:
            self._lines[self.rank * _LINE + 1] = _LEFT

    def _order(self) -> None:
        # Writes before this are seen before those after it: a lock that is given up and taken again is a full fence.
        self._fence.release()
        self._fence.acquire()

    @staticmethod
    def _is_dead(process: int) -> bool:
        try:
            with open(f"/proc/{process}/stat") as f:
                return f.read().rpartition(")")[2].split()[0] in ("Z", "X")
        except FileNotFoundError:
            return True
        except OSError:
            return False


def share(store: Store, rank: int, ranks: int) -> Segment | None:
    """A segment of all ranks; None, on every rank, where they cannot share one: they are on several hosts, say."""
    path = ""
    if rank == 0:
        remove_orphans()
        path = _create(ranks)
        token = secrets.token_bytes(16)
        if path:
            with open(path, "r+b") as f:
                f.seek(_HEADER)
                f.write(token)
        store.set("segment", f"{path}\n{token.hex()}")
    segment = None
    try:
        path, _, text = store.get("segment").decode().partition("\n")
        if path and _visible(store, rank, ranks):
            with contextlib.suppress(OSError):
                segment = Segment(path, rank, ranks, bytes.fromhex(text))
        store.set(f"mapped{rank}", "1" if segment is not None else "0")
        everybody = all([store.get(f"mapped{r}") == b"1" for r in range(ranks)])
    finally:
        if rank == 0 and path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    return segment if everybody else None


def _visible(store: Store, rank: int, ranks: int) -> bool:
    """Whether this process sees the others, by whose numbers it would learn that they died."""
    store.set(f"process{rank}", str(os.getpid()))
    return all([os.path.exists(f"/proc/{store.get(f'process{r}').decode()}") for r in range(ranks)])


def _create(ranks: int) -> str:
    path = os.path.join(_FOLDER, f"{_PREFIX}{os.getpid()}-{secrets.token_hex(6)}")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return ""
    try:
        os.posix_fallocate(descriptor, 0, _HEADER + 2 * (ranks + 1) * CHUNK)  # a full disk is an error here, not later
    except OSError:
        os.unlink(path)
        return ""
    finally:
        os.close(descriptor)
    return path


def remove_orphans() -> None:
    """Files of processes of this user that were killed before the others had mapped them."""
    try:
        names = os.listdir(_FOLDER)
    except OSError:
        return
    for name in names:
        process = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and process.isdigit() and Segment._is_dead(int(process)):
            with contextlib.suppress(OSError):
                path = os.path.join(_FOLDER, name)
                if os.stat(path).st_uid == os.getuid():
                    os.unlink(path)
