"""A model trained on sequences that are cut over the ranks: each computes with its part of the tokens.

    pip install 'bigkernels[transformers]'
    torchrun --nproc-per-node 2 examples/long_sequences.py

With GPUs each rank takes one, and NCCL carries the messages.
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import bigkernels
from bigkernels.distributed import context_parallel, count_traffic

TEXT = b"Tyger Tyger, burning bright, In the forests of the night; "
LENGTH = 256


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)  # the same parameters on each rank
    model = LlamaForCausalLM(config).to(device)
    bigkernels.patch(model)
    parallel = context_parallel(model, strategy="ring")
    optimizer = bigkernels.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [list((TEXT * 8)[i : i + LENGTH]) for i in range(2)]
    batch = torch.tensor(rows, device=device)  # whole, on every rank
    losses = []
    with count_traffic() as traffic:
        for _ in range(10):
            loss = model(input_ids=batch, labels=batch).loss  # of the whole batch, the same on every rank
            loss.backward()
            parallel.average_gradients()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {traffic.nbytes / 10 / 2**20:.2f} MiB sent a step and rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:  # without torchrun: two ranks on this machine
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        sys.exit(subprocess.run([*torchrun, __file__]).returncode)
