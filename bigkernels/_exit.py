"""The end of the interpreter: operators are taken back then, while daemon threads may still call them."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from weakref import WeakSet

_LONGEST = 10.0  # seconds that the interpreter waits for what runs
# And for threads on their way into or out of such a block, who pass through torch there: those that would come back
# from torch into an interpreter that has ended abort the process.
_GRACE = 3.0
_IDLE = 0.25  # the same for threads that have been in such a block and now seem to wait for work
_WORK = ("torch", "transformers", "bigkernels")

_ending = False
_inside: list[object] = []
_threads: WeakSet[threading.Thread] = WeakSet()  # others than the main one that have been inside


class Running:
    """A block that the interpreter's end waits for; then other threads than the main one end where they enter it."""

    def __enter__(self) -> None:
        # In this order: either the end waits for this, or this knows of the end.
        _inside.append(self)
        thread = threading.current_thread()
        if thread is not threading.main_thread():
            _threads.add(thread)
            if _ending:
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
    begin = time.monotonic()
    for thread in list(_threads):
        while thread.is_alive():
            left = min(until, begin + (_GRACE if _works(thread) else _IDLE)) - time.monotonic()
            if left <= 0:
                break
            thread.join(min(left, 0.01))


def _works(thread: threading.Thread) -> bool:
    """Whether a thread is in a call of torch or of what calls this package."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _WORK:
            return True
        frame = frame.f_back
    return False


def _forked() -> None:
    # The threads of the parent are not there.
    _inside.clear()
    _threads.clear()


atexit.register(_end)
os.register_at_fork(after_in_child=_forked)
