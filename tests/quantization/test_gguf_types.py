"""Every block type of GGUF files: decoded as the `gguf` package does, in models, and written back."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import bigkernels
from bigkernels.functional import quantize_weight, quantized_linear
from bigkernels.nn import LoRALinear, QuantizedEmbedding, QuantizedLinear
from bigkernels.program._state import KEY
from bigkernels.quantization import GGUFBlocks, QuantizedWeight
from bigkernels.quantization.ggml import BLOCK_TYPES

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf_files import CODED, blocks, llama  # noqa: E402 - it needs gguf

IDS = torch.arange(12).view(2, 6) * 5 % 64


def weight(kind: str, n: int = 24, k: int = 512) -> QuantizedWeight:
    raw = torch.from_numpy(blocks(kind, (n, k)))
    return QuantizedWeight(GGUFBlocks(kind), (n, k), torch.float32, {"blocks": raw})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where scales are no numbers
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_decoded_as_the_package_does(kind: str):
    row = BLOCK_TYPES[kind]
    number = gguf.GGMLQuantizationType[kind]
    assert (int(number), gguf.GGML_QUANT_SIZES[number]) == (row.number, (row.block, row.nbytes))
    raw = np.random.default_rng(0).integers(0, 256, (2048, row.nbytes), dtype=np.uint8)  # scales of all sizes, and NaN
    expected = gguf.quants.dequantize(raw.reshape(16, -1), number).reshape(2048, -1)
    found = row.decode(torch.from_numpy(raw)).numpy()
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    assert found.shape == expected.shape and same.all()
    if kind in CODED:
        q = weight(kind)
        values = gguf.quants.dequantize(q.tensors["blocks"].numpy(), number)
        assert torch.equal(q.dequantize(), torch.from_numpy(values)) and values.any()
        assert torch.equal(q.dequantize(torch.float64).float(), q.dequantize())


@pytest.mark.parametrize("kind", CODED)
def test_products_and_gradients(kind: str):
    q = weight(kind)
    dense = q.dequantize(torch.float64)
    for tokens, dtype in ((1, torch.float32), (40, torch.float32), (3, torch.bfloat16)):
        x = torch.randn(tokens, 512).to(dtype).requires_grad_()
        found, up = quantized_linear(x, q), torch.randn(tokens, 24).to(dtype)
        (grad,) = torch.autograd.grad(found, x, up)
        scale = (x.detach().double().abs() @ dense.abs().T).max()
        tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
        assert (found.double() - F.linear(x.double(), dense)).abs().max() < tolerance * scale
        assert (grad.double() - up.double() @ dense).abs().max() < tolerance * (up.double().abs() @ dense.abs()).max()


@pytest.mark.parametrize("kind", CODED)
def test_a_model_of_each_type(kind: str, tmp_path):
    path = llama(tmp_path / "model.gguf", kind, table=kind)
    model = bigkernels.load_gguf(path)
    layer, table = model.model.layers[0].mlp.down_proj, model.model.embed_tokens
    assert type(layer) is QuantizedLinear and type(table) is QuantizedEmbedding and model.lm_head.shares(table)
    row = BLOCK_TYPES[kind]
    assert layer.weight_format.name == (row.ours or "gguf") and (row.ours or layer.weight_format == GGUFBlocks(kind))
    dense = copy.deepcopy(model)
    bigkernels.dequantize(dense)
    with torch.no_grad():
        expected = dense(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    values = gguf.quants.dequantize(blocks(kind, (256, 512), 6), gguf.GGMLQuantizationType[kind])
    assert torch.equal(dense.model.layers[0].mlp.down_proj.weight, torch.from_numpy(values))
    bigkernels.save_gguf(model, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    other = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [name for name in CODED if BLOCK_TYPES[name].kernels >= 0])
def test_the_step_program_takes_each_type(kind: str, dtype: torch.dtype, tmp_path):
    """From panels, an embedding in blocks read by the native call of a step; the file's bytes changed in between."""
    model = bigkernels.load_gguf(llama(tmp_path / "model.gguf", kind, table=kind), dtype)
    plain = copy.deepcopy(model)
    bigkernels.patch(model)
    for _ in range(2):
        with torch.no_grad():
            expected, cache, found = plain(IDS).logits, None, []
            for ids in (IDS[:, :3], IDS[:, 3:4], IDS[:, 4:5], IDS[:, 5:]):
                out = model(ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits)
        steps = model.__dict__[KEY]
        assert steps.taken >= 4, steps.reason
        error = (torch.cat(found, 1) - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 0.06), (kind, error)
        for each in (model, plain):
            each.model.layers[0].mlp.down_proj.qweight.tensors["blocks"][5].zero_()


def test_weights_stay_in_the_file(tmp_path):
    path = llama(tmp_path / "model.gguf", "Q6_K", head=True)
    mapped, read = bigkernels.load_gguf(path), bigkernels.load_gguf(path, mmap=False)
    with torch.no_grad():
        expected = read(IDS).logits
        assert torch.equal(mapped(IDS).logits, expected)
    with open(path, "r+b") as stream:  # in place: the file is as long as before
        stream.seek(-3000, 2)
        stream.write(bytes(1000))
    with torch.no_grad():
        assert torch.equal(read(IDS).logits, expected) and not torch.equal(mapped(IDS).logits, expected)


def test_adapters_train(tmp_path):
    model = bigkernels.load_gguf(llama(tmp_path / "model.gguf", "Q4_K"))
    layer = LoRALinear(model.model.layers[0].mlp.up_proj, rank=4)
    model.model.layers[0].mlp.up_proj = layer
    model(IDS, labels=IDS).loss.backward()
    assert layer.lora_b.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"up_proj has an adapter"):
        bigkernels.save_gguf(model, tmp_path / "adapted.gguf")
    assert not (tmp_path / "adapted.gguf").exists()


def test_what_was_changed_is_written(tmp_path):
    model = bigkernels.load_gguf(llama(tmp_path / "model.gguf", "Q5_K"))
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
        model.model.layers[0].mlp.down_proj.qweight.tensors["blocks"][3].zero_()
        expected = model(IDS).logits
    bigkernels.save_gguf(model, tmp_path / "changed.gguf")
    changed = bigkernels.load_gguf(tmp_path / "changed.gguf")
    with torch.no_grad():
        assert torch.equal(changed(IDS).logits, expected)
    bigkernels.dequantize(model)
    bigkernels.save_gguf(model, tmp_path / "dense.gguf")
    dense = bigkernels.load_gguf(tmp_path / "dense.gguf")
    for name, t in model.state_dict().items():
        assert torch.equal(dense.state_dict()[name], t), name
    bigkernels.quantize(model, "int8")
    with pytest.raises(ValueError, match="q_proj is int8, which blk.0.attn_q.weight .Q5_K. cannot hold"):
        bigkernels.save_gguf(model, tmp_path / "int8.gguf")
    with pytest.raises(ValueError, match="came from no GGUF file"):
        bigkernels.save_gguf(torch.nn.Linear(2, 2), tmp_path / "no.gguf")


def test_scales_that_are_not_finite_are_named(tmp_path):
    path = llama(tmp_path / "model.gguf", "Q4_K")
    whole, at = bytearray(path.read_bytes()), path.read_bytes().rindex(blocks("Q4_K", (256, 512), 6).tobytes())
    whole[at + 144 * 7 + 2 : at + 144 * 7 + 4] = np.float16("inf").tobytes()
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_down\.weight holds a scale that is not finite"):
        bigkernels.load_gguf(path)


def test_what_blocks_are_not():
    with pytest.raises(ValueError, match="'Q9_K'"):
        GGUFBlocks("Q9_K")
    with pytest.raises(ValueError, match="read from files"):
        quantize_weight(torch.randn(2, 256), "gguf")
    with pytest.raises(ValueError, match="blocks of 256"):
        quantize_weight(torch.empty(2, 100, device="meta"), GGUFBlocks("Q6_K"))
