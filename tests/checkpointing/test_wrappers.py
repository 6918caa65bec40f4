"""Segments in models that are wrapped for several processes: the gradients of the wrapped model without segments."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import nn

from bigkernels import apply_checkpointing
from bigkernels.checkpointing import selective

WRAPPERS = ("fully_shard", "fully_shard of parts", "fully_shard bf16", "FSDP", "FSDP of blocks", "DDP")
POLICIES = {"selective": "selective", "no budget": selective(budget=None), "recompute": "recompute"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        h = nn.functional.silu(self.up(self.norm(x)))
        return x + self.down(h * h.sigmoid().exp())


def _wrap(model: nn.Module, name: str, mesh) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    if name == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    if name.startswith("FSDP"):
        inner = {"use_orig_params": True, "auto_wrap_policy": ModuleWrapPolicy({Block})} if "blocks" in name else {}
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **inner)
    options = {"mesh": mesh}
    if "bf16" in name:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model:
        if "parts" in name:
            fully_shard(block.up, **options)
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _train(name: str, policy, after: bool, mesh, x) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    if policy is not None and not after:
        apply_checkpointing(model, policy)
    model = _wrap(model, name, mesh)
    if policy is not None and after:
        apply_checkpointing(model, policy)
    optimizer, figures = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        loss = model(x).float().square().mean()
        loss.backward()
        grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()]
        figures += [float(loss), *(float(g.double().square().sum()) for g in grads if g is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return figures


def _process(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(rank))
    for name in WRAPPERS:
        expected = _train(name, None, False, mesh, x)
        for policy in POLICIES.values():
            for after in (False, True):
                found = _train(name, policy, after, mesh, x)
                assert found == expected, (name, policy, "after" if after else "before")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_wrappers_before_and_after() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port,), nprocs=2)
