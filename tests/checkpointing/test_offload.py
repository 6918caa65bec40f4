"""Saved tensors in files and in page-locked memory: values, buffers that are used again, and the order of copies."""

from __future__ import annotations

import copy
import errno
import gc
import os
import threading

import pytest
import torch
from segments import OFFLOAD, compare, gradients
from torch import Tensor, nn
from torch.nn import functional as F

from bigkernels import apply_checkpointing, checkpoint, saved_activations
from bigkernels.checkpointing import _places, _saver, offload, resolve_policy
from bigkernels.checkpointing._places import _STEP, MappedFile, Slot
from bigkernels.checkpointing._saver import Saver
from bigkernels.memory import peak


@pytest.fixture
def pool(tmp_path, monkeypatch) -> MappedFile:
    """One of this test's own, which policies with its directory use."""
    found = MappedFile(str(tmp_path))
    monkeypatch.setattr(_places, "_mapped", lambda directory: found)
    return found


def free(pool: MappedFile) -> int:
    return sum(size * len(buffers) for size, buffers in pool.free.items())


def block(x: Tensor, w: Tensor) -> Tensor:
    return x + F.silu(x @ w) @ w.T


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 5, 4096, _STEP // 4, _STEP // 4 + 1, 3 * _STEP // 4 + 7])
def test_values(pool, dtype, count: int) -> None:
    flat = torch.randn(count).to(dtype)
    slot = pool.put(flat)
    slot.fetch()
    for _ in range(2):
        out = slot.get()
        assert torch.equal(out, flat) and out.dtype == dtype
        out.zero_()  # it is a copy
    assert slot.size % _STEP == 0 and slot.size >= flat.nbytes


def test_slots_do_not_overlap(pool) -> None:
    flats = [torch.full((_STEP // 4 + i,), float(i)) for i in range(8)]
    slots = [pool.put(f) for f in flats]
    assert all(torch.equal(s.get(), f) for s, f in zip(slots, flats, strict=True))
    assert os.fstat(pool.file.fileno()).st_size == pool.held == sum(s.size for s in slots)


def test_buffers_are_used_again(pool) -> None:
    policy = offload(min_nbytes=0)
    x, w = torch.randn(256, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)
    held = []
    for _ in range(4):
        y = x
        for _ in range(3):
            y = checkpoint(block, y, w, policy=policy)
        gradients(y, [x, w])
        del y
        held.append(pool.held)
        assert free(pool) == pool.held
    assert held[0] > 0 and len(set(held)) == 1


def test_buffers_fit_nearby_sizes(pool) -> None:
    """Sequences of all lengths do not each have a buffer of their own."""
    for length in range(20, 9, -1):
        pool.put(torch.ones(length * _STEP // 4))
    assert pool.held == 20 * _STEP
    small = pool.put(torch.ones(_STEP // 4))  # the free one is twenty times as large
    assert pool.held == 21 * _STEP and small.size == _STEP


def test_nothing_leaks(pool, tmp_path) -> None:
    """Graphs that are dropped, fail, or have been walked give their buffers back at once."""
    gc.disable()
    try:
        x, w = torch.randn(256, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)
        checkpoint(block, x, w, policy=OFFLOAD)
        assert free(pool) == pool.held > 0
        with pytest.raises(KeyError), saved_activations(OFFLOAD):
            y = block(x, w)
            raise KeyError
        del y
        assert free(pool) == pool.held
        out = checkpoint(block, x * 1, w, policy=OFFLOAD)
        gradients(out, [x, w], retain_graph=True)
        assert free(pool) < pool.held
        gradients(out, [x, w])
        assert free(pool) == pool.held
    finally:
        gc.enable()
    assert not list(tmp_path.iterdir()), "the file has a name"


def test_a_full_disk_is_an_error(pool, monkeypatch) -> None:
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    x, w = torch.randn(256, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)
    with pytest.raises(OSError, match="No space"):
        checkpoint(block, x, w, policy=OFFLOAD)
    assert pool.held == 0
    monkeypatch.undo()


def test_a_directory_that_is_not_there(tmp_path) -> None:
    x = torch.randn(256, 512, requires_grad=True)
    with pytest.raises(FileNotFoundError):
        checkpoint(torch.exp, x, policy=offload(tmp_path / "none", min_nbytes=0))


def test_files_lie_where_they_should(tmp_path) -> None:
    x = torch.randn(256, 512, requires_grad=True)
    out = checkpoint(lambda x: (x * 1).exp(), x, policy=offload(tmp_path, min_nbytes=0))
    files = [
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")
    ]  # noqa: E501
    assert any(f.startswith(str(tmp_path)) for f in files)
    assert torch.equal(*gradients(out, [x]), *gradients(x.exp(), [x]))


def test_small_tensors_stay(pool) -> None:
    x, w = torch.randn(256, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)
    n = x.nbytes
    assert compare(block, (x * 1, w), [w], offload(min_nbytes=n + 1)) == [0] and pool.held == 0
    assert compare(block, (x * 1, w), [w], offload(min_nbytes=n)) == [0] and pool.held > 0


def test_memory_of_torch(pool) -> None:
    x, w = torch.randn(1024, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)
    ends = []
    for policy in (None, OFFLOAD):
        with peak() as p:
            out = x * 1
            for _ in range(4):
                out = block(out, w) if policy is None else checkpoint(block, out, w, policy=policy)
        ends.append(p.end)
        del out
    assert ends[0] >= 12 * x.nbytes and ends[1] <= 2 * x.nbytes, ends


@pytest.mark.parametrize("policy", [OFFLOAD, resolve_policy("int8") + OFFLOAD, resolve_policy("recompute") + OFFLOAD])
def test_the_segment_before_is_fetched(pool, policy, monkeypatch) -> None:
    """Backward in one segment brings what the one before it has put away, and no other."""
    log: list[tuple[str, int]] = []
    order: dict[int, int] = {}

    def noting(name, original):
        def run(slot):
            log.append((name, order.setdefault(id(slot), len(order))))
            return original(slot)

        return run

    for name in ("fetch", "get"):
        monkeypatch.setattr(_places._MappedSlot, name, noting(name, getattr(_places._MappedSlot, name)))
    x, w = torch.randn(256, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)
    y = x * 1
    for _ in range(3):
        y = checkpoint(block, y, w, policy=policy)
    log.clear()
    gradients(y, [x, w])
    fetched = [i for name, i in log if name == "fetch"]
    got = [i for name, i in log if name == "get"]
    assert fetched and len(fetched) == len(set(fetched)), "fetched twice"
    first = got.index(next(i for i in got if i in fetched))
    assert first > 0, "what the last segment keeps is needed at once"
    for i in fetched:
        assert log.index(("fetch", i)) < log.index(("get", i))


def test_prefetching_holds_no_segment() -> None:
    x, w = torch.randn(256, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)
    out = checkpoint(block, x * 1, w, policy=OFFLOAD)
    assert isinstance(_saver._last(), Saver)
    del out
    assert _saver._last() is None


def test_collected_while_another_is_taken(pool) -> None:
    """A slot may be freed by the collector at any point, also under the pool's lock."""
    slot = pool.put(torch.ones(8))
    with pool.lock:
        del slot
    assert free(pool) == pool.held


def test_a_model_in_a_context(pool) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    x = torch.randn(512, 64)
    expected = gradients(model(x), model.parameters())
    with saved_activations(OFFLOAD):
        out = model(x)
    assert all(map(torch.equal, gradients(out, model.parameters()), expected))


# ---- forks -----------------------------------------------------------------------------------------------------------


def wrong(model: nn.Module, plain: nn.Module, seed: int, steps: int) -> int:
    """Steps whose gradients are not those of a plain model."""
    count = 0
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(2048, 64, generator=generator)
        found, expected = (gradients(m(x), m.parameters()) for m in (model, plain))
        count += not all(map(torch.equal, found, expected))
    return count


def finish(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


@pytest.fixture
def forked(tmp_path):
    """One thread, as in every process that forks, and a model under a policy of this test's own file."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(3)))
    plain = copy.deepcopy(model)
    apply_checkpointing(model, offload(tmp_path, min_nbytes=0))
    yield model, plain
    torch.set_num_threads(before)


def child(run) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(run())
        finally:
            os._exit(99)
    return pid


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_parent_and_children_train_at_once(forked) -> None:
    model, plain = forked
    assert wrong(model, plain, 0, 1) == 0  # buffers are there and free
    children = [child(lambda seed=seed: wrong(model, plain, seed, 5)) for seed in (1, 2)]
    assert wrong(model, plain, 3, 5) == 0
    assert finish(children) == [0, 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_graph_that_both_walk(forked) -> None:
    """What was put away before the fork stays as it was for both, whatever either writes meanwhile."""
    model, plain = forked
    x = torch.randn(2048, 64)
    out, expected = model(x), gradients(plain(x), plain.parameters())

    def walk(seed: int) -> int:
        count = wrong(model, plain, seed, 3)
        found = gradients(out, model.parameters())
        return count + (not all(map(torch.equal, found, expected))) + wrong(model, plain, seed, 2)

    children = [child(lambda: walk(1)), child(lambda: walk(2))]
    assert walk(3) == 0
    assert finish(children) == [0, 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_between_steps_keeps_the_parents_buffers(forked, tmp_path) -> None:
    model, plain = forked
    for _ in range(3):
        assert wrong(model, plain, 0, 1) == 0
        before = _places._mapped(str(tmp_path))
        assert finish([child(lambda: 0)]) == [0]
        assert _places._mapped(str(tmp_path)) is before and free(before) == before.held > 0
    out = model(torch.randn(2048, 64))
    assert finish([child(lambda: int(bool(_places._files)))]) == [0]
    assert _places._mapped(str(tmp_path)) is not before
    del out
    assert not before.free and before.closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_uses_a_pool(forked, tmp_path) -> None:
    model, plain = forked
    wrong(model, plain, 0, 1)
    stop = threading.Event()

    def busy() -> None:
        pool = _places._mapped(str(tmp_path))
        while not stop.is_set():
            pool.put(torch.ones(8))

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        children = [child(lambda: wrong(model, plain, 1, 1)) for _ in range(4)]
        assert finish(children) == [0] * 4
    finally:
        stop.set()
        thread.join()


def test_workers_of_a_loader(forked) -> None:
    """Forked in the middle of training, and offloading themselves."""
    model, plain = forked

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return wrong(model, plain, i, 1)

    for _ in range(2):
        assert wrong(model, plain, 9, 1) == 0
        loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
        assert [int(b) for b in loader] == [0] * 4


# ---- page-locked memory ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_copies_are_in_order() -> None:
    """Values are right where the GPU is far behind the program, and buffers are written again meanwhile."""
    device = torch.device("cuda")
    w = [torch.randn(2048, 2048, device=device).div_(45).requires_grad_() for _ in range(6)]
    x = torch.randn(2048, 2048, device=device, requires_grad=True)
    busy = torch.randn(4096, 4096, device=device)

    def run(policy):
        y = x
        for each in w:
            for _ in range(3):
                busy @ busy  # what is saved next is not there yet when it is put away
            y = block(y, each) if policy is None else checkpoint(block, y, each, policy=policy)
        return gradients(y, [x, *w])

    expected = run(None)
    held = set()
    for _ in range(4):
        assert all(map(torch.equal, run(OFFLOAD), expected))
        held.add(_places._pinned(x.device).held)
    assert len(held) == 1
    for policy in ("recompute+offload", "int8+offload"):
        exact = "int8" not in policy
        for a, b in zip(run(resolve_policy(policy)), expected, strict=True):
            assert torch.equal(a, b) if exact else (a - b).norm() < 0.05 * b.norm()


@pytest.mark.gpu
def test_a_buffer_is_not_written_before_it_is_read() -> None:
    flat = torch.full((1 << 24,), 1.0, device="cuda")
    pool = _places._pinned(flat.device)
    slot = pool.put(flat)
    back: list[Tensor] = []
    for i in range(2, 20):
        slot.fetch()
        back.append(slot.get())  # not looked at before the end: nothing waits for the GPU
        del slot
        slot = pool.put(flat.fill_(i))
    assert float(slot.get().min()) == 19
    assert [float(b.min()) for b in back] == [float(b.max()) for b in back] == [float(i) for i in range(1, 19)]


@pytest.mark.gpu
def test_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    w = [torch.randn(1024, 1024, device=device, requires_grad=True) for _ in range(8)]
    x = torch.randn(8192, 1024, device=device)
    figures = []
    for policy in (None, OFFLOAD):
        with peak(device) as p:
            y = x
            for each in w:
                y = block(y, each) if policy is None else checkpoint(block, y, each, policy=policy)
        figures.append(p.end)
        del y
    assert figures[1] < 0.4 * figures[0]
    assert issubclass(_places._PinnedSlot, Slot)
