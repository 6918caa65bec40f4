"""One pytest session that tries many mutants: the tests are imported once, and each mutant gets a fork of the process.

A first fork runs every test without a mutant, which says how long each takes and which mutants it reaches. Each mutant
then meets the tests that reach it, quickest first, until one fails. At another instruction-set level the tests reach
the same lines: there only the tests that noticed a mutant run without it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

# Compiled graphs and child processes would run other code than this process's, references have no kernel, and what a
# schema promises is no result.
LEFT_OUT = re.compile(
    r"compile|opcheck|gradcheck|fallback|every_level|at_each_level|full_graph|without_kernels|second_deriv|references\.py"
    r"|cannot_serve|log_names|repeats_bit_for_bit|spawn|subprocess|new_process"
)
QUICK_SECONDS = 15  # of a mutant in a quick run
MEMORY = 3 << 30  # bytes a mutant may take beyond what the tests take


class Switch:
    """The number of the mutant that is on, and which ones were reached."""

    def __init__(self, library: Path | None) -> None:
        if library:
            loaded = ctypes.CDLL(str(library))
            self.number = ctypes.c_int.in_dll(loaded, "bk_mutant")
            size = ctypes.c_int.in_dll(loaded, "bk_mutants").value
            self.reached = (ctypes.c_ubyte * size).in_dll(loaded, "bk_mutant_reached")
        else:
            from bigkernels import _mutant

            self.number, self.reached = _mutant.number, _mutant.reached

    def take_reached(self) -> list[int]:
        seen, found, at = bytes(self.reached), [], -1
        while (at := seen.find(1, at + 1)) >= 0:
            found.append(at)
        for i in found:
            self.reached[i] = 0
        return found


class Session:
    def __init__(self, order: dict) -> None:
        self.order = order  # library, level, baselines, results, quick, operators: {name: {tests, mutants}}

    def items_of(self, operator: dict, items: list[pytest.Item]) -> list[pytest.Item]:
        patterns = {path: re.compile(pattern) for path, pattern in operator["tests"].items()}

        def wanted(item: pytest.Item) -> bool:
            path, _, name = item.nodeid.partition("::")
            pattern = next((p for start, p in patterns.items() if path.startswith(start)), None)
            return pattern is not None and bool(pattern.search(name))

        found = [item for item in items if wanted(item)]
        quick = self.order["quick"]
        return found[:: max(1, len(found) // quick)] if quick else found

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [
            item
            for item in items
            if not LEFT_OUT.search(item.nodeid)
            and not {"isa", "lower_isa"} & set(item.fixturenames)
            and not any(mark.name in ("gpu", "skip") for mark in item.iter_markers())
        ]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} files could not be imported")
        switch = Switch(self.order["library"] and Path(self.order["library"]))
        switch.take_reached()
        killed: set[int] = set()
        for name, operator in self.order["operators"].items():
            items = self.items_of(operator, session.items)
            tests, known_to_pass = self.baseline(name, items, switch)
            for mutant in operator["mutants"]:
                if mutant["number"] in killed:
                    continue
                wanted = {mutant["number"], *mutant.pop("stand_ins")}
                reach = sorted((t, i) for i, (ok, t, reached) in enumerate(tests) if ok and wanted & set(reached))
                if self.order["quick"]:
                    sums = itertools.accumulate(t for t, _ in reach)
                    reach = [r for r, total in zip(reach, sums, strict=True) if total < QUICK_SECONDS]
                record = _try(mutant["number"], reach, items, switch, known_to_pass)
                if record["status"] == "killed":
                    killed.add(mutant["number"])
                record |= mutant | {"level": self.order["level"], "operator": name}
                with open(self.order["results"], "a") as results:
                    results.write(json.dumps(record) + "\n")
        return True

    def baseline(self, operator: str, items: list[pytest.Item], switch: Switch) -> tuple[list, dict[int, bool] | None]:
        """Of each test: does it pass, its seconds, what it reaches; and, of another level's, which pass here."""
        path = Path(f"{self.order['baselines']}-{operator}.json")
        known = json.loads(path.read_text()) if path.exists() else {}
        if self.order["first"]:
            missing = [item for item in items if item.nodeid not in known]
            found = _forked(lambda send: _measure(missing, switch, send), 3600)[1]
            if len(found) != len(missing):
                raise RuntimeError(f"without a mutant the tests stopped at {missing[len(found)].nodeid}")
            known |= {item.nodeid: value for item, value in zip(missing, found, strict=True)}
            path.write_text(json.dumps(known))
        tests = [known.get(item.nodeid, (False, 0.0, [])) for item in items]
        failed = [item.nodeid for item, (ok, *_) in zip(items, tests, strict=True) if not ok and item.nodeid in known]
        seconds = sum(t for _, t, _ in tests)
        print(f"{operator} at {self.order['level']}: {len(items)} tests in {seconds:.0f} s,", end=" ")
        print(f"failing without a mutant: {failed or 'none'}", flush=True)
        return tests, None if self.order["first"] else {}


def _measure(items: list[pytest.Item], switch: Switch, send) -> None:
    for item in items:
        start = time.process_time()
        ok = _passes(item)
        send((ok, round(time.process_time() - start, 4), switch.take_reached()))


def _passes(item: pytest.Item) -> bool:
    reports = runtestprotocol(item, nextitem=None, log=False)
    return not any(report.failed for report in reports)


def _try(number: int, reach: list, items: list[pytest.Item], switch: Switch, known: dict[int, bool] | None) -> dict:
    """What becomes of a mutant under tests as (seconds, which). known: which of them pass without it, if not all."""
    start = time.monotonic()

    def run(send) -> None:
        switch.number.value = number
        for t, i in reach:
            send(i)
            signal.setitimer(signal.ITIMER_PROF, 2 + 10 * t)  # ends the process
            if not _passes(items[i]):
                send("failed")
                return
        send("passed")

    while reach:
        status, sent = _forked(run, 60 + 60 * sum(t for t, _ in reach))
        if sent and sent[-1] == "passed":
            break
        failed = bool(sent) and sent[-1] == "failed"
        last = next((i for i in reversed(sent) if isinstance(i, int)), reach[0][1])
        if known is not None and last not in known:
            known[last] = _forked(lambda send: send(_passes(items[last])), 600)[1] == [True]  # noqa: B023
        if known is None or known[last]:
            took = round(time.monotonic() - start, 2)
            how = "failed" if failed else status
            return {"status": "killed", "how": how, "by": items[last].nodeid, "seconds": took}
        reach = [(t, i) for t, i in reach if i != last]
    if not reach:
        return {"status": "not reached"}
    return {"status": "survived", "tests": len(reach), "seconds": round(time.monotonic() - start, 2)}


def _forked(run, wall: float) -> tuple[str, list]:
    """What a function sends from a fork of this process, one JSON line each, and how the fork ended."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        try:
            run(lambda value: os.write(write_end, (json.dumps(value) + "\n").encode()))
        except BaseException:
            os._exit(3)
        os._exit(0)
    os.close(write_end)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(int(wall))
    with open(read_end, encoding="utf-8", errors="replace") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(pid, 0)
    signal.alarm(0)
    lines = [json.loads(line) for line in sent.splitlines() if line.endswith(("]", '"', "e")) or line.isdigit()]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        slow = number in (signal.SIGPROF, signal.SIGKILL)
        return "no end" if slow else f"crash ({signal.Signals(number).name})", lines
    return f"exit {os.WEXITSTATUS(status)}", lines


if __name__ == "__main__":
    order = json.loads(Path(sys.argv[1]).read_text())
    paths = {path for operator in order["operators"].values() for path in operator["tests"]}
    off = [word for name in ("cacheprovider", "faulthandler", "benchmark", "xdist") for word in ("-p", f"no:{name}")]
    sys.exit(pytest.main([*sorted(paths), "-q", "-s", *off], plugins=[Session(order)]))
