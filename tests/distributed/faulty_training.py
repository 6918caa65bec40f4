"""A training that one of its ranks disturbs: what `test_faults.py` runs under `torchrun`.

    torchrun --nproc-per-node 2 --max-restarts 3 faulty_training.py FOLDER BACKEND FAULT AT

Rank 1 of the first attempt has the fault AT seconds after training began. The losses of all steps end up in
FOLDER/losses, one a line as hexadecimal floats; what the ranks noticed goes to FOLDER/errors.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from bigkernels import optim
from bigkernels.distributed import load_checkpoint, save_checkpoint

STEPS = 24
EVERY = int(os.environ.get("FAULTY_EVERY", "3"))  # steps between checkpoints
TIMEOUT = float(os.environ.get("FAULTY_TIMEOUT", "20"))  # seconds
STOPPED = float(os.environ.get("FAULTY_STOPPED", "10"))


def disturb(fault: str, after: float) -> None:
    time.sleep(after)
    match fault:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":  # and somebody wakes it again
            me = os.getpid()
            if os.fork() == 0:
                time.sleep(STOPPED)
                os.kill(me, signal.SIGCONT)
                os._exit(0)
            os.kill(me, signal.SIGSTOP)
        case "raise":
            raise_next.set()


raise_next = threading.Event()


def main() -> None:
    folder, backend, fault, after = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT))
    rank, attempt = dist.get_rank(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)))
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    losses = torch.zeros(STEPS, dtype=torch.float64)
    states = of_training(model, optimizer, losses)
    first = load_checkpoint(states, folder / "checkpoints")
    if first is not None:
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        losses = states["losses"]
    dist.barrier()
    if attempt == 0 and rank == 1 and fault != "none":
        threading.Thread(target=disturb, args=(fault, after), daemon=True).start()
    begin = time.monotonic()
    try:
        for step in range(0 if first is None else first + 1, STEPS):
            if raise_next.is_set():
                raise RuntimeError("the fault")
            draw = torch.Generator().manual_seed(1000 * step + rank)
            x = torch.randn(16, 64, generator=draw)
            optimizer.zero_grad()
            loss = (model(x) - x[:, :8].sin()).square().mean()
            loss.backward()
            optimizer.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses[step] = total.item() / 2
            if step % EVERY == EVERY - 1:
                save_checkpoint(of_training(model, optimizer, losses), folder / "checkpoints", step)
            time.sleep(0.02)
    except Exception as error:
        with (folder / "errors").open("a") as f:
            words = " ".join(str(error).split())
            f.write(f"{rank} {time.monotonic() - begin:.1f} {type(error).__name__}: {words}\n")
        raise
    if rank == 0:
        (folder / "losses").write_text("\n".join(float(v).hex() for v in losses))
    dist.destroy_process_group()


def of_training(model: nn.Module, optimizer: optim.Optimizer, losses: torch.Tensor) -> dict:
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states, "losses": losses}


if __name__ == "__main__":
    main()
