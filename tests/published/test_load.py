"""`load_quantized` of folders in the layouts of other libraries."""

from __future__ import annotations

import json

import pytest
import torch

import bigkernels
from bigkernels.nn import QuantizedExperts, QuantizedLinear
from bigkernels.quantization import FP8, MXFP4, Q8_0, Int4, Int8, Int8Dynamic

transformers = pytest.importorskip("transformers", minversion="5")
safetensors = pytest.importorskip("safetensors.torch")
safe_open = pytest.importorskip("safetensors").safe_open

from published import folders  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def checked(folder, expected: dict, formats: set, dtype: torch.dtype = torch.float16, exact: bool = True):
    """The model of a folder: its weights bit for bit, and its logits beside those of a plain model with them."""
    model = bigkernels.load_quantized(folder)
    found = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert {type(m.weight_format) for m in found.values()} == formats
    assert len(found) + len(model.dense_layers) == 7
    for path, module in found.items():
        if exact:
            assert torch.equal(module.qweight.dequantize(dtype), expected[f"{path}.weight"].to(dtype)), path
        else:
            torch.testing.assert_close(
                module.qweight.dequantize(torch.float32), expected[f"{path}.weight"], rtol=2e-7, atol=0
            )
    for path in model.dense_layers:
        assert torch.equal(model.get_submodule(path).weight, expected[f"{path}.weight"].to(dtype)), path
    if Int8Dynamic not in formats:
        plain = folders.model(dtype)
        plain.load_state_dict(expected)
        with torch.no_grad():
            a, b = (m.float()(folders.IDS).logits for m in (bigkernels.dequantize(model) or model, plain))
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)
    return model


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 64, 128, -1])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(tmp_path, bits: int, size: int, version: str):
    layer = folders.gptq(bits, size, sym=bits == 8, v2=version == "gptq_v2")
    said = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": version, "sym": bits == 8}
    expected = folders.write(tmp_path, layer, said)
    by_eight = {Int8} if size < 1 else {Q8_0, Int8} if size == 128 else {Q8_0}  # some rows are one group of 128
    checked(tmp_path, expected, by_eight if bits == 8 else {Int4})


def test_gptq_that_no_format_stands_for(tmp_path):
    expected = folders.write(
        tmp_path, folders.gptq(8, 64), {"quant_method": "gptq", "sym": False, "bits": 8, "group_size": 64}
    )
    checked(tmp_path, expected, set())


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_with_act_order(tmp_path, bits: int):
    """Groups of elements from anywhere: codes are sorted by them, and inputs on their way in."""
    said = {"quant_method": "gptq", "bits": bits, "group_size": 64, "desc_act": True, "sym": False}
    expected = folders.write(tmp_path, folders.gptq(bits, 64, act_order=True), said)
    checked(tmp_path, expected, {Int4})
    model = bigkernels.load_quantized(tmp_path)
    layer = model.get_submodule(UP)
    w = expected[f"{UP}.weight"].float()
    assert layer.weight_format.act_order and torch.equal(layer.weight.float(), w)
    w = layer.qweight.dequantize(torch.float32)  # not rounded to float16
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, w.shape[1], dtype=torch.float32, requires_grad=True)
        found, up = bigkernels.functional.quantized_linear(x, layer.qweight), torch.randn(tokens, len(w))
        torch.testing.assert_close(found, x @ w.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(found, x, up)[0], up @ w, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        before = model(folders.IDS).logits
        bigkernels.save_quantized(model, tmp_path / "again", "gptq")
        again = bigkernels.load_quantized(tmp_path / "again")
        assert torch.equal(again(folders.IDS).logits, before) and again.get_submodule(UP).weight_format.act_order
        bigkernels.patch(model)  # a step program takes no such layer: the modules answer
        torch.testing.assert_close(model(folders.IDS).logits, before, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="act-order"):
        bigkernels.save_quantized(again, tmp_path / "other", "compressed-tensors")
    with pytest.raises(ValueError, match="read from published folders"):
        bigkernels.functional.quantize_weight(torch.randn(4, 64), layer.weight_format)


@pytest.mark.parametrize("meta", [{}, {"meta": {"quantizer": ["gptqmodel:2.0"]}}])
def test_gptq_zero_points_that_are_zero(tmp_path, meta: dict):
    """AutoGPTQ takes one from each number alone, GPTQModel from a word of eight."""

    def layer(n: int, k: int):
        tensors, weight = folders.gptq(4, 64, v2=True, zero_from=0)(n, k)
        wide = tensors["qzeros"].long() & 0xFFFFFFFF
        if meta:
            stored = (wide - 0x11111111) & 0xFFFFFFFF
        else:
            stored = sum(((wide >> 4 * i) - 1 & 15) << 4 * i for i in range(8))
        return tensors | {"qzeros": torch.where(stored >= 2**31, stored - 2**32, stored).int()}, weight

    expected = folders.write(
        tmp_path, layer, {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False} | meta
    )
    checked(tmp_path, expected, {Int4})


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_awq(tmp_path, version: str, size: int):
    said = {"quant_method": "awq", "bits": 4, "group_size": size, "version": version, "zero_point": True}
    checked(tmp_path, folders.write(tmp_path, folders.awq(size, version), said), {Int4})


def test_llm_int8(tmp_path):
    said = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    checked(tmp_path, folders.write(tmp_path, folders.int8_rows, said), {Int8}, exact=False)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_hqq(tmp_path, bits: int, size: int):
    expected = folders.write(tmp_path, folders.hqq(bits, size), {"quant_method": "hqq", "quant_config": {}})
    checked(tmp_path, expected, {Int4})


@pytest.mark.parametrize(
    ("kind", "size", "options", "formats"),
    [
        ("Int8Tensor", -1, {"zeros": False}, {Int8}),
        ("Int8Tensor", -1, {}, set()),
        ("Int8Tensor", 64, {}, set()),
        ("IntxUnpackedToInt8Tensor", 32, {"bits": 4}, {Int4}),
        ("IntxUnpackedToInt8Tensor", 64, {"bits": 3}, {Int4}),
        ("IntxUnpackedToInt8Tensor", -1, {"bits": 4}, {Int4}),
        ("IntxUnpackedToInt8Tensor", 64, {"zeros": False}, {Q8_0}),
        ("Float8Tensor", -1, {}, {FP8}),
        ("Int8Tensor", -1, {"zeros": False, "dynamic": True}, {Int8Dynamic}),
    ],
    ids=str,
)
def test_torchao(tmp_path, kind: str, size: int, options: dict, formats: set):
    said = {"quant_method": "torchao", "kind": kind, "size": size, "dynamic": options.get("dynamic")}
    options = {key: value for key, value in options.items() if key != "dynamic"}
    checked(tmp_path, folders.write(tmp_path, folders.torchao(kind, size, **options), said), formats)


def test_a_tied_head_reads_the_codes_of_the_embedding(tmp_path):
    """The file has the embedding alone."""
    said = {"quant_method": "torchao", "kind": "Int8Tensor", "size": -1}
    layer, plain = folders.torchao("Int8Tensor", -1, zeros=False), folders.model(tie_word_embeddings=True)
    expected = folders.write(tmp_path, layer, said, plain)
    path = "model.embed_tokens"
    tensors, weight = layer(*plain.model.embed_tokens.weight.shape)
    tensors = {f"{path}.{part}": t for part, t in tensors.items()}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        header = file.metadata() | folders.header(path, tensors, said)
        state = {
            name: file.get_tensor(name) for name in file.keys() if name not in (f"{path}.weight", "lm_head.weight")
        }
    safetensors.save_file(state | tensors, tmp_path / "model.safetensors", header)
    model = bigkernels.load_quantized(tmp_path)
    assert model.lm_head.shares(model.model.embed_tokens) and isinstance(model.lm_head, QuantizedLinear)
    assert torch.equal(model.lm_head.qweight.dequantize(), weight)
    plain.load_state_dict(expected | {f"{path}.weight": weight, "lm_head.weight": weight})
    with torch.no_grad():
        a, b = (m(folders.IDS).logits.float() for m in (model, plain))
    assert (a - b).norm() <= 0.01 * b.norm()
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(folders.IDS).logits.float(), a)
    assert again.lm_head.shares(again.model.embed_tokens)
    bigkernels.dequantize(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_torchao_that_is_refused(tmp_path):
    layer = folders.torchao("Int8Tensor", 64)
    for change, message in (
        ({"kind": "Int4TilePackedTo4dTensor"}, "is a Int4TilePackedTo4dTensor of torchao"),
        ({"size": 48}, r"blocks of \[1, 48\]"),
        ({"size": 32}, r"shape \(128, \d\), expected \(128, \d\)"),
    ):
        said = {"quant_method": "torchao", "kind": "Int8Tensor", "size": 64} | change
        folders.write(tmp_path, layer, said)
        with pytest.raises(ValueError, match=message):
            bigkernels.load_quantized(tmp_path)
    scaled = lambda n, k: (layer(n, k)[0] | {"_weight_act_pre_scale": torch.ones(k)}, layer(n, k)[1])  # noqa: E731
    folders.write(tmp_path, scaled, {"quant_method": "torchao", "kind": "Int8Tensor", "size": 64})
    with pytest.raises(ValueError, match="scales its inputs"):
        bigkernels.load_quantized(tmp_path)
    folders.write(tmp_path, layer, {"quant_method": "torchao", "kind": "Int8Tensor", "size": 64})
    changed(tmp_path, lambda s: None)  # without what the header says
    with pytest.raises(ValueError, match="header does not describe model.layers.0"):
        bigkernels.load_quantized(tmp_path)


def test_hqq_in_8_bits_is_held_plain(tmp_path):
    expected = folders.write(tmp_path, folders.hqq(8, 64), {"quant_method": "hqq", "quant_config": {}})
    checked(tmp_path, expected, set())


@pytest.mark.parametrize("lowest", [105, 2], ids=["usual", "beyond float16"])
def test_mxfp4_of_gpt_oss(tmp_path, lowest: int):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    plain = folders.model(torch.bfloat16, "GptOss", num_local_experts=3, num_experts_per_tok=2, head_dim=32)
    plain.save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    expected = {}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        e, k, n = state.pop(name).shape
        blocks = torch.randint(0, 256, (e, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(lowest, 125, (e, n, k // 32), dtype=torch.uint8)
        blocks[0, 0, 0], scales[0, 0, 0] = 8, 0  # zeros of either sign, of any scale
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = mxfp4.convert_moe_packed_tensors(blocks, scales)
    safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    model = bigkernels.load_quantized(tmp_path)
    assert len(expected) == 2 and not model.dense_layers
    for name, weight in expected.items():
        owner, _, key = name.rpartition(".")
        held = getattr(model.get_submodule(owner), key)
        assert isinstance(held, QuantizedExperts) and isinstance(held.weight_format, MXFP4)
        assert torch.equal(held.dequantize(), weight)
        assert held.qweight.nbytes * 32 == weight.numel() * 17, "4 bits and a byte for 32"
        plain.get_submodule(owner)._parameters[key] = torch.nn.Parameter(weight)
    with torch.no_grad():
        a, b = (m(folders.IDS).logits.float() for m in (model, plain))
    assert (a - b).norm() <= 0.05 * b.norm()
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(folders.IDS).logits.float(), a)


def test_experts_that_transformers_joins(tmp_path):
    plain = folders.model(kind="Mixtral", num_local_experts=3, num_experts_per_tok=2)
    said = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    expected = folders.write(tmp_path, folders.awq(64, "gemm"), said, plain)
    found = bigkernels.load_quantized(tmp_path)
    experts = found.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, QuantizedExperts) and isinstance(experts.gate_up_proj.weight_format, Int4)
    prefix = "model.layers.0.block_sparse_moe.experts"
    prefix = prefix if f"{prefix}.0.w1.weight" in expected else "model.layers.0.mlp.experts"
    for i in range(3):
        w1, w2, w3 = (expected[f"{prefix}.{i}.w{j}.weight"] for j in (1, 2, 3))
        assert torch.equal(experts.gate_up_proj.dequantize(torch.float16)[i], torch.cat((w1, w3)))
        assert torch.equal(experts.down_proj.dequantize(torch.float16)[i], w2)
    with torch.no_grad():
        logits = found(folders.IDS).logits
    found.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(folders.IDS).logits, logits)


def test_other_dtypes_adapters_and_saving(tmp_path):
    said = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    folders.write(tmp_path, folders.awq(64, "gemm"), said)
    model = bigkernels.load_quantized(str(tmp_path), dtype=torch.float32)
    assert model.dtype == model.model.layers[0].mlp.up_proj.dtype == torch.float32 and not model.training
    with torch.no_grad():
        logits = model(folders.IDS).logits
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(folders.IDS).logits, logits)
    bigkernels.nn.LoRALinear.add_to(model, rank=2)
    model(folders.IDS, labels=folders.IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.lora_b.grad.abs().sum() > 0


# ---- damaged folders -------------------------------------------------------------------------------------------------


def changed(folder, change) -> None:
    state = safetensors.load_file(folder / "model.safetensors")
    change(state)
    safetensors.save_file({k: t.contiguous() for k, t in state.items()}, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{UP}.scales"), f"no tensor {UP}.scales"),
        (
            lambda s: s.update({f"{UP}.scales": s[f"{UP}.scales"][:1]}),
            f"{UP}.scales has 1 groups|{UP}.qzeros has shape",
        ),
        (lambda s: s.update({f"{UP}.qzeros": s[f"{UP}.qzeros"].long()}), f"{UP}.qzeros is torch.int64"),
        (lambda s: s.update({f"{UP}.qweight": s[f"{UP}.qweight"][:-1]}), f"{UP}"),
        (lambda s: s.update({f"{UP}.qweight": s[f"{UP}.qweight"][0]}), f"{UP}.qweight has shape"),
        (lambda s: s[f"{UP}.scales"].fill_(float("inf")), f"{UP}.scales holds a value that is not finite"),
        (lambda s: s[f"{UP}.g_idx"].fill_(99), f"{UP}.g_idx names group 99"),
        (lambda s: s.update({"model.norm.weight": s["model.norm.weight"][:5]}), "model.norm.weight"),
        (lambda s: s.pop("model.norm.weight"), "model.norm.weight"),
        (lambda s: s.update({"lm_head.weight": s["lm_head.weight"][:5]}), "lm_head.weight has shape"),
        (lambda s: s.update({"surprise.weight": s["lm_head.weight"].clone()}), "surprise.weight"),
    ],
    ids=range(11),
)
def test_damaged_tensors_are_named(tmp_path, change, message: str):
    said = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    folders.write(tmp_path, folders.gptq(4, 64, sym=True), said)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        bigkernels.load_quantized(tmp_path)


@pytest.mark.parametrize("said", [
    None, 3, {}, {"quant_method": "eetq"}, {"quant_method": "gptq"}, {"quant_method": "gptq", "bits": 5},
    {"quant_method": "gptq", "bits": "4"}, {"quant_method": "gptq", "bits": 4, "group_size": 48},
    {"quant_method": "gptq", "bits": 4, "group_size": "x"}, {"quant_method": "awq", "version": "marlin"},
    {"quant_method": "compressed-tensors"}, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
], ids=str)  # fmt: skip
def test_configurations_that_are_none(tmp_path, said):
    folders.write(tmp_path, folders.gptq(4, 64, sym=True), said)
    with pytest.raises(ValueError, match="bigkernels"):
        bigkernels.load_quantized(tmp_path)


def test_folders_that_are_none(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        bigkernels.load_quantized(tmp_path)
    with pytest.raises(OSError, match="config.json"):
        bigkernels.load_quantized(tmp_path / "nowhere")


def test_files_are_in_the_folder(tmp_path):
    said = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    folders.write(tmp_path, folders.gptq(4, 64, sym=True), said)
    index = tmp_path / "model.safetensors.index.json"
    for weights, error in (({"a": "../x.safetensors"}, ValueError), ({"a": "x.safetensors"}, OSError)):
        index.write_text(json.dumps({"weight_map": weights}))
        with pytest.raises(error):
            bigkernels.load_quantized(tmp_path)
