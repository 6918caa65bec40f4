"""Embeddings, and heads that share their weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels.nn import QuantizedEmbedding, QuantizedLinear
from bigkernels.quantization import Int4

IDS = torch.arange(24).reshape(2, 12) % 50
FORMATS = ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "q4_1", "q8_0")


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_of_the_dequantized_table(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    layer = QuantizedEmbedding.from_embedding(nn.Embedding(37, 131, dtype=dtype), name)
    plain = layer.dequantize()
    assert plain.weight.dtype == dtype
    for ids in (torch.tensor(5), torch.tensor([[3, 36], [0, 3]]), torch.empty(0, 2, dtype=torch.int64)):
        assert torch.equal(layer(ids), plain(ids))
    with pytest.raises(IndexError):
        layer(torch.tensor([37]))
    assert layer.to(torch.float16)(torch.tensor([1])).dtype == torch.float16
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(IDS[:1, :4]), layer(IDS[:1, :4]))


def test_a_head_shares_the_codes():
    model = llama()
    size = model.lm_head.weight.nbytes
    report = bigkernels.quantize(model, "int8", skip=(), embeddings=True)
    table, head = model.model.embed_tokens, model.lm_head
    assert isinstance(table, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert head.qweight.tensors["codes"].data_ptr() == table.qweight.tensors["codes"].data_ptr()
    rows = {row.path: row for row in report.quantized}
    assert (rows["model.embed_tokens"].before, rows["lm_head"].before) == (size, 0)
    assert rows["lm_head"].what == "int8, the weight of model.embed_tokens" and not report.skipped
    plain = copy.deepcopy(model)
    bigkernels.dequantize(plain)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-3, atol=1e-4)
    other = llama()
    bigkernels.quantize(other, "int8", skip=(), embeddings=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "options, config",
    [
        ({"skip": ("lm_head",)}, "int8"),
        ({"skip": ()}, {"lm_head": "nf4", "*": "int8"}),
        ({"skip": (), "filter": lambda name, module: name != "lm_head"}, "int8"),
    ],
    ids=["skipped", "another format", "filtered"],
)
def test_a_shared_weight_is_left_alone_unless_all_may_go(options, config):
    model = llama()
    report = bigkernels.quantize(model, config, embeddings=True, **options)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reasons = {row.path: row.what for row in report.skipped}
    assert reasons["model.embed_tokens"] == "its weight is shared with another module (lm_head)"
    assert "lm_head" in reasons


def test_what_calibration_does_not_reach():
    model = llama()
    bigkernels.quantize(model, Int4(32, "gptq"), skip=(), embeddings=True, calibration=[IDS])
    assert model.model.embed_tokens.weight_format == model.lm_head.weight_format == Int4(32)
    assert model.model.layers[0].mlp.up_proj.weight_format == Int4(32, "gptq")
    limited = nn.ModuleDict({"table": nn.Embedding(8, 8, max_norm=1.0)})
    report = bigkernels.quantize(limited, "int8", embeddings=True)
    assert [row.what for row in report.skipped] == ["it changes its weight (max_norm)"]
