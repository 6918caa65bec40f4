"""Optimizers: a model in bfloat16 with 8-bit states, clipped and averaged in the step, saved, and resumed bit by bit.

python examples/optimize.py
"""

import io

import torch
from torch import nn

from bigkernels import optim

torch.manual_seed(0)


def made() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).bfloat16()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    for step in steps:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        loss = (model(x) - x.roll(1, dims=1)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# 2 bytes a parameter for both moments, and 2 that keep what rounding to bfloat16 takes from the weight: together a
# float32 master weight. The gradients are clipped and the weights averaged in the same pass over memory.
options = dict(lr=1e-2, state_dtype="int8", rounding="kahan", max_grad_norm=1.0, ema_decay=0.9)
model = made()
optimizer = optim.AdamW(model.parameters(), **options)
first = train(model, optimizer, range(1))
last = train(model, optimizer, range(1, 100))
print(f"loss {first:.4f} -> {last:.4f}, norm of the last gradient {optimizer.grad_norm.item():.4f}")
assert last < first / 4

states = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
count = sum(p.numel() for p in model.parameters())
print(f"{states / count:.2f} bytes of state a parameter: 2 of codes, 2 of the remainder, 4 of the average")

with optimizer.averaged():  # the averaged weights in the parameters' place
    x = torch.randn(32, 64).bfloat16()
    print(f"averaged: loss {(model(x) - x.roll(1, dims=1)).float().square().mean().item():.4f}")

file = io.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
train(model, optimizer, range(100, 110))

file.seek(0)
saved = torch.load(file, weights_only=True)
again = made()
again.load_state_dict(saved["model"])
resumed = optim.AdamW(again.parameters(), **options)
resumed.load_state_dict(saved["optimizer"])
train(again, resumed, range(100, 110))
same = all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
print(f"resumed bit by bit: {same}")
assert same

# torch's own optimizer goes on from the same state, and this one from torch's.
theirs = torch.optim.AdamW(again.parameters(), lr=1e-2)
theirs.load_state_dict(resumed.torch_state_dict())
resumed.load_state_dict(theirs.state_dict())

# Each gradient used and freed as backward makes it: no two are held at once. Clipping then goes by the norm before.
optim.step_in_backward(again, resumed, clip="previous")
train(again, resumed, range(110, 113))
assert all(p.grad is None for p in again.parameters())
