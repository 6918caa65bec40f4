"""PEFT adapters on a quantized model: trained, saved, merged and taken off."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch

import bigkernels

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bigkernels.integrations.peft import LoraQuantizedLinear  # noqa: E402
from bigkernels.nn import LoRALinear, QuantizedLinear  # noqa: E402
from bigkernels.quantization import Int4  # noqa: E402

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(params=["nf4", "int8", "int4"])
def adapted(request):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    bigkernels.quantize(model, request.param)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, lora)


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
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=peft.LoraConfig.from_pretrained(tmp_path))
    torch.testing.assert_close(again.eval()(input_ids=IDS).logits, expected)


def test_a_calibrated_format_is_merged_without_data():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 40))
    bigkernels.quantize(layer, Int4(32, "awq"), calibration=[torch.randn(20, 64)])
    lora = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    adapted = peft.get_peft_model(layer, lora)
    adapted.merge_adapter()
    assert adapted.base_model.model[0].base_layer.weight_format == Int4(32)


def llama(name: str = "int8"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    bigkernels.quantize(model, name)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian"},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda options: str(next(iter(options.items()))),
)
def test_kinds_of_adapters(options: dict):
    """Those that read the weight of the layer, and those that find layers by themselves."""
    model = llama()
    before = model(input_ids=IDS).logits
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})
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
def test_conv1d_is_merged_as_it_stands():
    config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    bigkernels.quantize(model, "int8")
    lora = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    expected = adapted(input_ids=IDS).logits
    adapted.merge_adapter()
    assert (adapted(input_ids=IDS).logits - expected).norm() < 0.05 * expected.norm()
    adapted.unmerge_adapter()
    assert torch.equal(adapted(input_ids=IDS).logits, expected)


def test_adapters_are_not_quantized():
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    report = bigkernels.quantize(adapted, "int8")
    assert not report.quantized
    assert [row.what for row in report.skipped if "lora_" in row.path] == ["part of an adapter"] * 2


# ---- as on the model with the values that the codes stand for --------------------------------------------------------


def trained(model, config, seed: int = 0, name: str = "default"):
    """An adapted model whose adapter is no longer what it began as."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return adapted.eval()


def pair(config, name: str = "int8"):
    """Adapters on a quantized model, and the same on the dequantized one."""
    quantized = llama(name)
    plain = copy.deepcopy(quantized)
    bigkernels.dequantize(plain)
    return [trained(model, copy.deepcopy(config)) for model in (quantized, plain)]


KINDS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=True),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True),
    "bias": lambda: peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"], bias="lora_only"),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules="all-linear"),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=["q_proj"]),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=["q_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_compute_what_they_do_on_the_dequantized_model(kind: str):
    quantized, plain = pair(KINDS[kind]())
    found = [[n for n, p in model.named_parameters() if p.requires_grad] for model in (quantized, plain)]
    assert found[0] == found[1] and found[0]
    outputs = [model(input_ids=IDS, labels=IDS) for model in (quantized, plain)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=2e-4, atol=2e-5)
    for out in outputs:
        out.loss.backward()
    theirs = dict(plain.named_parameters())
    for name, p in quantized.named_parameters():
        if p.requires_grad and theirs[name].grad is not None:
            torch.testing.assert_close(p.grad, theirs[name].grad, rtol=2e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_merging_loses_what_rounding_loses(kind: str):
    quantized, plain = pair(KINDS[kind]())
    before = quantized(input_ids=IDS).logits
    with pytest.warns(UserWarning, match="merged into int8, which rounds"):
        quantized.merge_adapter()
    plain.merge_adapter()
    rounded = copy.deepcopy(plain).unload()
    bigkernels.quantize(rounded, "int8")
    layers = {path: m for path, m in quantized.named_modules() if isinstance(m, LoraQuantizedLinear)}
    for path, layer in layers.items():
        expected = plain.get_submodule(path).base_layer.weight
        got = layer.base_layer.weight
        step = expected.abs().amax(1, keepdim=True) / 127
        assert ((got - expected).abs() <= 0.51 * step).all()
        assert 0 < layer.merge_error < 1
    quantized.unmerge_adapter()
    assert torch.equal(quantized(input_ids=IDS).logits, before)


@pytest.mark.filterwarnings("ignore")
def test_without_a_loss_after_dequantize():
    quantized, plain = pair(KINDS["dora"]())
    bigkernels.dequantize(quantized)
    expected = quantized(input_ids=IDS).logits
    merged = quantized.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected, plain(input_ids=IDS).logits, rtol=2e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_the_rest_of_the_weight_goes_into_codes(kind: str):
    model = llama()
    before = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    expected = model(input_ids=IDS).logits
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=kind)
    )
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, QuantizedLinear) and not torch.equal(layer.base_layer.codes, before.codes)
    whole = layer.base_layer.weight + layer.get_delta_weight("default")
    rounding = before.scale.max()
    assert (whole - before.weight).abs().max() <= 1.01 * rounding
    assert (adapted(input_ids=IDS).logits - expected).norm() < 0.02 * expected.norm()


@pytest.mark.filterwarnings("ignore")
def test_several_adapters_are_switched_and_mixed(tmp_path):
    quantized, plain = (trained(model, KINDS["lora"](), name="a") for model in _two())
    for model in (quantized, plain):
        torch.manual_seed(1)
        model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.add_weighted_adapter(["a", "b"], [0.7, 0.2], "both", combination_type="cat")
    for name in ("a", "b", "both"):
        for model in (quantized, plain):
            model.set_adapter(name)
        torch.testing.assert_close(quantized(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=2e-4, atol=2e-5)
    with quantized.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(quantized(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=2e-4, atol=2e-5)
    # Merged one after the other, they are rounded once.
    quantized.set_adapter("a")
    quantized.merge_adapter(["a"])
    quantized.merge_adapter(["b"])
    one_by_one = quantized(input_ids=IDS).logits
    quantized.unmerge_adapter()
    quantized.merge_adapter(["a", "b"])
    assert torch.equal(quantized(input_ids=IDS).logits, one_by_one)
    quantized.unmerge_adapter()
    expected = quantized(input_ids=IDS).logits
    quantized.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a")
    again.load_adapter(tmp_path / "b", "b")
    assert torch.equal(again.eval()(input_ids=IDS).logits, expected)


def _two():
    quantized = llama()
    plain = copy.deepcopy(quantized)
    bigkernels.dequantize(plain)
    return quantized, plain


@pytest.mark.filterwarnings("ignore")
def test_conv1d_takes_lora_and_dora_alone():
    config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    quantized = transformers.GPT2LMHeadModel(config).eval()
    bigkernels.quantize(quantized, "int8")
    plain = copy.deepcopy(quantized)
    bigkernels.dequantize(plain)
    other = copy.deepcopy(quantized)
    dora = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], use_dora=True)
    quantized, plain = trained(quantized, copy.deepcopy(dora)), trained(plain, copy.deepcopy(dora))
    expected = plain(input_ids=IDS).logits
    torch.testing.assert_close(quantized(input_ids=IDS).logits, expected, rtol=2e-4, atol=2e-5)
    quantized.merge_adapter()
    assert (quantized(input_ids=IDS).logits - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(ValueError, match="c_proj is a quantized Conv1D"):
        peft.get_peft_model(other, peft.HRAConfig(r=4, target_modules=["c_proj"]))


def test_peft_may_be_imported_last():
    """PEFT asks a model for its configuration, which tells it of quantized layers."""
    code = """
import torch, transformers, bigkernels, sys
config = transformers.LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                  num_attention_heads=4)
model = transformers.LlamaForCausalLM(config)
bigkernels.quantize(model, "int4")
assert "peft" not in sys.modules
import peft
adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
print(type(adapted.base_model.model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "LoraQuantizedLinear", done.stderr


@pytest.mark.filterwarnings("ignore")
def test_transformers_own_adapters(tmp_path):
    pytest.importorskip("peft", minversion="0.22", reason="transformers asks for a newer PEFT")
    model = llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = llama()
    again.load_adapter(tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, expected)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["int8", None])
def test_files_of_lora_linear_are_those_of_peft(tmp_path, name: str | None):
    def base():
        model = llama()
        if name is None:
            bigkernels.dequantize(model)
        return model

    model = base()
    LoRALinear.add_to(model, ("*q_proj", "*up_proj"), rank=4, alpha=3.0)
    LoRALinear.add_to(model.model.layers[0].mlp, ("down_proj",), rank=2, alpha=5.0)
    torch.manual_seed(0)
    for key, p in model.named_parameters():
        if "lora_b" in key:
            torch.nn.init.normal_(p, std=0.1)
    expected = model(input_ids=IDS).logits
    LoRALinear.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = base()
        assert len(LoRALinear.load(again, tmp_path / folder)) == 3
        assert torch.equal(again(input_ids=IDS).logits, expected)
        LoRALinear.load(again, tmp_path / folder)  # in the place of those that are there
        assert torch.equal(again(input_ids=IDS).logits, expected)
        assert {n.rsplit(".")[-1] for n, p in again.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}


@pytest.mark.filterwarnings("ignore")
def test_files_of_peft_with_other_scales(tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "o_proj"],
        alpha_pattern={"o_proj": 9},
        rank_pattern={"o_proj": 2},
    )
    adapted = trained(llama(), config)
    expected = adapted(input_ids=IDS).logits
    adapted.save_pretrained(tmp_path)
    model = llama()
    LoRALinear.load(model, tmp_path)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    for kind in ("dora", "bias", "ia3"):
        trained(llama(), KINDS[kind]()).save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=r"use_dora is True|bias is 'lora_only'|no adapters of LoRA"):
            LoRALinear.load(model, tmp_path / kind)


def test_damaged_adapter_files(tmp_path):
    from safetensors.torch import load_file, save_file

    model = llama()
    LoRALinear.add_to(model, ("*q_proj",), rank=4)
    LoRALinear.save(model, tmp_path)
    state, path = load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors"
    key = next(name for name in state if "lora_A" in name)
    fresh = llama()
    for change, message in (
        ({key: state[key][:, :5].contiguous()}, "lora_A.weight and lora_B.weight have shapes"),
        ({key: state[key] * float("nan")}, "q_proj.lora_A.weight holds a value that is not finite"),
        ({key.replace("layers.0", "layers.7"): state[key].clone()}, "has no tensor .*layers.7.*lora_B.weight"),
        ({"surprise": state[key].clone()}, "surprise is no matrix"),
    ):
        save_file(state | change, path)
        with pytest.raises(ValueError, match=message):
            LoRALinear.load(fresh, tmp_path)
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        LoRALinear.load(fresh, tmp_path)
    save_file(state, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"peft_type": "IA3"}, {"lora_alpha": None}, {"lora_alpha": float("inf")}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"adapters of LoRA|an alpha is"):
            LoRALinear.load(fresh, tmp_path)
    assert not any(isinstance(m, LoRALinear) for m in fresh.modules())
    with pytest.raises(ValueError, match="has no adapters"):
        LoRALinear.save(fresh, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_adapters_by_its_own_option(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    data = datasets.Dataset.from_dict({"text": [" ".join(f"w{3 + (i + k) % 9}" for k in range(12)) for i in range(8)]})
    model = llama("nf4")
    codes = model.model.layers[0].mlp.up_proj.codes.clone()
    options = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model,
        options,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    layer = trainer.model.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, LoraQuantizedLinear) and torch.equal(layer.base_layer.codes, codes)
    trainer.save_model(str(tmp_path / "adapter"))
    expected = trainer.model.eval()(input_ids=IDS).logits
    again = peft.PeftModel.from_pretrained(llama("nf4"), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected)


def test_the_former_helper_says_that_it_is_not_needed():
    from bigkernels.quantization import peft as former

    config = peft.LoraConfig(target_modules="all-linear")
    with pytest.warns(DeprecationWarning, match="no longer needed"):
        assert former.on_quantized_layers(config) is config
    assert former.LoraQuantizedLinear is LoraQuantizedLinear
    with pytest.raises(AttributeError, match="other"):
        _ = former.other
