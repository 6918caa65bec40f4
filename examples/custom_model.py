"""A model of one's own from the modules in `bigkernels.nn`: a small decoder that learns to continue a sequence.

python examples/custom_model.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkernels.nn import CrossEntropyLoss, GatedMLP, RMSNorm, RotaryEmbedding


class Block(nn.Module):
    """Pre-norm attention and gated MLP. Both norms add the branch to the residual stream as they read it."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(size), RMSNorm(size)
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.rotary = RotaryEmbedding(size // heads)
        self.mlp = GatedMLP(size, 3 * size)

    def forward(self, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Takes and returns what the last layer computed and the stream that it has still to be added to."""
        x, stream = self.norm1(branch, residual=stream)  # one pass: stream + branch, and its norm
        batch, length, size = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.rotary(q, k)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x, stream = self.norm2(self.out(attended.transpose(1, 2).reshape(batch, length, size)), residual=stream)
        return self.mlp(x), stream


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, size: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.blocks = nn.ModuleList(Block(size, heads) for _ in range(layers))
        self.norm = RMSNorm(size)
        self.head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.embedding(ids)
        branch = torch.zeros_like(stream)
        for block in self.blocks:
            branch, stream = block(branch, stream)
        x, _ = self.norm(branch, residual=stream)
        return self.head(x)


torch.manual_seed(0)
model, loss_of = Decoder(vocabulary=16), CrossEntropyLoss(z_loss=1e-4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(60):
    start = torch.randint(0, 16, (16, 1))
    ids = (start + 3 * torch.arange(25)) % 16  # each number is the one before it plus three
    logits = model(ids[:, :-1])
    loss = loss_of(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.4f}")
with torch.no_grad():
    sequence = torch.tensor([[5, 8, 11]])
    for _ in range(6):
        sequence = torch.cat((sequence, model(sequence)[:, -1:].argmax(-1)), 1)
print(sequence[0].tolist())
assert sequence[0].tolist() == [(5 + 3 * i) % 16 for i in range(9)]
