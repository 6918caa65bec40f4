"""What is applied inside a `with` block is gone after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bigkernels
from bigkernels.nn import QuantizedExperts, QuantizedLinear


class Experts(nn.Module):
    num_experts = 3

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(3, 32, 64)), nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(nn.functional.linear(x, self.weight[i]) for i in range(3)).repeat(1, 2) * self.scale


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.experts = nn.Embedding(20, 64), Experts()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.experts(self.embedding(ids))))


def test_quantized_gives_the_weights_back():
    model, ids, called = Model(), torch.arange(20), []
    model.layers[0].register_forward_hook(lambda *_: called.append(1))
    expected, before = model(ids), dict(model.named_parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with bigkernels.quantized(model, "int4", skip=(), embeddings=True) as report:
        assert isinstance(model.layers[0], QuantizedLinear) and isinstance(model.experts.weight, QuantizedExperts)
        assert len(report.quantized) == 5 and not torch.equal(model(ids), expected)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is p for name, p in before.items())
    assert model.head.weight is model.embedding.weight and type(model.layers[0]) is nn.Linear
    assert torch.equal(model(ids), expected) and len(called) == 3
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_quantized_keeps_what_the_block_adds():
    model = Model()
    before = model.layers[0]
    with pytest.raises(RuntimeError, match="inside"), bigkernels.quantized(model, {"layers.*": "int8"}):
        model.eval()
        model.layers[0] = nn.Sequential(model.layers[0], nn.ReLU())
        model.more = nn.Linear(2, 2)
        raise RuntimeError("inside")
    assert model.layers[0][0] is before and isinstance(model.layers[0][1], nn.ReLU) and model.more.in_features == 2
    assert not before.training and type(model.layers[1]) is nn.Linear


def test_quantized_inside_of_a_quantized_model():
    model = Model()
    bigkernels.quantize(model, {"layers.0": "int8"})
    kept = model.layers[0]
    with bigkernels.quantized(model, "int4"):
        assert model.layers[0] is kept and isinstance(model.layers[1], QuantizedLinear)
    assert model.layers[0] is kept and type(model.layers[1]) is nn.Linear


def test_checkpointed_and_what_had_been_applied():
    model, x = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))), torch.randn(4, 8)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    runs = []
    model[0][0].register_forward_hook(lambda *_: runs.append(1))
    with bigkernels.checkpointed(model, modules=["0", "1"]) as names:
        assert names == ["0", "1"]
        loss = model(x).sum()
    loss.backward()  # after the block
    assert len(runs) == 2 and all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    model(x).sum().backward()
    assert len(runs) == 3
    bigkernels.apply_checkpointing(model, modules=["0"])
    with pytest.raises(ValueError, match="inside"), bigkernels.checkpointed(model, "int8", modules=["1"]):
        raise ValueError("inside")
    model(x).sum().backward()
    assert len(runs) == 5
