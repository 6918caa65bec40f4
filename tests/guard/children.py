"""Work that may kill its process: done in forked children, one after the other, until all of it is done."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_BEGUN, _DONE, _FAULT = b"b", b"d", b"f"
_RECORD = struct.Struct("=ic")
_SLOW = 60  # seconds without progress after which a child counts as hung

_process = ctypes.CDLL(None)
ALLOCATIONS, DAMAGED = (
    ctypes.c_long.in_dll(_process, f"guard_{name}") if hasattr(_process, f"guard_{name}") else None
    for name in ("allocations", "damaged")
)
_PAUSED = ctypes.c_int.in_dll(_process, "guard_paused") if hasattr(_process, "guard_paused") else ctypes.c_int()


@contextmanager
def unguarded() -> Iterator[None]:
    """For work whose memory nobody looks at."""
    _PAUSED.value = 1
    try:
        yield
    finally:
        _PAUSED.value = 0


def run(count: int, work: Callable[[int], str | None]) -> Iterator[tuple[int, str]]:
    """(number, what was wrong) of each of ``work(0) .. work(count - 1)`` that returned something, wrote around an
    allocation, or killed its process. This process must not have run parallel work of torch's before.
    """
    first = 0
    while first < count:
        reader, writer = os.pipe()
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if child == 0:
                os.close(reader)
                os.dup2(said.fileno(), 2)
                try:
                    _work(range(first, count), work, writer)
                    os._exit(0)
                finally:  # an exception is a fault of the work, as a signal is
                    traceback.print_exc()
                    os._exit(1)
            os.close(writer)
            with os.fdopen(reader, "rb") as pipe:
                records = pipe.read()
            status = os.waitpid(child, 0)[1]
            said.seek(max(0, said.seek(0, os.SEEK_END) - 600))
            last = " | ".join(said.read().decode(errors="replace").splitlines()[-2:])
        at = first - 1
        for at, kind, text in _records(records):
            if kind == _FAULT:
                yield at, text
        if status:
            how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "no end of its work"
            yield max(at, first), f"{how} after: {last}"
            first = max(at, first) + 1
        else:
            first = count


def _work(numbers: range, work: Callable[[int], str | None], writer: int) -> None:
    def tell(number: int, kind: bytes, text: str = "") -> None:
        body = text.encode()[:2000]
        os.write(writer, _RECORD.pack(number, kind) + struct.pack("=i", len(body)) + body)

    for number in numbers:
        signal.alarm(_SLOW)
        tell(number, _BEGUN)
        damaged = DAMAGED.value if DAMAGED else 0
        fault = work(number)
        if DAMAGED and DAMAGED.value != damaged:
            fault = f"wrote around an allocation; {fault or ''}"
        tell(number, *((_FAULT, fault) if fault else (_DONE,)))


def _records(data: bytes) -> Iterator[tuple[int, bytes, str]]:
    at = 0
    while at + _RECORD.size + 4 <= len(data):
        number, kind = _RECORD.unpack_from(data, at)
        (length,) = struct.unpack_from("=i", data, at + _RECORD.size)
        at += _RECORD.size + 4 + length
        yield number, kind, data[at - length : at].decode(errors="replace")


def library(folder: Path) -> Path:
    """The compiled allocator, made anew in a folder."""
    out = folder / "guard.so"
    source = Path(__file__).with_name("guard.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", out, source, "-ldl", "-lpthread"], check=True)
    return out
