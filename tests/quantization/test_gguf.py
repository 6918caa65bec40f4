"""GGUF files: what `load_gguf` makes of them, against transformers' own reader."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bigkernels
from bigkernels._compare import compare
from bigkernels.nn import QuantizedEmbedding, QuantizedLinear
from bigkernels.program._state import KEY
from bigkernels.quantization import Q4_1, Q8_0, GGUFBlocks

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(1, 13).view(2, 6) * 7 % 50
LLAMA = {
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "context_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "vocab_size": 50,
    "rope.dimension_count": 16,
}
MATRICES = {
    "attn_q": (64, 64),
    "attn_k": (32, 64),
    "attn_v": (32, 64),
    "attn_output": (64, 64),
    "ffn_gate": (96, 64),
    "ffn_up": (96, 64),
    "ffn_down": (64, 96),
}


def tensors(head: bool = False, kind: str = "Q4_1") -> dict[str, tuple[np.ndarray, str]]:
    """Name: values and type, of a small Llama as llama.cpp writes it."""
    draw = np.random.default_rng(0)
    made = {
        "token_embd.weight": (draw.normal(size=(50, 64)), "Q8_0"),
        "output_norm.weight": (draw.normal(size=64), "F32"),
    }
    if head:
        made["output.weight"] = (draw.normal(size=(50, 64)) * 0.2, "Q8_0")
    for i in range(2):
        for name in ("attn_norm", "ffn_norm"):
            made[f"blk.{i}.{name}.weight"] = draw.normal(size=64) + 1, "F32"
        for name, shape in MATRICES.items():
            made[f"blk.{i}.{name}.weight"] = draw.normal(size=shape) * 0.15, kind
    return {name: (values.astype(np.float32), kind) for name, (values, kind) in made.items()}


def write(path: Path, contents: dict[str, tuple[np.ndarray, str]], architecture: str = "llama", **more) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**LLAMA, **more}.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(50)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 50)
    for name, (values, kind) in contents.items():
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_transformers(path: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    dense = {name: (values, "F32") for name, (values, _) in tensors().items()}
    return {
        "tied": write(folder / "tied.gguf", tensors()),
        "a head": write(folder / "head.gguf", tensors(head=True)),
        "Q4_0": write(folder / "q4_0.gguf", tensors(kind="Q4_0")),
        "dense": write(folder / "dense.gguf", tensors(head=True, kind="F16")),
        "dense, tied": write(folder / "tied_dense.gguf", dense),
        "another type": write(folder / "q5_0.gguf", tensors(kind="Q5_0")),
    }


@pytest.mark.parametrize("name", ["tied", "a head", "Q4_0", "dense", "dense, tied", "another type"])
def test_values_and_logits_are_those_of_transformers(files, name: str):
    model, plain = bigkernels.load_gguf(files[name]), by_transformers(files[name])
    layer = model.model.layers[1].self_attn.q_proj
    assert type(layer) is (nn.Linear if name.startswith("dense") else QuantizedLinear)
    if name == "another type":
        assert layer.weight_format == GGUFBlocks("Q5_0")
    if name != "dense, tied":
        assert isinstance(model.model.embed_tokens, QuantizedEmbedding) and model.lm_head.weight_format == Q8_0()
    assert not model.training and not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    dense = copy.deepcopy(model)
    bigkernels.dequantize(dense)
    for key, expected in plain.state_dict().items():
        assert torch.equal(dense.state_dict()[key], expected), key
    with torch.no_grad():
        found = compare(model(IDS).logits, plain(IDS).logits, copy.deepcopy(plain).double()(IDS).logits, scale="row")
    assert found.ok, str(found)
    tied = name != "a head" and name != "dense"
    if name != "dense, tied":
        assert model.lm_head.shares(model.model.embed_tokens) is tied
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) is tied


def test_another_architecture(tmp_path):
    """Qwen2: biases, and no rows in another order."""
    biases = {
        f"blk.{i}.attn_{n}.bias": (np.random.default_rng(i).normal(size=size).astype(np.float32), "F32")
        for i in range(2)
        for n, size in (("q", 64), ("k", 32), ("v", 32))
    }
    path = write(tmp_path / "qwen2.gguf", tensors() | biases, "qwen2")
    model, plain = bigkernels.load_gguf(path), by_transformers(path)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.model.layers[0].self_attn.q_proj.bias is not None
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


def test_codes_are_those_of_the_file(files):
    model = bigkernels.load_gguf(files["tied"], torch.bfloat16)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.weight_format == Q4_1() and layer.dtype == torch.bfloat16 and model(IDS).logits.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32
    values = tensors()["blk.0.ffn_down.weight"][0]
    expected = bigkernels.functional.quantize_weight(torch.from_numpy(values), "q4_1")
    for name, t in expected.tensors.items():
        assert torch.equal(layer.qweight.tensors[name], t), name


def test_a_loaded_model_is_one_like_others(files):
    model = bigkernels.load_gguf(files["tied"])
    expected = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, expected)
    again = bigkernels.load_gguf(files["Q4_0"])
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS).logits, expected)
    bigkernels.patch(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    new = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=5, do_sample=False)
    bigkernels.unpatch(model)
    assert torch.equal(
        new, model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=5, do_sample=False)
    )
    model(IDS, labels=IDS).loss.backward()
    assert model.model.norm.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tied", "a head", "Q4_0", "dense, tied"])
def test_the_step_program_takes_it(files, name: str, dtype: torch.dtype):
    """Embeddings in codes are read once for each of their tensors, and rounded to the model's dtype."""
    model = bigkernels.load_gguf(files[name], dtype)
    with torch.inference_mode():
        expected = model(IDS).logits
        bigkernels.patch(model)
        found = model(IDS, use_cache=True).logits
    steps = model.__dict__[KEY]
    assert steps.taken == 1, steps.reason
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


def test_a_file_may_go_away(files, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(files["tied"].read_bytes())
    model = bigkernels.load_gguf(path)
    expected = model(IDS).logits
    path.write_bytes(b"x")
    path.unlink()
    assert torch.equal(model(IDS).logits, expected)


def renamed(contents, before: str, after: str):
    return {after if name == before else name: value for name, value in contents.items()}


def shaped(contents, name: str, shape: tuple[int, ...]):
    return {**contents, name: (np.zeros(shape, np.float32), contents[name][1])}


@pytest.mark.parametrize(
    "contents, message",
    [
        (lambda: renamed(tensors(), "blk.1.ffn_up.weight", "blk.1.ffn_sideways.weight"), "blk.1.ffn_sideways.weight"),
        (lambda: {k: v for k, v in tensors().items() if k != "blk.1.ffn_up.weight"}, "layers.1.mlp.up_proj.weight"),
        (lambda: {k: v for k, v in tensors().items() if k != "output_norm.weight"}, "model.norm.weight"),
        (lambda: shaped(tensors(), "blk.0.attn_q.weight", (32, 64)), "blk.0.attn_q.weight .*32, 64"),
        (lambda: shaped(tensors(), "output_norm.weight", (32,)), "output_norm.weight .*32"),
        (lambda: {**tensors(), "rope_freqs.weight": (np.ones(8, np.float32), "F32")}, "rope_freqs.weight"),
        (lambda: {**tensors(), "blk.0.ffn_up.weight": (np.zeros((2, 96, 64), np.float32), "Q8_0")}, "ffn_up.* 3 dim"),
    ],
)
def test_tensors_that_do_not_fit_are_named(contents, message: str, tmp_path):
    with pytest.raises(ValueError, match=message):
        bigkernels.load_gguf(write(tmp_path / "wrong.gguf", contents()))


def test_files_that_end_too_early_are_refused(files, tmp_path):
    whole, path = files["tied"].read_bytes(), tmp_path / "short.gguf"
    for part in (0, 3, 4, 8, 20, 30, 100, 400, 2000):
        path.write_bytes(whole[:part])
        with pytest.raises(ValueError, match="no GGUF file" if part < 4 else "ends in its header|damaged"):
            bigkernels.load_gguf(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="ends before tensor blk.1.ffn_down.weight"):
        bigkernels.load_gguf(path)
    with pytest.raises(FileNotFoundError):
        bigkernels.load_gguf(tmp_path / "none.gguf")


def test_damaged_headers_are_refused(files, tmp_path):
    """Any byte of the header may be anything: ValueError, or a model."""
    whole, path = bytearray(files["tied"].read_bytes()), tmp_path / "damaged.gguf"
    for at, value in (
        (4, 1),
        (4, 0xFF),
        (8, 0xFF),
        (15, 0xFF),
        (16, 0xFF),
        (23, 0x80),
        (24, 0xFF),
        (31, 0x7F),
        (60, 99),
    ):
        changed = bytearray(whole)
        changed[at] = value
        path.write_bytes(changed)
        with pytest.raises(ValueError):
            bigkernels.load_gguf(path)


def test_models_that_would_be_wrong_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rotary"):
        bigkernels.load_gguf(write(tmp_path / "yarn.gguf", tensors(), **{"rope.scaling.type": "yarn"}))
    with pytest.raises(ValueError, match="nothing_known"):
        bigkernels.load_gguf(write(tmp_path / "other.gguf", tensors(), "nothing_known"))


def test_what_is_missing_is_named(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"bigkernels\[gguf\]"):
        bigkernels.load_gguf(files["tied"])
