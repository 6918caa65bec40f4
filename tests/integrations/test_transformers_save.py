"""Quantized models in folders of transformers: saved here, loaded in another process."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bigkernels
from bigkernels.nn import LoRALinear, QuantizedExperts, QuantizedLinear
from bigkernels.nn.quantized import Quantized
from bigkernels.quantization import Int4

transformers = pytest.importorskip("transformers", minversion="5")

from integrations import models_saved as models  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(models.IDS).logits


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Logits by format and kind: of the models, and of what another process loaded."""
    folder = tmp_path_factory.mktemp("saved")
    here = {}
    for name, kind in models.CASES:
        model = models.made(name, kind)
        here[name, kind] = logits(model)
        model.save_pretrained(folder / f"{name}-{kind}", max_shard_size="40KB" if name == "int4" else "5GB")
    found = python(models.__file__, str(folder), str(folder / "logits.pt"))
    assert found.returncode == 0, found.stderr[-2000:]
    return folder, here, torch.load(folder / "logits.pt")


@pytest.mark.parametrize(("name", "kind"), models.CASES)
def test_another_process_computes_the_same_bits(elsewhere, name: str, kind: str):
    _, here, there = elsewhere
    assert torch.equal(here[name, kind], there[name, kind])


def test_large_models_lie_in_several_files(elsewhere):
    assert len(list((elsewhere[0] / "int4-tied").glob("model-*.safetensors"))) > 1


def test_the_config_says_what_the_folder_holds(elsewhere):
    said = json.loads((elsewhere[0] / "int4-tied" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bigkernels" and said["tied"] == {"lm_head": "model.embed_tokens"}
    (group,) = said["formats"]
    assert group["format"] == "int4" and group["group_size"] == 128
    assert "model.layers.*.mlp.up_proj" in group["layers"] and "model.embed_tokens" in group["layers"]
    said = json.loads((elsewhere[0] / "nf4-lora" / "config.json").read_text())["quantization_config"]
    assert said["adapters"][0]["rank"] == 4 and len(said["adapters"][0]["layers"]) == 2


def test_a_process_without_bigkernels_is_told_what_to_import(elsewhere, tmp_path):
    folder = elsewhere[0] / "int8-plain"
    older = tmp_path / "older"  # a transformers that does not look at what is said there
    older.mkdir()
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("fusion_config")
    (older / "config.json").write_text(json.dumps(config))
    (older / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    code = f"""
import transformers
for folder in ({str(folder)!r}, {str(older)!r}):
    for kind in (transformers.AutoModelForCausalLM, transformers.LlamaModel):
        try:
            kind.from_pretrained(folder)
        except Exception as error:
            print(type(error).__name__, error)
        else:
            print("loaded")
"""
    lines = python("-c", code).stdout.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["ValueError", "ValueError", "RuntimeError", "RuntimeError"]
    assert all("import bigkernels.integrations.transformers" in line for line in lines[:2])


def test_saved_again_and_again(tmp_path):
    model = models.made("nf4", "tied")
    expected = logits(model)
    for i in range(2):
        model.save_pretrained(tmp_path / str(i))
        model = AutoModel.from_pretrained(tmp_path / str(i))
        assert torch.equal(logits(model), expected)
        assert model.lm_head.shares(model.model.embed_tokens)
        assert model.lm_head.codes.data_ptr() == model.model.embed_tokens.codes.data_ptr()
    assert model.is_quantized and model.hf_quantizer.is_serializable() and model.quantization_method == "bigkernels"
    model.tie_weights()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), bigkernels.patch])
def test_copies_and_patched_models_are_saved(change, tmp_path):
    model = models.made("int8", "plain")
    expected = logits(model)
    changed = change(model)
    (changed if isinstance(changed, torch.nn.Module) else model).save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), expected)


def test_some_layers_formats_of_their_own_and_calibration(tmp_path):
    model = models.plain("plain")
    bigkernels.quantize(
        model, {"*layers.0*down_proj": "nf4", "*mlp*": Int4(32, "awq"), "*k_proj": "fp8"}, calibration=[models.IDS]
    )
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    found = {path: m.weight_format for path, m in again.named_modules() if isinstance(m, QuantizedLinear)}
    assert found == {path: m.weight_format for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert found["model.layers.1.mlp.down_proj"] == Int4(32, "awq") and "model.layers.0.self_attn.q_proj" not in found


def test_what_follows_quantizing_counts(tmp_path):
    """The folder holds the model as it is when it is saved."""
    model = models.plain("plain")
    bigkernels.quantize(model, "int8", filter=lambda name, _: "mlp" in name)
    bigkernels.quantize(model, "int4")
    model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.up_proj.dequantize()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), expected)


def test_the_model_inside_and_heads_around_it(tmp_path):
    model = models.made("int8", "plain")
    with torch.no_grad():
        expected = model.model(models.IDS).last_hidden_state
    model.model.save_pretrained(tmp_path / "inside")
    model.save_pretrained(tmp_path / "whole")
    for folder in ("inside", "whole"):
        again = transformers.AutoModel.from_pretrained(tmp_path / folder)
        assert isinstance(again.layers[0].mlp.up_proj, QuantizedLinear)
        with torch.no_grad():
            assert torch.equal(again(models.IDS).last_hidden_state, expected)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=3)
    assert torch.equal(judge.model(models.IDS).last_hidden_state, expected)
    assert type(judge.score) is torch.nn.Linear and judge.score.weight.isfinite().all()


def test_dequantized_models_are_plain_again(tmp_path):
    model = models.made("int8", "experts")
    model.save_pretrained(tmp_path / "codes")
    model = AutoModel.from_pretrained(tmp_path / "codes")
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, QuantizedExperts)
    model.dequantize()
    assert not any(isinstance(m, Quantized) for m in model.modules())
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "plain")
    said = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in said and "fusion_config" not in said
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "plain")), logits(model))
    names = (tmp_path / "plain" / "model.safetensors").read_bytes()[:20000]
    assert b"experts.0.w1.weight" in names, "experts are saved one by one, as transformers does"


def test_adapters_on_a_plain_model_are_saved_too(tmp_path):
    model = models.plain("plain")
    LoRALinear.add_to(model, ("*q_proj",), rank=2)
    torch.nn.init.normal_(model.model.layers[1].self_attn.q_proj.lora_b)
    assert not model.is_quantized
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert {n.split(".")[-1] for n, p in again.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    model.model.layers[0].self_attn.q_proj.merge()
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj is merged"):
        model.save_pretrained(tmp_path)


def test_weights_kept_in_float32_stay_so(tmp_path):
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_ff=96, num_layers=1, num_heads=4, d_kv=16, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "plain")
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "plain", dtype=torch.float16)
    bigkernels.quantize(model, "q8_0")
    inputs = {"input_ids": models.IDS, "decoder_input_ids": models.IDS}
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.dtype == torch.float32
    model.save_pretrained(tmp_path / "codes")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "codes")
    layers = [m.encoder.block[0].layer[1].DenseReluDense for m in (model, again)]
    assert layers[1].wo.dtype == torch.float32 and layers[1].wo.scale.dtype == torch.float16
    assert layers[1].wi.dtype == torch.float16
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_conv1d_and_a_wrapper_around_the_model(tmp_path):
    config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    bigkernels.quantize(torch.nn.ModuleDict({"student": model}), "int4")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert type(bigkernels.dequantize(again) or again.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


@pytest.mark.parametrize("how", ["saved", "read"])
def test_tied_biases_and_scaled_embeddings(tmp_path, how: str):
    """BERT ties the bias of its decoder too; BART's class of embeddings is left alone, and what is tied to it."""
    layers = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "d_model": 64,
    }
    bert = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    options = {"embeddings": True, "skip": ()}
    torch.manual_seed(0)
    for model in (
        transformers.BertForMaskedLM(bert),
        transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=99, **layers)),
    ):
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        model.eval().save_pretrained(tmp_path / "plain")
        bigkernels.quantize(model, "nf4", **options)
        if how == "saved":
            model.save_pretrained(tmp_path / how)
            again = type(model).from_pretrained(tmp_path / how)
        else:
            config = bigkernels.integrations.transformers.Config("nf4", **options)
            again = type(model).from_pretrained(tmp_path / "plain", quantization_config=config)
        assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.state_dict()["final_logits_bias"], model.state_dict()["final_logits_bias"])


def test_nothing_but_codes(tmp_path):
    """transformers asks a model that it saves for the dtype of its parameters."""
    torch.manual_seed(0)
    config = transformers.OlmoConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.OlmoForCausalLM(config).eval()
    bigkernels.quantize(model, "int8", embeddings=True, skip=())
    assert not list(model.parameters()) and logits(model).isfinite().all()
    with pytest.raises(ValueError, match="leave one out"):
        model.save_pretrained(tmp_path)


def test_layers_inside_of_pefts_adapters_are_not_saved_alone(tmp_path):
    peft = pytest.importorskip("peft")
    model = models.made("int8", "plain")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="inside of an adapter of PEFT"):
        model.save_pretrained(tmp_path)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.unload().save_pretrained(tmp_path / "base")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "base")), logits(model))


def test_trainer_wants_something_to_train(tmp_path):
    from transformers.trainer_utils import validate_quantization_for_training as validate

    model = models.made("int8", "plain")
    with pytest.raises(ValueError, match="purely quantized"):
        validate(model)
    LoRALinear.add_to(model, ("*q_proj",))
    validate(model)
    validate(pickle.loads(pickle.dumps(model)))
    copied = copy.deepcopy(model)
    bigkernels.dequantize(copied)
    validate(copied)
    validate(model)


def test_push_to_hub_sends_the_folder(tmp_path, monkeypatch):
    from transformers.utils import hub

    sent = {}

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **_):
            sent.update({o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations})

        def __getattr__(self, name):
            return lambda *a, **k: None

    for module in (hub, sys.modules["transformers.modeling_utils"]):
        monkeypatch.setattr(module, "hf_api", Api)
    model = models.made("int4", "tied")
    model.push_to_hub("somebody/model", private=True)
    assert {"config.json", "model.safetensors"} <= set(sent)
    for name, data in sent.items():
        (tmp_path / name).write_bytes(data)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(model))
