"""The end of the interpreter: operators are taken back then, while daemon threads may still call them."""

from __future__ import annotations

import atexit
import os
import threading
import time

_LONGEST = 10.0  # seconds that the interpreter waits for what runs

_ending = False
_inside: list[object] = []


class Running:
    """A block that the interpreter's end waits for; then other threads than the main one end where they enter it."""

    def __enter__(self) -> None:
        # In this order: either the end waits for this, or this knows of the end.
        _inside.append(self)
        if _ending and threading.current_thread() is not threading.main_thread():
            _inside.remove(self)
            raise SystemExit  # which ends a thread without a word

    def __exit__(self, *_: object) -> None:
        _inside.remove(self)


def _end() -> None:
    global _ending
    _ending = True
    until = time.monotonic() + _LONGEST
    while _inside and time.monotonic() < until:
        time.sleep(0.001)


atexit.register(_end)
os.register_at_fork(after_in_child=_inside.clear)  # the threads of the parent are not there
