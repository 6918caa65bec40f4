"""What the scripts for a GPU share: the device, or the tests' driver that launches nothing in its place."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    rehearse = "rehearse: compile for sm_90 and launch nothing; results and times mean nothing"
    parser.add_argument("--without-device", action="store_true", help=rehearse)
    parser.add_argument("--seconds", type=float, default=0.0, help="stop before the next part after so long")
    return parser


@contextlib.contextmanager
def device(rehearsed: bool) -> Iterator[str]:
    """The name of the device to put tensors on."""
    if not rehearsed:
        if not torch.cuda.is_available():
            sys.exit("there is no CUDA device here; --without-device rehearses")
        yield "cuda"
        return
    from driver_without_device import without_device

    torch.set_num_threads(1)
    with without_device(90):
        yield "cpu"


def facts() -> None:
    import triton

    print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        print(p.name, f"{p.major}.{p.minor}", p.multi_processor_count, "multiprocessors", p.total_memory >> 20, "MiB")
        with contextlib.suppress(Exception):
            print("driver", torch.cuda.driver_version(), "cuDNN", torch.backends.cudnn.version())


class Clock:
    """Tells parts whether there is time for them."""

    def __init__(self, seconds: float):
        self.begin, self.seconds = time.monotonic(), seconds

    @property
    def spent(self) -> float:
        return time.monotonic() - self.begin

    def over(self) -> bool:
        return bool(self.seconds) and self.spent > self.seconds


class Timer:
    """Microseconds of a step: of the device, from replays of a CUDA graph where the step can be captured, else queued
    behind a sleep; and of the host.
    """

    def __init__(self, rehearsed: bool):
        self.rehearsed = rehearsed

    def __call__(self, step: Callable[[], object], bytes: int = 0) -> tuple[float, float]:
        for _ in range(4):
            step()
        if self.rehearsed:
            return float("nan"), float("nan")
        torch.cuda.synchronize()
        host = self._host(step)
        try:
            return self._replayed(step), host
        except (RuntimeError, AssertionError):  # it waits for the device, or copies from it
            torch.cuda.synchronize()
            from bigkernels.bench.timing import CudaTimer

            timer = CudaTimer(cold=False)
            return min(timer(step, 3) for _ in range(5)) * 1e6, host

    @staticmethod
    def _host(step: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(5):
            torch.cuda._sleep(20_000_000)
            begin = time.perf_counter()
            for _ in range(10):
                step()
            best = min(best, (time.perf_counter() - begin) / 10)
            torch.cuda.synchronize()
        return best * 1e6

    @staticmethod
    def _replayed(step: Callable[[], object]) -> float:
        graph, times = torch.cuda.CUDAGraph(), 5
        with torch.cuda.graph(graph):
            for _ in range(times):
                step()
        best = float("inf")
        for _ in range(6):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / times)
        return best * 1e3
