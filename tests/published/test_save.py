"""`save_quantized`: folders that other libraries read."""

from __future__ import annotations

import json

import pytest
import torch

import bigkernels
from bigkernels.nn import QuantizedLinear
from bigkernels.quantization import Int4

transformers = pytest.importorskip("transformers", minversion="5")
safetensors = pytest.importorskip("safetensors.torch")

from published import folders  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
INT4 = Int4(64, "rtn")
FORMATS = {"int4": INT4, "int8": "int8", "w8a8": "int8-dynamic", "fp8": "fp8", "mixed": {"*mlp*": INT4, "*": "int8"}}


def quantized(config, dtype: torch.dtype = torch.bfloat16):
    model = folders.model(dtype)
    bigkernels.quantize(model, config)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(folders.IDS).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_compressed_tensors(tmp_path, name: str, dtype: torch.dtype):
    model = quantized(FORMATS[name], dtype)
    expected = logits(model)
    bigkernels.save_quantized(model, tmp_path, "compressed-tensors", max_shard_size="60KB")
    assert torch.equal(logits(model), expected) and model.hf_quantizer is not None, "the model stays what it is"
    again = bigkernels.load_quantized(tmp_path)
    assert torch.equal(logits(again), expected) and not again.dense_layers
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate({k: v for k, v in said.items()})
    state = {}
    for file in tmp_path.glob("*.safetensors"):
        state |= safetensors.load_file(file)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            held = {k.rpartition(".")[2]: t for k, t in state.items() if k.rpartition(".")[0] == path}
            scheme = next(s for s in parsed.config_groups.values() if path in s.targets or "Linear" in s.targets)
            values = BaseCompressor.get_value_from_registry(scheme.format).decompress(held, scheme)["weight"]
            if values.dtype == torch.float32 or name == "int4":
                assert torch.equal(values.to(dtype), module.qweight.dequantize(dtype)), path
    if name in ("int8", "fp8"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (logits(theirs).float() - expected.float()).norm() < 0.02 * expected.float().norm()
    assert package.__version__


def test_gptq(tmp_path):
    model = quantized(INT4, torch.float16)
    expected = logits(model)
    bigkernels.save_quantized(model, tmp_path, "gptq")
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["quantization_config"]["quant_method"] == "gptq" and "fusion_config" not in said
    again = bigkernels.load_quantized(tmp_path)
    assert torch.equal(logits(again), expected)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    path = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(path).qweight.dequantize(torch.float16)
    words, zeros = state[f"{path}.qweight"], state[f"{path}.qzeros"]
    less = said["quantization_config"]["checkpoint_format"] == "gptq"
    for n, k in ((0, 0), (3, 9), (255, 127), (100, 65)):
        code = int(words[k // 8, n]) >> 4 * (k % 8) & 15
        zero = (int(zeros[k // 64, n // 8]) >> 4 * (n % 8) & 15) + less
        assert (code - zero) * state[f"{path}.scales"][k // 64, n] == weight[n, k]


@pytest.mark.parametrize(
    ("config", "method", "message"),
    [
        ("nf4", "compressed-tensors", "q_proj is nf4, which compressed-tensors"),
        ("int8", "gptq", "q_proj is int8"),
        ("int4", "gptq", "no integers"),
        ({"*mlp*": Int4(32, "rtn"), "*": INT4}, "gptq", "one group size"),
        ("int8", "exl2", "accepted are"),
    ],
    ids=str,
)
def test_refused(tmp_path, config, method: str, message: str):
    with pytest.raises(ValueError, match=message):
        bigkernels.save_quantized(quantized(config), tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


def test_refused_models(tmp_path):
    model = folders.model()
    with pytest.raises(ValueError, match="no quantized layers"):
        bigkernels.save_quantized(model, tmp_path, "gptq")
    bigkernels.quantize(model, INT4, embeddings=True)
    with pytest.raises(ValueError, match="embed_tokens is a QuantizedEmbedding"):
        bigkernels.save_quantized(model, tmp_path, "gptq")
    model = quantized(INT4)
    bigkernels.nn.LoRALinear.add_to(model)
    with pytest.raises(ValueError, match="has an adapter"):
        bigkernels.save_quantized(model, tmp_path, "gptq")
