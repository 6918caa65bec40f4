"""Saved tensors of a GPU in page-locked memory: values, order, memory and overlap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigkernels.checkpointing import _places, checkpoint, offload

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
POLICY = offload(least=1)


class Block(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def model(depth: int, size: int) -> nn.ModuleList:
    return nn.ModuleList(Block(size) for _ in range(depth)).to(DEVICE, torch.bfloat16)


def step(blocks: nn.ModuleList, x: Tensor, policy) -> list[Tensor]:
    for block in blocks:
        x = block(x) if policy is None else checkpoint(block, x, policy=policy)
    return list(torch.autograd.grad(x.float().square().mean(), list(blocks.parameters())))


def test_gradients_are_those_of_a_plain_run_where_the_host_is_far_ahead():
    blocks, x = model(6, 1024), torch.randn(4096, 1024, device=DEVICE, dtype=torch.bfloat16)
    expected = step(blocks, x, None)
    for _ in range(5):
        torch.cuda._sleep(200_000_000)  # the host queues the whole step meanwhile
        assert all(map(torch.equal, step(blocks, x, POLICY), expected))


def test_memory_does_not_depend_on_how_far_the_host_is_ahead():
    blocks, x = model(16, 1024), torch.randn(16384, 1024, device=DEVICE, dtype=torch.bfloat16)
    peaks = []
    for policy, cycles in ((None, 0), (POLICY, 0), (POLICY, 500_000_000)):
        step(blocks, x, policy)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_reserved()
        torch.cuda._sleep(cycles)
        step(blocks, x, policy)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_reserved() - held)
    region = 5 * x.nbytes
    assert peaks[2] <= peaks[1] + region
    assert peaks[1] < 0.5 * peaks[0]
    assert peaks[1] < 4 * region + 2 * _places._LEAVING


def test_nothing_waits_for_the_device():
    blocks, x = model(4, 512), torch.randn(4096, 512, device=DEVICE, dtype=torch.bfloat16)
    step(blocks, x, POLICY)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(blocks, x, POLICY)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_fetched_in_vain_is_not_written_by_a_late_copy():
    pool = _places._pinned(DEVICE)
    flat = torch.full((1 << 24,), 1.0, device=DEVICE)
    for i in range(20):
        slot = pool.put(flat)
        slot.fetch()
        del slot
        other = torch.full((1 << 24,), float(i), device=DEVICE)  # may get the memory that the copy goes to
        assert float(other.min()) == float(other.max()) == float(i)
        del other


def test_copies_run_beside_the_computation():
    """A step whose copies take less time than its products takes little longer than one without."""
    blocks, x = model(8, 4096), torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)

    def seconds(policy) -> float:
        best = float("inf")
        for _ in range(6):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step(blocks, x, policy)
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end))
        return best

    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=DEVICE)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    host.copy_(there, non_blocking=True)
    start.record()
    host.copy_(there, non_blocking=True)
    end.record()
    torch.cuda.synchronize()
    copies = 2 * 8 * 5 * x.nbytes / host.nbytes * start.elapsed_time(end)
    plain = seconds(None)
    # Copies in the stream of the computation would take the sum; beside it, the longer of both, and the last region's.
    assert seconds(POLICY) < max(plain, copies) + 0.5 * min(plain, copies)
