"""GGUF files by `from_pretrained`, which keeps their codes once it was told so, and mixtures of experts in them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import bigkernels
from bigkernels.nn import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from bigkernels.quantization import GGUFBlocks

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")

from gguf_files import SIZE, blocks, llama  # noqa: E402 - it needs gguf
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING  # noqa: E402

from bigkernels.integrations.transformers import register  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
IDS = torch.arange(12).view(2, 6) * 5 % 64
pytestmark = pytest.mark.filterwarnings("ignore")


def read(path: Path, **options):
    return AutoModel.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options)


@pytest.fixture
def registered(monkeypatch):
    """transformers as `register` leaves it, and afterwards as it was."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "gguf", AUTO_QUANTIZER_MAPPING["gguf"])
    register()
    yield
    register(gguf=False)


def test_files_that_end_too_early_are_named_by_their_tensor(registered, tmp_path):
    whole = llama(tmp_path / "whole.gguf", "Q8_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size, message in (
        (len(whole) - 40, "ends before tensor blk.0.ffn_down.weight does"),
        (len(whole) // 2, r"ends before tensor blk.0.\w+.weight does"),
        (700, "ends in its header"),
        (100, "ends in its header"),
        (3, "is no GGUF file"),
    ):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=message):
            read(cut)
    register(gguf=False)
    cut.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="reshape"):  # transformers' own words, as before
        read(cut)


@pytest.mark.parametrize("kind, head", [("Q4_1", False), ("Q6_K", True), ("F16", False)])
def test_the_codes_of_the_file(kind: str, head: bool, registered, tmp_path):
    path = llama(tmp_path / "model.gguf", kind, head=head)
    model, expected = read(path), bigkernels.load_gguf(path)
    assert type(model.model.embed_tokens) is QuantizedEmbedding and not model.training
    if kind != "F16":
        assert type(model.model.layers[0].mlp.up_proj) is QuantizedLinear
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, t in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], t), name
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(logits, expected(IDS).logits)
    bigkernels.save_gguf(model, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    model.save_pretrained(tmp_path / "folder")
    again = AutoModel.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, logits)


def test_transformers_own_way_is_left(registered, tmp_path):
    path = llama(tmp_path / "model.gguf", "Q4_K")
    dense = read(path, quantization_config=transformers.utils.quantization_config.GgufConfig(dequantize=True))
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError):  # by transformers, which reads the configuration first
        read(path)


def test_nothing_changes_before_it_is_told(tmp_path):
    assert AUTO_QUANTIZER_MAPPING["gguf"].__module__.startswith("transformers.")
    assert type(read(llama(tmp_path / "model.gguf", "Q4_1")).model.layers[0].mlp.up_proj) is torch.nn.Linear


def mixture(path: Path, kind: str) -> Path:
    """A Qwen3 of four experts."""
    e, inner = 4, 768  # which transformers does not read of the file
    shapes = {
        "attn_q": (SIZE, SIZE),
        "attn_k": (128, SIZE),
        "attn_v": (128, SIZE),
        "attn_output": (SIZE, SIZE),
        "ffn_gate_exps": (e, inner, SIZE),
        "ffn_up_exps": (e, inner, SIZE),
        "ffn_down_exps": (e, SIZE, inner),
    }
    made = {f"blk.0.{name}.weight": (blocks(kind, shape, i), kind) for i, (name, shape) in enumerate(shapes.items())}
    made |= {
        "token_embd.weight": (blocks("Q8_0", (64, SIZE)), "Q8_0"),
        "output.weight": (blocks("Q8_0", (64, SIZE), 5), "Q8_0"),
        "blk.0.ffn_gate_inp.weight": (blocks("F32", (e, SIZE), 6), "F32"),
    }
    for name, size in (("attn_norm", SIZE), ("ffn_norm", SIZE), ("attn_q_norm", 64), ("attn_k_norm", 64)):
        made[f"blk.0.{name}.weight"] = np.ones(size, np.float32).view(np.uint8), "F32"
    made["output_norm.weight"] = np.ones(SIZE, np.float32).view(np.uint8), "F32"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in {
        "embedding_length": SIZE,
        "block_count": 1,
        "feed_forward_length": inner,
        "context_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "vocab_size": 64,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "expert_count": e,
        "expert_used_count": 2,
        "expert_feed_forward_length": inner,
    }.items():
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_float32("qwen3moe.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("qwen3moe.rope.freq_base", 1e6)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(64)])
    for name, (raw, raw_kind) in made.items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[raw_kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "F16"])
def test_mixtures_of_experts(kind: str, tmp_path):
    path = mixture(tmp_path / "moe.gguf", kind)
    model = bigkernels.load_gguf(path)
    experts = model.model.layers[0].mlp.experts
    if kind != "F16":
        assert type(experts.gate_up_proj) is QuantizedExperts and type(experts.down_proj) is QuantizedExperts
    if kind == "Q4_K":
        assert experts.down_proj.weight_format == GGUFBlocks("Q4_K")
    dense = copy.deepcopy(model)
    bigkernels.dequantize(dense)
    plain = read(path)  # by transformers
    for name, t in plain.state_dict().items():
        assert torch.equal(dense.state_dict()[name], t), name
    with torch.no_grad():
        expected = plain(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    bigkernels.save_gguf(model, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
