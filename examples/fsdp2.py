"""Sharded training (FSDP2) of a patched model with this package's optimizer, in two processes.

On one machine with GPUs: `torchrun --nproc-per-node 8` and "nccl" in the place of `spawn` and "gloo".

    pip install 'bigkernels[transformers]'
    python examples/fsdp2.py
"""

import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from transformers import LlamaConfig, LlamaForCausalLM

import bigkernels
from bigkernels import optim

TEXT = b"Tyger Tyger, burning bright, In the forests of the night; "
PROCESSES = 2


def train(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    whole = copy.deepcopy(model)

    bigkernels.patch(model)  # before sharding: afterwards no process has whole weights to compare with
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optim.AdamW(model.parameters(), lr=5e-3, max_grad_norm=1.0)  # clips by the norm over all processes

    rows = [torch.tensor(list((TEXT * 2)[i : i + 32])) for i in range(8)]
    mine, losses = torch.stack(rows[rank::PROCESSES]), []
    for _ in range(20):
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    # The same steps in one process, on all rows, by PyTorch alone.
    plain, every = torch.optim.AdamW(whole.parameters(), lr=5e-3), torch.stack(rows)
    for _ in range(20):
        whole(input_ids=every, labels=every).loss.backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
    with torch.no_grad():
        sharded, alone = (m(input_ids=mine, labels=mine).loss.item() for m in (model, whole))
    assert losses[-1] < losses[0] - 1 and abs(sharded - alone) < 0.02 * alone
    if rank == 0:
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; of one process {alone:.4f}, sharded {sharded:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        spawn(train, (str(Path(folder) / "store"),), PROCESSES)
