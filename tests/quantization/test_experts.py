"""3-D weights of experts: quantized under the parameter's name, read as the model's code reads a parameter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bigkernels
from bigkernels.nn import QuantizedExperts
from bigkernels.quantization import Int4

IDS = torch.arange(24).reshape(2, 12) % 50


def mixtral(implementation: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["int4", "nf4", "int8"])
def test_a_mixture_of_experts(implementation: str, name: str):
    model = mixtral(implementation)
    original = {key: p.clone() for key, p in model.named_parameters() if p.dim() == 3}
    report = bigkernels.quantize(model, name)
    made = {key for key, m in model.named_modules() if isinstance(m, QuantizedExperts)}
    assert made == set(original) and made <= {row.path for row in report.quantized}
    assert not any(row.path in made for row in report.skipped)
    plain = copy.deepcopy(model)
    bigkernels.dequantize(plain)
    for key, p in original.items():
        found = plain.get_parameter(key)
        assert found.shape == p.shape and (found - p).norm() < 0.15 * p.norm()
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_weight_is_dequantized(implementation: str, monkeypatch):
    model = mixtral(implementation)
    bigkernels.quantize(model, "int4")

    def refuse(*_):
        raise AssertionError("dequantized")

    monkeypatch.setattr(bigkernels.quantization.QuantizedWeight, "dequantize", refuse)
    assert model(IDS).logits.isfinite().all()
    weights = QuantizedExperts.from_parameter(torch.randn(3, 40, 70), "int8", transposed=True)
    assert torch.bmm(torch.randn(3, 5, 40), weights).shape == (3, 5, 70)


def test_gradients_reach_what_comes_before():
    model = mixtral("grouped_mm")
    bigkernels.quantize(model, "int8")
    plain = copy.deepcopy(model)
    bigkernels.dequantize(plain)
    for m in (model, plain):
        m(IDS, labels=IDS).loss.backward()
    grads = [m.model.embed_tokens.weight.grad for m in (model, plain)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


class Turned(nn.Module):
    """Experts whose weights stand on the right, as those of gpt-oss do."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.is_transposed = 3, True
        self.up = nn.Parameter(torch.randn(3, 40, 70))

    def forward(self, x, i):
        return x @ self.up[i]


@pytest.mark.parametrize("name", ["int4", "nf4", "fp4", "int8", "int8-dynamic", "fp8", "q4_1", "q8_0", "mxfp4"])
def test_turned_weights(name: str):
    torch.manual_seed(0)
    model = nn.Sequential(Turned())
    bigkernels.quantize(model, name)
    weights = model[0].up
    assert weights.shape == (3, 40, 70) and len(weights) == 3 and weights.size(-1) == 70
    dense, x = weights.dequantize(), torch.randn(5, 40)
    assert dense.shape == weights.shape
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if name != "int8-dynamic" else {"rtol": 0.05, "atol": 0.5}
    for i in (0, 2, -1, torch.tensor(1)):
        torch.testing.assert_close(model[0](x, i), x @ dense[i], **tolerance)
        torch.testing.assert_close(F.linear(x, weights[i].T), x @ dense[i], **tolerance)
    torch.testing.assert_close(weights[torch.tensor([2, 0, 2])], dense[[2, 0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(weights[1:], dense[1:], rtol=0, atol=0)
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    found = F.grouped_mm(x, weights, offs=offs)
    torch.testing.assert_close(found, torch.cat([x[:2] @ dense[0], x[2:] @ dense[2]]), **tolerance)
    torch.testing.assert_close(torch.bmm(x.expand(3, 5, 40), weights), x @ dense, **tolerance)
    with pytest.raises(IndexError, match="expert 3 of 3"):
        weights[3]


def test_saved_copied_pickled_and_cast():
    torch.manual_seed(0)
    model = nn.Sequential(Turned())
    bigkernels.quantize(model, Int4(32))
    dense = model[0].up.dequantize()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other[0].up.dequantize(), dense)
    other = nn.Sequential(Turned())
    bigkernels.quantize(other, Int4(32))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].up.dequantize(), dense)
    codes = model[0].up.qweight.tensors["codes"].dtype
    assert model.to(torch.bfloat16)[0].up.qweight.tensors["codes"].dtype == codes
    unlike = nn.Sequential(Turned())
    bigkernels.quantize(unlike, "nf4")
    with pytest.raises(RuntimeError, match="QuantizedExperts"):
        unlike.load_state_dict(model.state_dict(), strict=False)


def test_what_is_left_alone_and_why():
    def reasons(config, **options):
        model = nn.ModuleDict({"moe": Turned()})
        return {row.path: row.what for row in bigkernels.quantize(model, config, **options).skipped}

    assert reasons({"other": "int8"}) == {"moe.up": "no pattern names a format for it"}
    assert reasons("int8", skip=("up",)) == {"moe.up": "left out by skip"}
    assert reasons("int8", filter=lambda name, m: False) == {"moe.up": "left out by filter"}
    assert reasons(Int4(32, "gptq"), calibration=[]) == {
        "moe.up": "calibration measures the inputs of linear layers alone"
    }
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "moe": Turned()})
    with torch.no_grad():
        model["a"].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        bigkernels.quantize(model, "int8")
    assert isinstance(model["moe"].up, nn.Parameter) and "moe.up" in dict(model.named_parameters())
