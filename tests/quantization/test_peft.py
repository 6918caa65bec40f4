"""PEFT adapters on a quantized model: trained, saved, merged and taken off."""

from __future__ import annotations

import pytest
import torch

import bigkernels

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bigkernels.nn import QuantizedLinear  # noqa: E402
from bigkernels.quantization import Int4  # noqa: E402
from bigkernels.quantization.peft import on_quantized_layers  # noqa: E402

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(params=["nf4", "int8", "int4"])
def adapted(request):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    bigkernels.quantize(model, request.param)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, on_quantized_layers(lora))


def test_adapters_train_through_the_codes(adapted):
    bigkernels.patch(adapted)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_merge_and_unmerge(adapted):
    adapted.eval()
    expected = adapted(input_ids=IDS).logits
    adapted.merge_adapter()
    merged = adapted(input_ids=IDS).logits
    assert not torch.equal(merged, expected) and (merged - expected).norm() < 0.3 * expected.norm()
    adapted.unmerge_adapter()
    assert torch.equal(adapted(input_ids=IDS).logits, expected)
    plain = adapted.merge_and_unload()
    assert isinstance(plain.model.layers[0].self_attn.q_proj, QuantizedLinear)
    assert torch.equal(plain(input_ids=IDS).logits, merged)


def test_saved_and_loaded(adapted, tmp_path):
    adapted.eval().save_pretrained(tmp_path)
    expected = adapted(input_ids=IDS).logits
    base = adapted.unload()
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=on_quantized_layers(
        peft.LoraConfig.from_pretrained(tmp_path)))  # fmt: skip
    torch.testing.assert_close(again.eval()(input_ids=IDS).logits, expected)


def test_a_calibrated_format_is_merged_without_data():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 40))
    bigkernels.quantize(layer, Int4(32, "awq"), calibration=[torch.randn(20, 64)])
    lora = on_quantized_layers(peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    adapted = peft.get_peft_model(layer, lora)
    adapted.merge_adapter()
    assert adapted.base_model.model[0].base_layer.config == Int4(32)
