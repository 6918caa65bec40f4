"""`bigkernels.memory`. What is about a whole process runs in one of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext

import pytest
import torch

import bigkernels
from bigkernels import memory
from bigkernels.memory import PoolStats, peak

MB = 1 << 20

PRELUDE = """
import gc, os, resource, sys, threading, torch, bigkernels
MB = 1 << 20
torch.set_num_threads(2)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def block(size, value=1):
    return torch.full((size,), value, dtype=torch.uint8)
"""


def process(snippet: str, *arguments: str) -> list[str]:
    """What a snippet prints in a process of its own, by words."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(snippet), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-3000:])
    return done.stdout.split()


class TestReuseMemory:
    SNIPPET = """
        if sys.argv[1] == "reuse":
            print(bigkernels.memory.reuse_memory())
        x = torch.ones(80 * MB, dtype=torch.uint8)  # beyond the largest block that glibc keeps by itself
        for _ in range(4):
            x.clone()
        before = faults()
        for _ in range(8):
            x.clone()
        print(faults() - before)
    """

    def page_faults(self, how: str) -> tuple[bool, int]:
        *took, count = process(self.SNIPPET, how)
        return took == ["True"], int(count)

    def test_large_tensors_take_over_freed_pages(self):
        took, count = self.page_faults("reuse")
        if not took:
            pytest.skip("the C library here is not glibc")
        _, fresh = self.page_faults("not")
        assert count < fresh / 4, (count, fresh)  # the heap may still grow once


@pytest.fixture
def pool(library):
    handle = bigkernels.memory.pool()
    if not handle.active:
        pytest.skip(f"no pool here: {handle.reason}")
    yield handle
    handle.off()


def held(stats: PoolStats) -> tuple[int, int]:
    return stats.in_use, stats.cached


class TestPool:
    def test_reuse_is_counted(self, pool):
        pool.trim()
        before = pool.stats()
        for _ in range(10):
            torch.ones(5 * MB, dtype=torch.uint8)
        after = pool.stats()
        assert (after.hits - before.hits, after.misses - before.misses) == (9, 1)
        assert after.cached >= 5 * MB
        assert after.in_use == before.in_use
        assert after.peak >= 5 * MB
        assert after.held == after.in_use + after.cached <= after.reserved

    def test_small_tensors_are_left_to_malloc(self, pool):
        before = pool.stats()
        torch.ones(200 * 1024, dtype=torch.uint8)
        torch.empty(0)
        assert pool.stats() == before

    @pytest.mark.parametrize("size", [256 * 1024, 256 * 1024 + 1, 999_983, 2 * MB, 3 * MB + 5, 70 * MB + 63])
    def test_blocks_are_aligned_and_little_larger(self, pool, size):
        before = pool.stats().in_use
        x = torch.empty(size, dtype=torch.uint8)
        assert x.data_ptr() % 64 == 0
        assert size <= pool.stats().in_use - before <= size + max(size // 16, 16384) + 16384

    def test_freed_neighbours_are_one_block(self, pool):
        pool.trim()
        parts = [torch.ones(MB, dtype=torch.uint8) for _ in range(64)]
        random.Random(0).shuffle(parts)
        while parts:
            parts.pop()
        before = pool.stats()
        torch.empty(60 * MB, dtype=torch.uint8)
        assert pool.stats().misses == before.misses

    def test_contents_survive_threads(self, pool):
        wrong = []

        def work(seed: int) -> None:
            draw = random.Random(seed)
            live: list[tuple[torch.Tensor, int]] = []
            for _ in range(400):
                if live and draw.random() < 0.5:
                    x, value = live.pop(draw.randrange(len(live)))
                    if not bool((x == value).all()):
                        wrong.append(value)
                else:
                    value = draw.randrange(2**31)
                    live.append((torch.full((int(2 ** draw.uniform(12, 19)),), value, dtype=torch.int32), value))
            wrong.extend(value for x, value in live if not bool((x == value).all()))

        before = pool.stats()
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert pool.stats().hits + pool.stats().misses > before.hits + before.misses + 200
        assert pool.stats().in_use == before.in_use

    def test_tensors_outlive_the_switch(self, library):
        first = torch.full((4 * MB,), 1, dtype=torch.uint8)
        handle = bigkernels.memory.pool()
        if not handle.active:
            pytest.skip(handle.reason)
        in_use = handle.stats().in_use
        second = torch.full((4 * MB,), 2, dtype=torch.uint8)
        assert handle.stats().in_use == in_use + 4 * MB
        handle.off()
        assert not handle.active
        third = torch.full((4 * MB,), 3, dtype=torch.uint8)
        assert handle.stats().in_use == in_use + 4 * MB
        with bigkernels.memory.pool() as again:
            assert again.active
            assert [int(x.long().sum()) // (4 * MB) for x in (first, second, third)] == [1, 2, 3]
            del first, third
            fourth = torch.full((4 * MB,), 4, dtype=torch.uint8)
        assert second.eq(2).all()
        del second
        assert handle.stats().in_use == in_use + 4 * MB
        assert fourth.eq(4).all()
        del fourth
        assert held(handle.stats()) == (in_use, 0)

    def test_leaving_puts_back_what_was(self, pool):
        with bigkernels.memory.pool(limit=0) as inner:
            assert inner.active
            torch.ones(8 * MB, dtype=torch.uint8)
            assert pool.stats().cached == 0
        torch.ones(8 * MB, dtype=torch.uint8)
        assert pool.stats().cached >= 8 * MB
        pool.off()
        with bigkernels.memory.pool():
            pass
        before = pool.stats()
        torch.ones(8 * MB, dtype=torch.uint8)
        assert pool.stats() == before

    def test_limit_is_of_what_is_cached(self, pool):
        bigkernels.memory.pool(limit=20 * MB)
        live = [torch.ones(16 * MB, dtype=torch.uint8) for _ in range(4)]
        assert pool.stats().in_use >= 64 * MB
        while live:
            live.pop()
            assert pool.stats().cached <= 20 * MB
        assert pool.stats().cached > 16 * MB
        assert pool.stats().given_back > 0

    def test_trim_returns_what_it_gave_back(self, pool):
        pool.trim()
        torch.ones(32 * MB, dtype=torch.uint8)
        cached = pool.stats().cached
        assert pool.trim() == cached >= 32 * MB
        assert pool.stats().cached == 0
        assert pool.trim() == 0

    def test_without_huge_pages(self, pool):
        bigkernels.memory.pool(huge_pages=False)
        x = torch.ones(3 * MB + 1, dtype=torch.uint8)
        y = torch.ones(3 * MB + 1, dtype=torch.uint8)
        pool.trim()
        del x
        assert pool.trim() > 3 * MB - 65536  # but for the pages that it shares with its neighbours
        assert y.eq(1).all()

    def test_impossible_sizes_are_refused_as_before(self, pool):
        with pytest.raises(RuntimeError):
            torch.empty(2**60, dtype=torch.uint8)
        with pytest.raises(RuntimeError):
            torch.empty(2**44, dtype=torch.uint8)

    @pytest.mark.parametrize("limit", ["1", True, torch.tensor(3), None])
    def test_limit_of_a_wrong_type(self, limit, library):
        if limit is None:
            bigkernels.memory.pool(limit).off()
            return
        with pytest.raises(TypeError, match=r"memory\.pool: limit"):
            bigkernels.memory.pool(limit)

    @pytest.mark.parametrize("limit", [-1, -0.1, 1.5, float("nan")])
    def test_limit_out_of_range(self, limit):
        with pytest.raises(ValueError, match=r"memory\.pool"):
            bigkernels.memory.pool(limit)

    def test_no_library_is_a_reason(self, monkeypatch):
        from bigkernels import _load, memory

        monkeypatch.setattr(memory, "cpu_library", lambda: _load.Library(None, "it was not built"))
        with bigkernels.memory.pool() as handle:
            assert (handle.active, handle.reason) == (False, "it was not built")
            assert handle.trim() == 0
            assert handle.stats() == PoolStats(0, 0, 0, 0, 0, 0, 0)
            handle.off()


class TestPoolOfAProcess:
    """Page faults, resident memory, forks and exits."""

    def test_page_faults_fall(self, pool):
        counts = process("""
            def count():
                block(64 * MB)
                before = faults()
                for _ in range(10):
                    block(64 * MB)
                return faults() - before
            print(count())
            with bigkernels.memory.pool(huge_pages=False):
                print(count())
            print(count())
        """)
        off, on, off_again = map(int, counts)
        assert on < min(off, off_again) / 10, counts

    def test_resident_memory_falls(self, pool):
        grown, trimmed, limited, off = map(
            int,
            process("""
            pool = bigkernels.memory.pool()
            block(200 * MB)
            start = resident()
            print(start)
            pool.trim()
            print(resident() - start)
            bigkernels.memory.pool(limit=50 * MB)
            before = resident()
            block(200 * MB)
            print(resident() - before)
            pool.off()
            print(resident() - before)
        """),
        )
        assert grown > 200 * MB
        assert -210 * MB < trimmed < -190 * MB
        assert 40 * MB < limited < 60 * MB
        assert off < 10 * MB

    def test_fragmentation_is_bounded(self, pool):
        """Blocks that keep growing fit no freed one; what is held stays near what is used at most."""
        peak, held = map(
            int,
            process("""
            pool = bigkernels.memory.pool()
            old, keep = None, []
            for i in range(150):
                keep.append(block(300 * 1024))  # a live neighbour: freed blocks cannot be joined
                old = block((4 + i // 5) * MB)
            print(pool.stats().peak, pool.stats().held)
        """),
        )
        assert held <= peak * 9 // 8 + 80 * MB

    def test_forked_processes_use_it_too(self, pool):
        assert process("""
            pool = bigkernels.memory.pool()
            live, stop = block(8 * MB, 7), threading.Event()
            def churn():
                while not stop.is_set():
                    block(MB)
            threads = [threading.Thread(target=churn) for _ in range(3)]
            for t in threads: t.start()
            good = 0
            for i in range(20):
                pid = os.fork()
                if not pid:
                    x = torch.empty(3 * MB, dtype=torch.uint8)  # no loops in parallel: OpenMP does not survive a fork
                    x.numpy()[:] = i
                    y = torch.empty(9 * MB, dtype=torch.uint8)
                    y.numpy()[:] = 100
                    fine = (x.numpy() == i).all() and (live.numpy() == 7).all()
                    live.numpy()[:] = 0
                    del x, y, live
                    pool.trim()
                    os._exit(0 if fine else 1)
                good += os.waitpid(pid, 0)[1] == 0
            stop.set()
            for t in threads: t.join()
            print(good, bool(live.eq(7).all()))
        """) == ["20", "True"]

    @pytest.mark.parametrize("end", ["", "sys.exit(0)", "pool.off()", "del x; pool.trim()"])
    def test_exit_with_live_tensors(self, pool, end):
        assert process(f"""
            pool = bigkernels.memory.pool()
            x = block(4 * MB)
            torch.kept = [block(4 * MB), torch.nn.Linear(1000, 1000)]
            print(1)
            {end}
        """) == ["1"]

    def test_where_addresses_are_limited(self, pool):
        assert process("""
            in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (in_use + 700 * MB,) * 2)
            pool = bigkernels.memory.pool()
            print(pool.active, "ulimit" in pool.reason, int(block(4 * MB).sum()) // MB)
        """) == ["False", "True", "4"]

    def test_training_steps_are_bitwise_the_same(self, pool):
        first, second = process("""
            import hashlib
            from torch import nn
            def train():
                torch.manual_seed(0)
                layers = [nn.Linear(512, 1536), nn.GELU(), nn.Linear(1536, 512), nn.LayerNorm(512)] * 2
                model = nn.Sequential(nn.Embedding(1000, 512), *layers, nn.Linear(512, 1000))
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
                ids = torch.randint(1000, (2, 257))
                for _ in range(3):
                    logits = model(ids)
                    loss = bigkernels.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
                    q = logits[..., :512].unflatten(-1, (8, 64)).transpose(1, 2)
                    loss = loss + bigkernels.functional.attention(q, q, q, causal=True).square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                digest = hashlib.sha256()
                for p in model.parameters():
                    digest.update(p.detach().numpy().tobytes())
                return digest.hexdigest()
            print(train())
            with bigkernels.memory.pool() as pool:
                print(train())
                assert pool.stats().hits > 50
        """)
        assert first == second


class TestPeak:
    @pytest.mark.parametrize("pooled", [False, True])
    def test_by_hand(self, pooled, library):
        with bigkernels.memory.pool() if pooled else nullcontext():
            with peak() as p:
                a = torch.empty(MB, dtype=torch.uint8)
                b = torch.empty(5 * MB, dtype=torch.uint8)
                del a
                c = torch.empty(MB // 2, dtype=torch.uint8)
                del b
            assert (p.bytes, p.end) == (6 * MB, MB // 2)
            del c
        assert repr(p) == f"Peak(bytes={6 * MB}, end={MB // 2})"

    def test_nothing(self, device):
        with peak(device) as p:
            pass
        assert (p.bytes, p.end) == (0, 0)

    def test_both_devices_count_alike(self, device):
        with peak(device) as p:
            a = torch.empty(4 * MB, dtype=torch.uint8, device=device)
            del a
            b = torch.empty(2 * MB, dtype=torch.uint8, device=device)
        assert (p.bytes, p.end) == (4 * MB, 2 * MB)
        del b

    def test_regions_in_each_other(self, device):
        def empty(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.uint8, device=device)

        with peak(device) as outer:
            a = empty(4 * MB)
            with peak(device) as inner:
                b = empty(2 * MB)
                del b
                with peak(device) as innermost:
                    c = empty(MB)
            with peak(device) as second:
                del a
            d = empty(6 * MB)
        assert (outer.bytes, outer.end) == (7 * MB, 7 * MB)
        assert (inner.bytes, inner.end) == (2 * MB, MB)
        assert (innermost.bytes, innermost.end) == (MB, MB)
        assert (second.bytes, second.end) == (0, -4 * MB)
        del c, d

    def test_a_region_that_raises(self, device):
        with pytest.raises(KeyError), peak(device) as p:
            kept = torch.empty(MB, dtype=torch.uint8, device=device)
            raise KeyError
        assert (p.bytes, p.end) == (MB, MB)
        del kept
        with peak(device) as again:
            pass
        assert again.bytes == 0

    def test_backward(self):
        x = torch.ones(MB, requires_grad=True)
        with peak() as p:
            y = x.exp()  # saved for backward
            y.backward(torch.ones(()).expand(MB))
        assert p.end == 8 * MB + 4 or p.end == 8 * MB  # y and the gradient, and a scalar of the program
        assert 8 * MB <= p.bytes <= 8 * MB + 64

    def test_other_profilers_are_named(self):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            with pytest.raises(RuntimeError, match=r"memory\.peak: another profiler"), peak():
                pass
        with peak() as p:
            torch.empty(MB, dtype=torch.uint8)
        assert p.bytes == MB

    def test_other_devices_are_refused(self):
        with pytest.raises(ValueError, match=r"memory\.peak: device"), peak("meta"):
            pass


# ---- workspaces ------------------------------------------------------------------------------------------------------


@pytest.fixture
def attend(library):
    """A call with a workspace, in this thread; no workspace is there before or after."""
    from bigkernels import functional

    memory.release_workspaces()
    before = memory.limit_workspaces(512 << 20)
    q, k, v = torch.randn(3, 1, 2, 64, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def run() -> None:
        torch.testing.assert_close(functional.attention(q, k, v), expected)

    yield run
    memory.limit_workspaces(before)
    memory.release_workspaces()


def test_workspaces_are_kept_and_released(attend):
    assert memory.workspaces() == 0
    attend()
    kept = memory.workspaces()
    assert kept > 0
    attend()
    assert memory.workspaces() == kept
    assert memory.release_workspaces() == kept and memory.workspaces() == 0
    attend()
    assert memory.workspaces() == kept


def test_workspaces_have_a_limit(attend):
    assert memory.limit_workspaces(0) == 512 << 20
    for _ in range(2):
        attend()
        assert memory.workspaces() == 0
    assert memory.limit_workspaces(1 << 30) == 0
    attend()
    assert memory.workspaces() > 0
    memory.limit_workspaces(1)
    assert memory.workspaces() == 0


def test_workspaces_of_other_threads(attend):
    """They are released from any thread, while calls run; a thread that ends takes its own along."""
    stop, errors = threading.Event(), []

    def work() -> None:
        torch.set_num_threads(1)
        try:
            while not stop.is_set():
                attend()
        except BaseException as e:  # noqa: BLE001
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for _ in range(50):
        memory.release_workspaces()
    stop.set()
    for t in threads:
        t.join()
    assert not errors
    memory.release_workspaces()
    assert memory.workspaces() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_workspaces_after_a_fork(attend):
    """The child has those of its own thread, and not of threads that it does not have."""
    held, stop = threading.Event(), threading.Event()

    def other() -> None:
        torch.set_num_threads(1)
        attend()
        held.set()
        stop.wait()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    attend()
    own = memory.workspaces()
    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    try:
        assert memory.workspaces() == 2 * own
        pid = os.fork()
        if pid == 0:
            try:
                good = memory.workspaces() == own
                again = threading.Thread(target=attend)
                again.start()
                again.join()
                # Python's join comes before the system's end of the thread, which gives its workspaces back.
                until = time.monotonic() + 60
                while memory.workspaces() != own and time.monotonic() < until:
                    time.sleep(0.001)
                good = good and memory.release_workspaces() == own and memory.workspaces() == 0
                attend()
                os._exit(0 if good else 1)
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(before)


@pytest.mark.parametrize(("nbytes", "error"), [(1.5, TypeError), (True, TypeError), (-1, ValueError)])
def test_limits_of_workspaces_are_checked(nbytes, error):
    with pytest.raises(error, match="limit_workspaces"):
        memory.limit_workspaces(nbytes)
