"""Every Python snippet of the README, and of docs/, runs as it stands.

What a snippet takes from the reader's program (a model, tensors, a training step) has the same name here; whatever is
the package's own, it has to import.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bigkernels

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets() -> list:
    """The snippets, each under the number of its first line; "no-run" after the language leaves one out."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        for fence in FENCE.finditer(text):
            line = text.count("\n", 0, fence.start(2)) + 1
            if "no-run" not in fence[1]:
                found.append(pytest.param(document, line, fence[2], id=f"{document.name}:{line}"))
    return found


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x, mask=None):
        return self.down(self.up(x).relu())


def names_of_the_reader() -> dict:
    """What the snippets expect of the program around them."""
    model, ids = llama(), torch.randint(1, 97, (2, 16))
    tokens, size, heads, length = 6, 64, 4, 16
    angles = torch.arange(length)[:, None] * 0.1 ** torch.arange(8)
    both = torch.cat((angles, angles), -1)[None]

    def step() -> None:
        model(ids, labels=ids).loss.backward()

    return SimpleNamespace(
        model=model,
        ids=ids,
        step=step,
        train=step,
        batches=[ids],
        block=Block(),
        x=torch.randn(tokens, size, requires_grad=True),
        residual=torch.randn(tokens, size),
        weight=torch.rand(size),
        bias=torch.randn(size),
        gate=torch.randn(tokens, size),
        up=torch.randn(tokens, size),
        w=torch.randn(97, size),
        t=torch.randn(tokens, size),
        mask=None,
        head=nn.Linear(size, 97),
        hidden=torch.randn(tokens, size),
        pairs=torch.randn(4, 5, size),
        ref_pairs=torch.randn(4, 5, size),
        labels=torch.randint(97, (4, 5)),
        **{name: torch.randn(4) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")},
        target=torch.randint(97, (tokens,)),
        tokens=torch.randint(97, (tokens,)),
        logits=torch.randn(tokens, 97),
        q=torch.randn(2, heads, length, 16),
        k=torch.randn(2, 2, length, 16),
        v=torch.randn(2, 2, length, 16),
        cos=both.cos(),
        sin=both.sin(),
        sinks=torch.randn(heads),
        pair_bias=torch.randn(heads, length, length),
        keep=torch.rand(length, length) > 0.1,
        packed=[torch.randn(9, n, 16) for n in (heads, 2, 2)],
        starts=torch.tensor([0, 4, 9], dtype=torch.int32),
        longest=5,
        lengths=torch.tensor([40, 20], dtype=torch.int32),
        k_cache=torch.randn(2, 48, 2, 16),
        v_cache=torch.randn(2, 48, 2, 16),
        pages=torch.tensor([[1], [0]]).int(),
    ).__dict__


@pytest.mark.parametrize("document, line, code", snippets())
def test_snippet(document: Path, line: int, code: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"bigkernels": bigkernels} | names_of_the_reader()
    exec(compile("\n" * (line - 1) + code, document, "exec"), names)


def test_there_are_snippets():
    assert len(snippets()) >= 10
