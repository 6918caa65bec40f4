"""Checks that several processes go through together.

A test file registers functions as checks, and is also the program that the processes run: each of them goes through all
checks, so that starting them, which takes longest, happens once::

    checks = Checks(__file__, ranks=4)

    @checks("one", "two")
    def sums(case: str) -> None: ...

    outcomes = checks.fixture()

    @pytest.mark.parametrize("name", checks.names)
    def test_ranks(name, outcomes):
        checks.judge(outcomes[name])

    if __name__ == "__main__":
        checks.main()
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120.0  # seconds without news after which the processes are taken to hang; a check takes a few at most


class Checks:
    def __init__(self, file: str, ranks: int, limit: float = LIMIT):
        self._file, self.ranks, self._limit = Path(file), ranks, limit
        self._checks: dict[str, Callable[[], None]] = {}

    def __call__(self, *cases: str) -> Callable:
        """Register a function as a check, or as one a case."""

        def register(f: Callable) -> Callable:
            for case in cases:
                self._checks[f"{f.__name__}[{case}]"] = lambda case=case: f(case)
            if not cases:
                self._checks[f.__name__] = f
            return f

        return register

    @property
    def names(self) -> list[str]:
        return list(self._checks)

    def judge(self, error: str | None) -> None:
        if error is not None:
            pytest.fail(error, pytrace=False)

    def fixture(self) -> Callable:
        """What became of each check that a run asks for: None, or the error."""

        @pytest.fixture(scope="module")
        def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
            if not dist.is_available() or not dist.is_gloo_available():
                pytest.skip("this torch has no gloo")
            names = [
                item.callspec.params["name"]
                for item in request.session.items
                if item.path == self._file and "outcomes" in item.fixturenames
            ]
            found: dict[str, str | None] = {}
            while len(found) < len(names):
                found |= self._until_one_fails(tmp_path_factory.mktemp("ranks"), names[len(found) :])
            return found

        return outcomes

    def main(self) -> None:
        """Go through the checks up to the first that fails; what became of each goes to a file, a line a check."""
        rank, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
        torch.set_num_threads(1)
        os.environ["FOLDER"] = str(folder)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=self.ranks,
            timeout=datetime.timedelta(seconds=self._limit),
        )
        with (folder / f"rank{rank}").open("w") as out:
            for name in names:
                error, begin = None, time.monotonic()
                try:
                    torch.manual_seed(0)
                    self._checks[name]()
                    dist.barrier()  # passed when all ranks have
                except BaseException:
                    error = traceback.format_exc()
                print(json.dumps([name, error, time.monotonic() - begin]), file=out, flush=True)
                if error:
                    # Others may be in the middle of a collective: there is no going on together.
                    os._exit(1)
        dist.destroy_process_group()

    def _until_one_fails(self, folder: Path, names: list[str]) -> dict[str, str | None]:
        paths = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        logs = [(folder / f"log{rank}").open("w+") for rank in range(self.ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(self._file), str(rank), str(folder), *names],
                env=environment,
                stdout=log,
                stderr=log,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            heard, latest = 0, time.monotonic()
            while any(process.poll() is None for process in processes):
                time.sleep(0.05)
                now = sum(path.stat().st_size for path in folder.glob("rank*"))
                if now != heard:
                    heard, latest = now, time.monotonic()
                gone = any(process.returncode for process in processes)
                if time.monotonic() - latest > (5.0 if gone else self._limit):
                    break
        finally:
            hang = [process.poll() is None for process in processes]
            for process in processes:
                process.kill()
                process.wait()
        told: list[list] = []
        for rank in range(self.ranks):
            path = folder / f"rank{rank}"
            told.append([json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [])
        found: dict[str, str | None] = {}
        for name in names:
            errors = []
            for rank in range(self.ranks):
                error = next((e for n, e, _ in told[rank] if n == name), "no news")
                if error == "no news":
                    logs[rank].seek(0)
                    error = f"{'it hung' if hang[rank] else 'it ended'} before its end\n{logs[rank].read()[-2000:]}"
                if error is not None:
                    errors.append(f"rank {rank}: {error}")
            found[name] = "\n".join(errors) or None
            if errors:
                break
        for log in logs:
            log.close()
        return found
