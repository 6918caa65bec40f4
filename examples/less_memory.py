"""Training in less memory: the same model under each policy, what it keeps for backward, and the plan before it runs.

python examples/less_memory.py
"""

import copy

import torch
from torch import nn

import bigkernels
from bigkernels.checkpointing import int8, offload, selective
from bigkernels.functional import linear_cross_entropy

torch.manual_seed(0)
WIDTH, LAYERS, VOCABULARY, TOKENS = 128, 4, 4000, 512


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return linear_cross_entropy(x, self.head.weight, target)  # no logits


model = Model()
ids, target = torch.randint(VOCABULARY, (2, TOKENS))
expected = None
for policy in (None, "recompute", "selective", "int8", selective(budget=0.3), int8(stochastic=True) + offload()):
    trained = copy.deepcopy(model)
    if policy is not None:
        bigkernels.apply_checkpointing(trained, policy)
    trained(ids, target).backward()  # "selective" learns from its first run
    trained.zero_grad()
    loss = None
    with bigkernels.memory.peak() as memory:
        loss = trained(ids, target)
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in trained.parameters()])
    expected = grads if expected is None else expected
    error = ((grads - expected).norm() / expected.norm()).item()
    print(f"{policy!s:.60}: {memory.end / 1e6:.1f} MB kept, gradients {error:.1e} off")
    assert error < 0.02

# The same figures before anything runs, for any size: the step on tensors without memory.
plan = bigkernels.plan(model, batch=1, seq=TOKENS, dtype="float32", optimizer="adamw", inputs=(ids, target))
print(plan)
