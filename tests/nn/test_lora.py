"""Low-rank adapters on plain and quantized layers."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels.nn import LoRALinear, QuantizedLinear


def base(kind: str) -> nn.Module:
    linear = nn.Linear(64, 40)
    return linear if kind == "plain" else QuantizedLinear.from_linear(linear, kind)


def adapted(kind: str, **options: float) -> LoRALinear:
    made = LoRALinear(base(kind), rank=4, **options)
    nn.init.normal_(made.lora_b, std=0.1)
    return made


KINDS = ("plain", "int8", "int4", "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind: str):
    layer = base(kind)
    x = torch.randn(5, 64)
    assert torch.equal(LoRALinear(layer)(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_output_and_gradients(kind: str, tokens: int):
    layer = adapted(kind, alpha=3.0)
    dense = layer.base.weight if kind == "plain" else layer.base.qweight.dequantize()
    w = (dense + layer.delta()).double()
    x = torch.randn(tokens, 64, requires_grad=True)
    grad = torch.randn(tokens, 40)
    layer(x).backward(grad)
    expected = x.detach().double() @ w.T + layer.base.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), grad.double() @ w, rtol=1e-4, atol=1e-4)
    a, b = layer.lora_a.detach(), layer.lora_b.detach()
    torch.testing.assert_close(layer.lora_b.grad, grad.T @ (x.detach() @ a.T) * 0.75, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_a.grad, (grad @ b).T @ x.detach() * 0.75, rtol=1e-4, atol=1e-4)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_back(kind: str):
    layer, x = adapted(kind), torch.randn(5, 64)
    before, state = layer(x), copy.deepcopy(layer.base.state_dict())
    layer.merge()
    layer.merge()
    assert layer.merged and type(layer.base) is (nn.Linear if kind == "plain" else QuantizedLinear)
    error = (layer(x) - before).norm() / before.norm()
    assert error <= {"plain": 1e-5, "int8": 0.03}.get(kind, 0.3)
    layer.unmerge()
    assert not layer.merged and torch.equal(layer(x), before)
    assert all(torch.equal(t, state[n]) for n, t in layer.base.state_dict().items())


def test_dropout_is_for_training():
    layer, x = adapted("nf4", dropout=0.5), torch.randn(200, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("name", ["nf4", "int8-dynamic"])
def test_a_quantized_model_learns(name: str):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    bigkernels.quantize(model, name)
    bigkernels.patch(model)
    names = LoRALinear.add_to(model)
    assert len(names) == 14 and all(n.endswith("_proj") for n in names)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 28
    frozen = {n: t.clone() for n, t in model.state_dict().items() if "lora" not in n}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.randint(3, 99, (4, 16))
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for n, t in model.state_dict().items():
        if "lora" not in n:
            assert torch.equal(t, frozen[n]), n


def test_wrong_arguments():
    with pytest.raises(TypeError, match="Embedding"):
        LoRALinear(nn.Embedding(3, 4))
    for options in ({"rank": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="expected a rank"):
            LoRALinear(nn.Linear(3, 4), **options)
    with pytest.raises(ValueError, match="no linear layer"):
        LoRALinear.add_to(nn.Sequential(nn.Linear(3, 4)), ("nothing",))


def test_a_pattern_without_a_star_is_explained():
    model = nn.Sequential(collections.OrderedDict(block=nn.ModuleDict({"q_proj": nn.Linear(4, 4)})))
    with pytest.raises(ValueError, match=r"named like q_proj; patterns are of whole names: \*\.q_proj"):
        LoRALinear.add_to(model, "q_proj")
