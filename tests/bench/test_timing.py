from __future__ import annotations

import gc
import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch

from bigkernels.bench import timing
from bigkernels.bench.memory import extra_peak
from bigkernels.bench.timing import CpuTimer, Statistics, interleave


def record(seconds: dict[str, float], order: list[str]):
    """A timer that claims given times and writes down whom it timed how often."""

    def timer(step, repeats):
        order.append((step(), repeats))
        return seconds[step()]

    return timer


def test_candidates_take_turns():
    order = []
    steps = {"a": lambda: "a", "b": lambda: "b", "c": lambda: "c"}
    found = interleave(steps, record({"a": 1.0, "b": 2.0, "c": 3.0}, order), rounds=4, seconds=0)
    assert [name for name, _ in order[3:]] == ["a", "b", "c"] * 4
    assert found == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [3.0] * 4}


def test_short_steps_are_repeated_within_a_sample():
    order = []
    interleave({"short": lambda: "short", "long": lambda: "long"}, record({"short": 1e-5, "long": 0.5}, order),
               rounds=1, seconds=0)  # fmt: skip
    assert order[2:] == [("short", math.ceil(1e-3 / 1e-5)), ("long", 1)]


def test_one_that_takes_long_is_timed_once():
    order = []
    steps = {"a": lambda: "a", "slow": lambda: "slow"}
    found = interleave(steps, record({"a": 1.0, "slow": 99.0}, order), rounds=3, seconds=0, once={"slow"})
    assert [name for name, _ in order] == ["a", "slow", *["a"] * 3]
    assert found == {"a": [1.0] * 3, "slow": [99.0]}
    assert interleave({"slow": steps["slow"]}, record({"slow": 9.0}, []), rounds=3, seconds=1, once={"slow"}) == {
        "slow": [9.0]
    }


def test_turns_go_on_until_the_time_is_over(monkeypatch):
    clock = itertools.count()  # each look at it takes a second
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock.__next__))
    found = interleave({"a": lambda: "a"}, record({"a": 1.0}, []), rounds=1, seconds=5)
    assert len(found["a"]) == 5


def test_garbage_collection_is_restored_also_after_an_error():
    def fails():
        raise RuntimeError("broken step")

    calls = iter([lambda: None])

    def step():
        return next(calls, fails)()

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="broken step"):
        interleave({"a": step}, CpuTimer(), rounds=5, seconds=0)
    assert gc.isenabled()


def test_cpu_timer_gives_the_time_of_one_step():
    calls = []
    begin = time.perf_counter()
    per_step = CpuTimer()(lambda: calls.append(sum(range(20000))), 10)
    assert len(calls) == 10
    assert 1e-6 < per_step <= (time.perf_counter() - begin) / 10


def test_statistics():
    found = Statistics.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.q1, found.q3, found.least, found.rounds) == (3.0, 2.0, 4.0, 1.0, 5)
    assert found.spread == pytest.approx(2 / 3)
    assert Statistics.of([7.0]) == Statistics(7.0, 7.0, 7.0, 7.0, 1)


def test_extra_memory_is_the_peak_within_a_step():
    held = torch.ones(1000)

    def step():
        first = held + 1.0  # 4000 bytes
        second = first.double()  # 8000 more
        del first
        return second[:10].clone()  # less than what was given back

    peak = extra_peak(step, "cpu")
    assert 12000 <= peak < 12200  # scalars on the way
