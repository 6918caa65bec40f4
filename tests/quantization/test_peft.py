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


def llama(name: str = "int8"):
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    bigkernels.quantize(model, name)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [
    {"use_dora": True}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "gaussian"}, {"use_rslora": True},
    {"target_modules": "all-linear"}, {"modules_to_save": ["lm_head"]},
], ids=lambda options: str(next(iter(options.items()))))  # fmt: skip
def test_kinds_of_adapters(options: dict):
    """Those that read the weight of the layer, and those that find layers by themselves."""
    model = llama()
    before = model(input_ids=IDS).logits
    config = on_quantized_layers(peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options}), model)
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)
    adapters = [m for m in adapted.modules() if isinstance(getattr(m, "base_layer", None), QuantizedLinear)]
    assert len(adapters) == (7 if "target_modules" in options else 1)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(0.02 * torch.randn_like(p))
    expected = adapted(input_ids=IDS).logits
    merged = adapted.merge_and_unload()(input_ids=IDS).logits
    assert (merged - expected).norm() < 0.05 * expected.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapters_that_would_write_the_weight_are_refused(kind: str):
    config = on_quantized_layers(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=kind))
    with pytest.raises(RuntimeError, match="would write to a weight"):
        peft.get_peft_model(llama(), config)
    with pytest.raises(ValueError, match="give the model too"):
        on_quantized_layers(peft.LoraConfig(target_modules="all-linear"))


@pytest.mark.filterwarnings("ignore")
def test_conv1d_is_merged_as_it_stands():
    config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    bigkernels.quantize(model, "int8")
    lora = on_quantized_layers(peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True,
                                               init_lora_weights=False))  # fmt: skip
    adapted = peft.get_peft_model(model, lora).eval()
    expected = adapted(input_ids=IDS).logits
    adapted.merge_adapter()
    assert (adapted(input_ids=IDS).logits - expected).norm() < 0.05 * expected.norm()
    adapted.unmerge_adapter()
    assert torch.equal(adapted(input_ids=IDS).logits, expected)


def test_adapters_are_not_quantized():
    adapted = peft.get_peft_model(llama(), on_quantized_layers(peft.LoraConfig(r=4, target_modules=["q_proj"])))
    report = bigkernels.quantize(adapted, "int8")
    assert not report.quantized
    assert [row.what for row in report.skipped if "lora_" in row.path] == ["part of an adapter"] * 2
