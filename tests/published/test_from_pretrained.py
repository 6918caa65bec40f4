"""`from_pretrained` of folders of other libraries, where the user has chosen it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import bigkernels
from bigkernels.nn import LoRALinear, QuantizedLinear

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("safetensors.torch")

from published import folders  # noqa: E402

from bigkernels.integrations.transformers import register  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
pytestmark = pytest.mark.filterwarnings("ignore")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
METHODS = {
    "gptq": (folders.gptq(4, 64, sym=True), GPTQ),
    "awq": (folders.awq(64, "gemm"), {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}),
    "bitsandbytes": (folders.int8_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}),
    "hqq": (folders.hqq(4, 64), {"quant_method": "hqq", "quant_config": {}}),
    "torchao": (
        folders.torchao("Int8Tensor", -1, zeros=False),
        {"quant_method": "torchao", "quant_type": {}, "kind": "Int8Tensor", "size": -1},
    ),
}


@pytest.fixture
def chosen():
    """Chooses methods for the test alone."""
    yield lambda *methods: register(published=methods)
    register(published=False)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(folders.IDS).logits


@pytest.mark.parametrize("method", METHODS)
def test_methods(tmp_path, chosen, method: str):
    folders.write(tmp_path, *METHODS[method])
    expected = bigkernels.load_quantized(tmp_path)
    chosen(method)
    model = AutoModel.from_pretrained(tmp_path)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert torch.equal(logits(model), logits(expected)) and model.dense_layers == expected.dense_layers == []
    assert model.is_quantized and model.quantization_method == "bigkernels" and not model.training
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(expected))
    chosen()
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "ours")), logits(expected))


def test_owners_have_their_folders_unless_they_are_chosen(tmp_path, chosen):
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs

    before = dict(configs)
    folders.write(tmp_path, *METHODS["gptq"])
    chosen("awq", "bitsandbytes")
    assert configs["gptq"] is before["gptq"] and configs["bitsandbytes_4bit"] is not before["bitsandbytes_4bit"]
    register(published=True)
    assert isinstance(AutoModel.from_pretrained(tmp_path).model.layers[0].mlp.up_proj, QuantizedLinear)
    register(gguf=False)
    assert configs["gptq"] is not before["gptq"], "not said is as it was"
    register(published=False)
    assert {key: configs[key] for key in before} == before
    with pytest.raises(ValueError, match="exl2; accepted are gptq"):
        register(published=["exl2"])


def test_plain_folders_are_read_and_quantized_as_ever(tmp_path, chosen):
    plain = folders.model()
    plain.save_pretrained(tmp_path)
    chosen("gptq", "bitsandbytes")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(plain))
    config = bigkernels.integrations.transformers.Config("int8")
    assert isinstance(
        AutoModel.from_pretrained(tmp_path, quantization_config=config).model.layers[0].mlp.up_proj, QuantizedLinear
    )


def test_options_of_from_pretrained(tmp_path, chosen):
    folders.write(tmp_path, *METHODS["gptq"])
    chosen("gptq")
    model = AutoModel.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="cpu", attn_implementation="bigkernels"
    )
    assert model.dtype == model.model.layers[0].mlp.up_proj.dtype == torch.bfloat16
    expected = bigkernels.load_quantized(tmp_path, dtype=torch.bfloat16)
    expected.set_attn_implementation("bigkernels")
    assert torch.equal(logits(model), logits(expected))
    inside = transformers.AutoModel.from_pretrained(tmp_path)
    assert isinstance(inside.layers[0].mlp.up_proj, QuantizedLinear)
    LoRALinear.add_to(model, rank=2)
    model(folders.IDS, labels=folders.IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.lora_b.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.0.mlp.up_proj.scales"), "no tensor model.layers.0.mlp.up_proj.scales"),
        (lambda s: s.pop("model.norm.weight"), "has no tensor model.norm.weight"),
        (lambda s: s.update({"lm_head.weight": s["lm_head.weight"][:5]}), "lm_head.weight has shape"),
        (lambda s: s.update({"surprise.weight": s["lm_head.weight"].clone()}), "surprise.weight"),
    ],
    ids=range(4),
)
def test_damaged_folders(tmp_path, chosen, change, message: str):
    from safetensors.torch import load_file, save_file

    folders.write(tmp_path, *METHODS["gptq"])
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    chosen("gptq")
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path)
