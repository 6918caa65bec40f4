"""The short form of `make guard`, and that the guard stops what it is there to stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import children  # noqa: E402
import run  # noqa: E402

CALLS = 2000  # at each level; `make guard` makes 50,000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard allocator is for glibc")


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler")
    return children.library(tmp_path_factory.mktemp("guard"))


def test_calls_stay_inside_of_what_they_are_given(isa, guard: Path) -> None:
    done = run.check(isa.name, CALLS, seed=0, guard=guard)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert f"{isa.name}: {CALLS // 4} random and {CALLS - CALLS // 4} hostile calls, 0 wrong" in done.stdout


TOUCH = """
import ctypes
c, memory = ctypes.CDLL(None), ctypes.c_void_p()
assert c.posix_memalign(ctypes.byref(memory), ctypes.c_size_t(64), ctypes.c_size_t({size})) == 0
if {after}: c.free(memory)
if {write}: ctypes.memset(memory.value + {place}, 7, 1)
else: ctypes.string_at(memory.value + {place}, 1)
if not {after}: c.free(memory)
print(ctypes.c_long.in_dll(c, "guard_damaged").value)
"""


@pytest.mark.parametrize(
    ("mode", "size", "place", "write", "after", "stopped"),
    [
        ("end", 1001, 1001, False, False, True),  # read one byte too far
        ("end", 1001, 1000, True, False, False),
        ("begin", 1001, -1, False, False, True),
        ("begin", 1001, 1001, True, False, None),
        ("aligned", 1001, 1001, True, False, None),
        ("aligned", 4096, 4096, True, False, True),
        ("end", 9000, -1, True, False, None),
        ("mixed", 5000, 0, False, True, True),  # read after it was freed
    ],
)
def test_the_guard_stops_or_counts(guard: Path, mode, size, place, write, after, stopped) -> None:
    """`stopped`: True by a signal, None counted when it is freed, False neither."""
    snippet = TOUCH.format(place=place, size=size, write=write, after=after)
    environment = os.environ | {"GUARD": mode, "LD_PRELOAD": str(guard)}
    done = subprocess.run([sys.executable, "-c", snippet], env=environment, capture_output=True, text=True)
    assert (done.returncode < 0) == bool(stopped), done.stderr
    if not stopped:
        assert done.stdout.strip() == ("0" if stopped is False else "1")
        assert ("was written" in done.stderr) == (stopped is None)


def test_what_kills_a_child_is_reported_and_the_rest_goes_on() -> None:
    def work(number: int) -> str | None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 5:
            raise ValueError("a fault of the work itself")
        return "odd" if number == 4 else None

    assert [(n, fault.split()[0]) for n, fault in children.run(7, work)] == [(2, "SIGKILL"), (4, "odd"), (5, "no")]
