from __future__ import annotations

import gc
import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch

from bigkernels.bench import limits, timing
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
    interleave(
        {"short": lambda: "short", "long": lambda: "long"},
        record({"short": 1e-5, "long": 0.5}, order),
        rounds=1,
        seconds=0,
    )
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


class Device:
    """A device with a clock: what is queued runs in order, and the host goes on meanwhile."""

    def __init__(self):
        self.host = self.free = 0.0

    def queue(self, seconds: float) -> None:
        self.free = max(self.free, self.host) + seconds

    def event(self, **options):
        device = self

        class Event:
            def record(self):
                device.host += 1e-6
                self.at = max(device.free, device.host)

            def synchronize(self):
                device.host = max(device.host, device.free)

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        return Event()


@pytest.fixture
def gpu(monkeypatch):
    device = Device()
    monkeypatch.setattr(timing.torch.cuda, "Event", device.event)
    monkeypatch.setattr(timing, "gpu_sleep", lambda cycles: device.queue(cycles / 2e9))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: device.host))
    return device


def test_cuda_timer_leaves_launches_out(gpu):
    def step():  # ten kernels of 5 us, each of which takes the host 40 us
        for _ in range(10):
            gpu.host += 40e-6
            gpu.queue(5e-6)

    timer = timing.CudaTimer(cold=False)
    assert timer(step, 1) == pytest.approx(50e-6, rel=0.05)
    assert timer(step, 20) == pytest.approx(50e-6, rel=0.01)
    assert timer.host[step] == pytest.approx(400e-6, rel=0.01)


def test_cuda_timer_of_a_step_that_waits(gpu):
    def step():
        gpu.queue(30e-6)
        gpu.host = max(gpu.host, gpu.free) + 10e-6

    assert timing.CudaTimer(cold=False)(step, 3) == pytest.approx(40e-6, rel=0.5)


def test_limits_are_measured_with_values_that_differ():
    values = limits._random(100, 100, dtype=torch.bfloat16, device="cpu")
    assert values.unique().numel() > 100
