"""A model of one's own from the modules in `bigkernels.nn`: a small decoder that learns a text and writes it again.

It is trained on characters, then generates with a cache of keys and values, and shows that the cache changes nothing.

    python examples/custom_model.py
"""

import torch
from torch import Tensor, nn

from bigkernels.nn import Attention, CrossEntropyLoss, GatedMLP, KVCache, RMSNorm, RotaryEmbedding

TEXT = """Tyger Tyger, burning bright,
In the forests of the night;
What immortal hand or eye,
Could frame thy fearful symmetry?
"""  # William Blake, 1794


class Block(nn.Module):
    """Pre-norm attention and gated MLP. Both norms add the branch to the residual stream as they read it."""

    def __init__(self, size: int, heads: int, rope: RotaryEmbedding):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(size), RMSNorm(size)
        self.attention = Attention(size, heads, num_kv_heads=heads // 2, rope=rope)
        self.mlp = GatedMLP(size, 2 * size)

    def forward(self, branch: Tensor, stream: Tensor, **options) -> tuple[Tensor, Tensor]:
        """Takes and returns what the last layer computed and the stream that it has still to be added to."""
        x, stream = self.norm1(branch, residual=stream)  # one pass: stream + branch, and its norm
        x, stream = self.norm2(self.attention(x, **options), residual=stream)
        return self.mlp(x), stream


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, size: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.rope = RotaryEmbedding(size // heads)  # one for all layers
        self.blocks = nn.ModuleList(Block(size, heads, self.rope) for _ in range(layers))
        self.norm = RMSNorm(size)
        self.head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, ids: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        positions = torch.arange(ids.shape[1])
        if caches is not None:
            positions = caches[0].lengths[:, None] + positions
        angles = self.rope.angles(positions)
        stream = self.embedding(ids)
        branch = torch.zeros_like(stream)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            branch, stream = block(branch, stream, angles=angles, cache=cache)
        x, _ = self.norm(branch, residual=stream)
        return self.head(x)

    @torch.no_grad()
    def generate(self, prompt: Tensor, new: int, **options) -> Tensor:
        """The likeliest continuation of prompts (B, S) by `new` tokens; `options` are those of `make_cache`."""
        length = prompt.shape[1] + new
        caches = [block.attention.make_cache(len(prompt), length, **options) for block in self.blocks]
        written = [prompt]
        for _ in range(new):
            written.append(self(written[-1], caches)[:, -1:].argmax(-1))  # the prompt at once, then token by token
        print("cache of a layer:", caches[0])
        return torch.cat(written, 1)


torch.manual_seed(0)
letters = sorted(set(TEXT))
ids = torch.tensor([letters.index(letter) for letter in TEXT])
model, loss_of = Decoder(len(letters)), CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(121):
    starts = torch.randint(len(ids) - 48, (8, 1))
    some = ids[starts + torch.arange(48)]
    loss = loss_of(model(some[:, :-1]).flatten(0, 1), some[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 40 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

line = TEXT.index("\n") + 1
prompt = ids[None, : line + 7]  # the first line, and "In the "
generated = model.generate(prompt, 21)
print("".join(letters[i] for i in generated[0]))
for options in ({"page_size": 16}, {"int8": True}):  # in pages; in a quarter of the memory
    assert torch.equal(model.generate(prompt, 21, **options), generated)
with torch.no_grad():
    assert torch.equal(model(generated[:, :-1])[:, prompt.shape[1] - 1 :].argmax(-1), generated[:, prompt.shape[1] :])
assert "".join(letters[i] for i in generated[0]) == TEXT[: generated.shape[1]]
