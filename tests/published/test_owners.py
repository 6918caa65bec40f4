"""Folders and weights that the libraries themselves wrote, and what they make of them."""

from __future__ import annotations

import json

import pytest
import torch

import bigkernels
from bigkernels.nn import QuantizedLinear
from bigkernels.published._methods import HQQ, BitsAndBytes4, BitsAndBytes8, CompressedTensors
from bigkernels.published._packed import Packed
from bigkernels.quantization import FP8, NF4, Q8_0, Int4, Int8, Int8Dynamic

transformers = pytest.importorskip("transformers", minversion="5")
save_file = pytest.importorskip("safetensors.torch").save_file

from published import folders  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def scheme(**weights) -> dict:
    return {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "dynamic": False} | weights}


COMPRESSED = {
    "int4 in groups": (scheme(num_bits=4, strategy="group", group_size=64), "pack-quantized", Int4),
    "int4 in groups, asymmetric": (
        scheme(num_bits=4, strategy="group", group_size=32, symmetric=False),
        "pack-quantized",
        Int4,
    ),
    "int4 a channel": (scheme(num_bits=4, strategy="channel"), "pack-quantized", Int4),
    "int3 in groups": (scheme(num_bits=3, strategy="group", group_size=32), "pack-quantized", Int4),
    "int8 packed in groups": (scheme(num_bits=8, strategy="group", group_size=64), "pack-quantized", Q8_0),
    "int8 a channel": (scheme(num_bits=8, strategy="channel"), "int-quantized", Int8),
    "int8 a tensor": (scheme(num_bits=8, strategy="tensor"), "int-quantized", Int8),
    "w8a8": (scheme(num_bits=8, strategy="channel") | {"input_activations": TOKENS}, "int-quantized", Int8Dynamic),
    "fp8 a channel": (scheme(num_bits=8, type="float", strategy="channel"), "float-quantized", FP8),
    "fp8 a tensor": (scheme(num_bits=8, type="float", strategy="tensor"), "float-quantized", FP8),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors(tmp_path, case: str, dtype: torch.dtype):
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    said, form, expected_format = COMPRESSED[case]
    parsed = QuantizationScheme.model_validate(said)
    weights = said["weights"]

    def layer(n: int, k: int):
        rows = 1 if weights["strategy"] == "tensor" else n
        groups = k // weights.get("group_size", k)
        state = {
            "weight": torch.randn(n, k).to(dtype),
            "weight_scale": (torch.rand(rows, groups) / 40 + 0.01).to(dtype),
        }
        if rows == 1:
            state["weight_scale"] = state["weight_scale"].flatten()
        half = 1 << weights["num_bits"] - 1
        low = 0 if weights["symmetric"] else -half
        state["weight_zero_point"] = torch.randint(
            low, -low + 1 if low == 0 else half, state["weight_scale"].shape, dtype=torch.int8
        )
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(dict(state), parsed)
        return stored, compressor.decompress(dict(stored), parsed)["weight"]

    whole = {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "version": package.__version__,
        "config_groups": {"group_0": said | {"format": form}},
        "quantization_status": "compressed",
    }
    expected = folders.write(tmp_path, layer, whole, folders.model(dtype))
    model = bigkernels.load_quantized(tmp_path)
    found = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(found) == 7 and not model.dense_layers
    assert {type(m.weight_format) for m in found.values()} <= {expected_format, Int8}
    for path, module in found.items():
        assert torch.equal(module.qweight.dequantize(dtype), expected[f"{path}.weight"]), path
    if not weights["symmetric"]:
        return  # compressed-tensors 0.20 expects zero points of another shape than it writes
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        a, b = (m(folders.IDS).logits.float() for m in (model, theirs))
    if case != "w8a8":
        # Of the same weights; bfloat16 has an eighth of float16's precision.
        assert (a - b).norm() < (0.02 if dtype is torch.float16 else 0.16) * b.norm()


def test_bitsandbytes_4bit():
    functional = pytest.importorskip("bitsandbytes").functional
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            w = torch.randn(32, 256, dtype=torch.bfloat16)
            packed, state = functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=nested)
            held = {"weight": packed} | {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
            found = BitsAndBytes4({}).decode("layer", held)
            assert isinstance(found, Packed) and (kind == "fp4" or isinstance(found.format, NF4))
            assert torch.equal(found.dequantize(torch.bfloat16), functional.dequantize_4bit(packed, state))


def test_bitsandbytes_8bit():
    functional = pytest.importorskip("bitsandbytes").functional
    codes, most, _ = functional.int8_vectorwise_quant(torch.randn(32, 256, dtype=torch.float16))
    found = BitsAndBytes8({}).decode("layer", {"weight": codes, "SCB": most})
    expected = functional.int8_vectorwise_dequant(codes, most)
    torch.testing.assert_close(found.dequantize(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq(bits: int):
    package = pytest.importorskip("hqq.core.quantize")
    linear = torch.nn.Linear(128, 64, bias=False)
    config = package.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    layer = package.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
    found = HQQ({}).decode("layer", layer.state_dict())
    meta = layer.meta | {
        "scale": layer.meta["scale"].float(),
        "zero": layer.meta["zero"].float(),
        "compute_dtype": torch.float32,
    }
    expected = package.Quantizer.dequantize(layer.W_q, meta)  # of the same numbers, without rounding in between
    assert torch.equal(found.dequantize(torch.float16) if bits < 8 else found, expected.half())


@pytest.mark.parametrize("case", ["int8", "int8 in groups", "w8a8", "int4 in groups", "int2 in groups", "float8"])
def test_torchao(tmp_path, case: str):
    """Its files, and what its classes dequantize."""
    package = pytest.importorskip("torchao.quantization")
    flatten = pytest.importorskip("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict
    made, expected_format = (
        {
            "int8": (package.Int8WeightOnlyConfig, {}),
            "w8a8": (package.Int8DynamicActivationInt8WeightConfig, {}),
            "int8 in groups": (package.Int8WeightOnlyConfig, {"granularity": package.PerGroup(64)}),
            "int4 in groups": (
                package.IntxWeightOnlyConfig,
                {"weight_dtype": torch.int4, "granularity": package.PerGroup(32)},
            ),
            "int2 in groups": (
                package.IntxWeightOnlyConfig,
                {"weight_dtype": torch.int2, "granularity": package.PerGroup(64)},
            ),
            "float8": (package.Float8WeightOnlyConfig, {}),
        }[case],
        {"int8": Int8, "w8a8": Int8Dynamic, "float8": FP8, "int8 in groups": Q8_0}.get(case, Int4),
    )
    theirs = folders.model(torch.bfloat16)
    plain = {name: t.clone() for name, t in theirs.state_dict().items()}
    package.quantize_(theirs.model.layers, made[0](**made[1]))
    tensors, header = flatten(theirs.state_dict())
    folders.model(torch.bfloat16).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", header | {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    said = {"quant_method": "torchao", "quant_type": {"default": {}}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    model = bigkernels.load_quantized(tmp_path)
    found = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(found) + len(model.dense_layers) == 7
    assert {type(m.weight_format) for m in found.values()} == {expected_format}
    for path, module in model.named_modules():
        if path in found or path in model.dense_layers:
            values = module.qweight.dequantize() if path in found else module.weight
            expected = theirs.get_submodule(path).weight.dequantize()
            assert torch.equal(values, expected) and not torch.equal(expected, plain[f"{path}.weight"]), path


def test_schemes_by_name():
    groups = {
        "a": scheme(num_bits=8, strategy="channel") | {"targets": ["re:.*down_proj"]},
        "b": scheme(num_bits=4, strategy="group", group_size=32),
    }
    method = CompressedTensors({"config_groups": groups})
    assert method._scheme("model.layers.0.mlp.down_proj")["weights"]["num_bits"] == 8
    assert method._scheme("model.layers.0.mlp.up_proj")["weights"]["num_bits"] == 4
    with pytest.raises(ValueError, match="is no pattern"):
        CompressedTensors({"config_groups": {"a": groups["a"] | {"targets": ["re:("]}}})._scheme("x")
