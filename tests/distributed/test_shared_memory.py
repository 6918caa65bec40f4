"""Collectives through shared memory, gradients in 8 bits, experts over ranks and checkpoints, in four processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Checks
from torch import nn

import bigkernels
from bigkernels.distributed import (
    Int8Gradients,
    SharedMemoryGroup,
    count_traffic,
    expert_parallel,
    int8_gradients_hook,
    load_checkpoint,
    local_experts,
    save_checkpoint,
)
from bigkernels.distributed._segment import CHUNK, Segment, remove_orphans

checks = Checks(__file__, ranks=4)
outcomes = checks.fixture()

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)
SIZES = (0, 1, 3, 1000, CHUNK // 4 - 1, CHUNK // 4 + 5, CHUNK + 7)


_groups: dict[int, dist.ProcessGroup] = {}


def group(ranks: int = 4) -> dist.ProcessGroup:
    """Of the first ranks; all of them have to be asked for by every rank, in one order."""
    if not _groups:
        for n in (4, 2, 3):
            _groups[n] = dist.new_group(list(range(n)), backend="shared_memory")
    return _groups[ranks]


def values(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(100 * rank + size % 97)
    if dtype.is_floating_point:
        return torch.randn(size, generator=draw).to(dtype)
    return torch.randint(0, 9, (size,), generator=draw).to(dtype)


def total(parts: list[torch.Tensor], op) -> torch.Tensor:
    """Rank after rank, 16 bits in float32."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    combine = {dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.MIN: torch.minimum, dist.ReduceOp.PRODUCT: torch.mul}
    result = parts[0].to(wide)
    for part in parts[1:]:
        result = next((f for known, f in combine.items() if known == op), torch.add)(result, part.to(wide))
    return (result / len(parts) if op == dist.ReduceOp.AVG else result).to(dtype)


@checks("2", "3", "4")
def sums_to_the_last_bit(ranks: str) -> None:
    n, rank = int(ranks), dist.get_rank()
    mine = group(n)
    if rank >= n:
        return
    assert isinstance(mine, SharedMemoryGroup) and mine.segment is not None
    assert dist.get_backend(mine) == "shared_memory"
    for dtype in DTYPES:
        for size in SIZES if dtype in (torch.float32, torch.bfloat16) else SIZES[1:4]:
            everybody = [values(r, size, dtype) for r in range(n)]
            ops = [dist.ReduceOp.SUM]
            if size == 1000:
                ops += [dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT]
                ops += [dist.ReduceOp.AVG] if dtype.is_floating_point else []
            for op in ops:
                x = everybody[rank].clone()
                dist.all_reduce(x, op, group=mine)
                assert torch.equal(x, total(everybody, op)), (dtype, size, op)
            out = torch.empty(n * size, dtype=dtype)
            dist.all_gather_into_tensor(out, everybody[rank], group=mine)
            assert torch.equal(out, torch.cat(everybody))
            of_all = [torch.empty(size, dtype=dtype) for _ in range(n)]
            dist.all_gather(of_all, everybody[rank], group=mine)
            assert all(map(torch.equal, of_all, everybody))
            whole = [values(r, n * size, dtype) for r in range(n)]
            part = torch.empty(size, dtype=dtype)
            dist.reduce_scatter_tensor(part, whole[rank], group=mine)
            assert torch.equal(part, total(whole, dist.ReduceOp.SUM).chunk(n)[rank] if size else part)
            sent = everybody[1].clone() if rank == 1 else torch.zeros(size, dtype=dtype)
            dist.broadcast(sent, 1, group=mine)
            assert torch.equal(sent, everybody[1])


@checks()
def what_does_not_go_through_shared_memory() -> None:
    mine, rank = group(), dist.get_rank()
    x = torch.arange(12.0).view(3, 4).t() + rank  # not contiguous
    dist.all_reduce(x, group=mine)
    assert torch.equal(x, 4 * torch.arange(12.0).view(3, 4).t() + 6)
    flags = torch.tensor([rank == 2, False])
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=mine)
    assert flags.tolist() == [True, False]
    found = [None] * 4
    dist.all_gather_object(found, {"rank": rank}, group=mine)
    assert found == [{"rank": r} for r in range(4)]
    out = torch.empty(4)
    dist.all_to_all_single(out, torch.arange(4.0) + 10 * rank, group=mine)
    assert out.tolist() == [rank, rank + 10, rank + 20, rank + 30]
    if rank < 2:
        work = dist.isend(torch.ones(3), 1, group=mine) if rank == 0 else dist.irecv(out[:3], 0, group=mine)
        work.wait()
    work = dist.all_reduce(torch.ones(2), group=mine, async_op=True)
    assert work.wait() and work.is_completed() and work.get_future().value()[0].tolist() == [4.0, 4.0]
    with pytest.raises((ValueError, RuntimeError)):
        dist.all_gather_into_tensor(torch.empty(3), torch.ones(2), group=mine)
    _groups.clear()


@checks()
def nothing_is_left_in_the_file_system() -> None:
    assert group() is not None
    dist.barrier()
    mine = str(os.getpid())
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"bigkernels-{mine}-")]


@checks("ddp", "fsdp")
def training(wrapper: str) -> None:
    """With gradients that no order of sums rounds: the same bits as over gloo."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    found = []
    for over in (None, group()):
        torch.manual_seed(1)
        model: nn.Module = nn.Sequential(nn.Linear(33, 64), nn.ReLU(), nn.Linear(64, 5))
        if wrapper == "ddp":
            called = nn.parallel.DistributedDataParallel(model, process_group=over)
        else:
            called = fully_shard(model, mesh=DeviceMesh.from_group(over or dist.group.WORLD, "cpu"))
        optimizer = bigkernels.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            torch.manual_seed(10 * step + dist.get_rank())
            called(torch.randn(8, 33)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@checks()
def gradients_in_8_bits() -> None:
    """Close to the mean each time, the same on all ranks, and in the sum of many steps nothing is left out."""
    rank, size = dist.get_rank(), 5000
    state = Int8Gradients(group(), block_size=64)

    class Bucket:
        def __init__(self, t):
            self.t = t

        def buffer(self):
            return self.t

        def index(self):
            return 0

    sums = [torch.zeros(size), torch.zeros(size)]
    for step in range(20):
        everybody = [values(r + 7 * step, size, torch.float32) for r in range(4)]
        with count_traffic() as traffic:
            result = int8_gradients_hook(state, Bucket(everybody[rank].clone())).value()
        assert traffic.nbytes < 2 * 3 / 4 * size * 1.2
        mean = sum(everybody) / 4
        assert (result - mean).abs().max() < 0.1
        sums[0] += result
        sums[1] += mean
        of_all = [torch.empty(size) for _ in range(4)]
        dist.all_gather(of_all, result)
        assert all(torch.equal(result, t) for t in of_all)
        if step == 0:
            first = (result - mean).abs().max()
        if step == 10:  # as after loading a checkpoint
            other = Int8Gradients(group(), block_size=64)
            other.load_state_dict(state.state_dict())
            state = other
    assert first > 0.005 and (sums[0] - sums[1]).abs().max() < 3 * first
    bad = torch.ones(size)
    bad[100] = float("inf") if rank == 1 else 1.0
    assert not int8_gradients_hook(state, Bucket(bad)).value().isfinite().all()
    fine = int8_gradients_hook(state, Bucket(torch.ones(size))).value()
    assert fine.isfinite().all() and (fine - 1).abs().max() < 0.2
    model = nn.parallel.DistributedDataParallel(nn.Linear(9, 7))
    model.register_comm_hook(Int8Gradients(), int8_gradients_hook)
    torch.manual_seed(rank)
    x = torch.randn(16, 9)
    model(x).sum().backward()
    expected = x.sum(0).expand(7, 9).clone()
    dist.all_reduce(expected)
    rounding = 1.5 * x.abs().sum(0).max().item() / 127  # of what a rank gives and of the mean, at the largest scale
    torch.testing.assert_close(model.module.weight.grad, expected / 4, rtol=0.0, atol=max(rounding, 0.05))


@checks()
def the_rest_by_gloo_many_times() -> None:
    """Gloo's threads want the interpreter's lock when they let tensors go: who waits for them must not hold it."""
    rank, members = dist.get_rank(), group()
    x, y = torch.full((5120,), float(rank)), torch.empty(5120)
    for _ in range(400):
        dist.all_to_all_single(y, x, group=members)
        assert y.view(4, -1)[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
        parts = [torch.empty(5) for _ in range(4)]
        dist.all_to_all(parts, [torch.full((5,), 10.0 * rank + r) for r in range(4)], group=members)
        assert [t[0].item() for t in parts] == [10.0 * r + rank for r in range(4)]
        dist.gather(x[:3], [torch.empty(3) for _ in range(4)] if rank == 1 else None, group_dst=1, group=members)
        dist.scatter(y[:3], [x[:3] + r for r in range(4)] if rank == 2 else None, group_src=2, group=members)
        assert y[0] == 2 + rank
        z = x[:3].clone()
        dist.reduce(z, group_dst=3, group=members)
        assert rank != 3 or z[0] == 6
        if rank % 2:
            dist.recv(y, group_src=rank - 1, group=members)
            assert y[0] == rank - 1
        else:
            dist.send(x, group_dst=rank + 1, group=members)


@checks("float32", "bfloat16", "int8")
def experts_over_ranks(dtype: str) -> None:
    """Against all experts on one rank, with ranks that have no tokens and experts that nobody chose."""
    from bigkernels.ops.grouped_linear import grouped_linear
    from bigkernels.quantization import quantize_weight

    rank, num_experts, width, out_width, chosen_each = dist.get_rank(), 7, 32, 48, 2
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    weight = values(50, num_experts * out_width * width, torch.float32).view(num_experts, out_width, width).to(kind)
    counts = (5, 0, 11, 3)
    tokens = values(51, sum(counts) * width, torch.float32).view(-1, width).to(kind)
    draw = torch.Generator().manual_seed(2)
    chosen = torch.rand(len(tokens), num_experts - 1, generator=draw).argsort(1)[:, :chosen_each]  # not the last one
    routing = torch.rand(len(tokens), chosen_each, generator=draw)
    grad = values(52, len(tokens) * out_width, torch.float32).view(-1, out_width)
    span = slice(sum(counts[:rank]), sum(counts[: rank + 1]))

    if dtype == "int8":
        stored = quantize_weight(weight.reshape(-1, width), "int8")
        rows = local_experts(num_experts)
        part = stored.rows(rows.start * out_width, rows.stop * out_width)
        weight = stored.dequantize().view_as(weight)

    def whole(kind):
        w, x, r = (t.to(kind, copy=True).requires_grad_() for t in (weight, tokens, routing))
        parts = [nn.functional.linear(x, w[e]) for e in range(num_experts)]
        every = torch.stack(parts, 1).gather(1, chosen[..., None].expand(-1, -1, out_width))
        out = (every * r[..., None]).sum(1)
        (out * grad.to(kind)).sum().backward()
        return out.detach(), x.grad, r.grad, w.grad

    exact = whole(torch.float64)
    held = local_experts(num_experts)
    w = weight[held.start : held.stop].clone().requires_grad_()
    x, r = tokens[span].clone().requires_grad_(), routing[span].clone().requires_grad_()
    used = part if dtype == "int8" else w
    with count_traffic() as traffic:
        out = expert_parallel(
            x, chosen[span], r, lambda t, ends: grouped_linear(t, used, ends), num_experts=num_experts
        )
    away = int(((chosen[span] < held.start) | (chosen[span] >= held.stop)).sum())
    home = int(((chosen >= held.start) & (chosen < held.stop)).sum()) - (len(x) * chosen_each - away)
    assert traffic.nbytes == (away * width + home * out_width) * kind.itemsize
    (out.float() * grad[span]).sum().backward()
    tolerance = {"rtol": 2e-2, "atol": 0.2} if kind == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    if dtype == "int8":
        tolerance = {"rtol": 1e-3, "atol": 2e-2}
    assert out.dtype == kind
    for found, expected in zip((out, x.grad, r.grad), exact, strict=False):
        torch.testing.assert_close(found.double(), expected[span], **tolerance)
    if dtype != "int8":
        of_weight = torch.zeros_like(w) if w.grad is None else w.grad  # None where no expert of this rank was chosen
        torch.testing.assert_close(of_weight.double(), exact[3][held.start : held.stop], **tolerance)
    with pytest.raises(ValueError, match="chosen is 0 to 7 of 7"):
        expert_parallel(torch.ones(1, 4), torch.tensor([[0, 7]]), torch.ones(1, 2), None, num_experts=7)
    with pytest.raises(ValueError, match="ranks differ in num_experts"):
        expert_parallel(x, chosen[span], r, None, num_experts=num_experts + rank)


@checks()
def checkpoints_are_whole_or_not_there() -> None:
    folder = Path(os.environ["FOLDER"]) / "checkpoints"
    state = {"weight": torch.zeros(5), "step": torch.tensor(0)}
    assert load_checkpoint(state, folder) is None
    for step in (1, 2, 3):
        state["weight"].fill_(step)
        save_checkpoint(state, folder, step)
    assert sorted(p.name for p in folder.iterdir()) == ["step-2", "step-3"]
    dist.barrier()  # all have looked
    if dist.get_rank() == 0:
        (folder / "step-9.part").mkdir()
    dist.barrier()
    state["weight"].zero_()
    assert load_checkpoint(state, folder) == 3 and state["weight"].tolist() == [3.0] * 5
    save_checkpoint(state, folder, 3)
    assert sorted(p.name for p in folder.iterdir()) == ["step-2", "step-3"]
    with pytest.raises(ValueError, match="step is -1"):
        save_checkpoint(state, folder, -1)


@pytest.mark.parametrize("name", checks.names)
def test_four_processes(name: str, outcomes: dict) -> None:
    checks.judge(outcomes[name])


def test_no_collective_is_left_to_the_base():
    """Whose methods keep the interpreter's lock while they wait."""
    own = {
        "_allgather_base",
        "_reduce_scatter_base",
        "allgather",
        "allgather_coalesced",
        "allreduce",
        "allreduce_coalesced",
        "alltoall",
        "alltoall_base",
        "barrier",
        "broadcast",
        "gather",
        "monitored_barrier",
        "recv",
        "recv_anysource",
        "reduce",
        "reduce_scatter",
        "scatter",
        "send",
    }
    waits = {name for name in own if hasattr(dist.ProcessGroup, name)}
    assert waits <= set(vars(SharedMemoryGroup)) and len(waits) > 15


def test_files_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigkernels.distributed import _segment

    monkeypatch.setattr(_segment, "_FOLDER", str(tmp_path))
    dead = 2**22 + 1  # above the largest number of a process
    for name in (f"bigkernels-{dead}-ab", f"bigkernels-{os.getpid()}-ab", "bigkernels-x", "other"):
        (tmp_path / name).write_bytes(b"")
    remove_orphans()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"bigkernels-{os.getpid()}-ab", "bigkernels-x", "other"]


def test_a_segment_of_another_host_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    path.write_bytes(b"\0" * (4096 + 4 * CHUNK))
    Segment(str(path), 0, 1)
    with pytest.raises(OSError, match="another host"):
        Segment(str(path), 0, 1, b"0123456789abcdef")
    with pytest.raises(OSError, match="another size"):
        Segment(str(path), 0, 2)


if __name__ == "__main__":
    checks.main()
