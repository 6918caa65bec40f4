"""A model in a process of its own: another package's, or another checkout's, that takes its turns among ours."""

# mypy: ignore-errors

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .case import Missing

_SCRIPTS = Path(__file__).parent / "processes"


class Process:
    """One script of `processes`, started; what it is asked and what it answers is told in `processes/serve.py`.

    Args:
        script: its name.
        path: of the checkout whose packages it finds first.
    """

    def __init__(self, script: str, path: str | None = None):
        environment = dict(os.environ) if path is None else os.environ | {"PYTHONPATH": path}
        self.running = subprocess.Popen(
            [sys.executable, str(_SCRIPTS / f"{script}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.memory = 0  # bytes, the most that it had so far

    def ask(self, do: str, **what: Any) -> dict:
        """Its answer.

        Raises:
            Missing: it cannot start, or has no answer, with what it says.
        """
        try:
            self.running.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self.running.stdin.flush()
            line = self.running.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Missing(f"its process ended with exit code {self.running.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Missing(answer["error"])
        self.memory = answer.pop("memory", 0)
        return answer

    def close(self) -> None:
        """End it."""
        self.running.stdin.close()
        self.running.stdout.close()
        self.running.kill()
        self.running.wait()


class Busy:
    """A process that takes a whole core while the `with` block runs; it does not run between them."""

    def __init__(self) -> None:
        self.core = max(os.sched_getaffinity(0))
        dies = "import ctypes; ctypes.CDLL(None).prctl(1, 9)"  # with the one who started it, even where that is killed
        code = f"{dies}\nimport os; os.sched_setaffinity(0, {{{self.core}}}); print(flush=True)\nwhile True: pass"
        self.running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        self.running.stdout.readline()
        self._stop()

    def _stop(self) -> None:
        self.running.send_signal(signal.SIGSTOP)

    def __enter__(self) -> Busy:
        self.running.send_signal(signal.SIGCONT)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def close(self) -> None:
        """End it."""
        self.running.kill()
        self.running.wait()
        self.running.stdout.close()
