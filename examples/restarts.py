"""Data-parallel training that goes on after a rank has died, from the last whole checkpoint.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/restarts.py

On one machine without GPUs gradients are summed through shared memory; with GPUs each rank takes one.
"""

import os
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bigkernels
from bigkernels.distributed import load_checkpoint, save_checkpoint

STEPS, EVERY = 12, 4


def main(folder: str) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "shared_memory")
    torch.manual_seed(0)
    model = nn.Sequential(bigkernels.nn.RMSNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).to(device)
    model = DistributedDataParallel(model)
    optimizer = bigkernels.optim.AdamW(model.parameters(), lr=1e-2)
    for p in model.parameters():  # states, which a checkpoint is loaded into
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    step = load_checkpoint(state, folder) or 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    while step < STEPS:
        step += 1
        torch.manual_seed(100 * step + dist.get_rank())
        x = torch.randn(16, 32).to(device)
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 6 and dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(1)  # what an accident would do, once
        if step % EVERY == 0:
            save_checkpoint({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder, step)
    if dist.get_rank() == 0:
        print(f"step {step}, loss {loss.item():.4f}, restarted {os.environ['TORCHELASTIC_RESTART_COUNT']} times")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(os.environ.get("CHECKPOINTS", "checkpoints"))
    else:  # without torchrun: two ranks on this machine
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | {"CHECKPOINTS": folder, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            sys.exit(subprocess.run([*torchrun, "--max-restarts", "3", __file__], env=env).returncode)
