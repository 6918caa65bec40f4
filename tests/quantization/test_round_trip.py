"""What `quantize` chooses, and that `dequantize` gives back what was there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels.nn import LoRALinear, QuantizedEmbedding, QuantizedLinear
from bigkernels.quantization import Int4, prepare_qat

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALL = {"embeddings": True, "skip": ()}


class Small(nn.Module):
    """A table, a layer and a head, as few models would have them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 32, padding_idx=3, sparse=True, scale_grad_by_freq=False)
        self.layer = nn.Linear(32, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.layer.mark = "kept"

    def forward(self, ids):
        return self.head(self.layer(self.table(ids)))


def described(model: nn.Module) -> list:
    """Modules with their options, and parameters with what `dequantize` must give back."""
    modules = [
        (path, type(m), str(m) if not m._modules else "") for path, m in model.named_modules(remove_duplicate=False)
    ]
    return modules + [
        (path, p.shape, p.dtype, p.requires_grad, type(p)) for path, p in model.named_parameters(remove_duplicate=False)
    ]


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8"])
def test_everything_comes_back(name: str):
    model = Small()
    before = described(model)
    assert len(bigkernels.quantize(model, name, **ALL).quantized) == 3
    bigkernels.dequantize(model)
    assert described(model) == before and model.layer.mark == "kept"
    model(torch.tensor([[3, 1, 3]])).sum().backward()
    assert model.table.weight.grad.is_sparse and not model.table.weight.grad.to_dense()[3].any()


@pytest.mark.parametrize("then", DTYPES, ids=str)
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, ALL], ids=["linear", "embeddings"])
def test_after_a_cast(first: torch.dtype, then: torch.dtype, options: dict):
    model, ids = Small().to(first), torch.arange(12)
    bigkernels.quantize(model, "int8", **options)
    model.to(then)
    found = model(ids)
    bigkernels.dequantize(model)
    assert found.dtype == then and {p.dtype for p in model.parameters()} == {then}
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(then, 1e-5)
    torch.testing.assert_close(model(ids), found, rtol=tolerance, atol=tolerance)
    adapted = Small().to(first)
    bigkernels.quantize(adapted, "int8")
    LoRALinear.add_to(adapted.to(then), "layer")
    assert adapted.layer.lora_a.dtype == then


def test_experts_follow_casts():
    model = nn.Module()
    model.num_experts, model.w = 3, nn.Parameter(torch.randn(3, 32, 64), requires_grad=False)
    model = nn.ModuleDict({"experts": model})
    bigkernels.quantize(model, "int8")
    model.bfloat16()
    x = torch.randn(5, 64).bfloat16()
    assert model["experts"].w.dtype == model["experts"].w[0].dtype == (x @ model["experts"].w[0].T).dtype == x.dtype
    bigkernels.dequantize(model)
    assert model["experts"].w.dtype == x.dtype and not model["experts"].w.requires_grad


@pytest.mark.parametrize("when", ["before", "since", "the layer since", "never", "beside"])
def test_frozen_weights_stay_frozen(when: str):
    model = Small()
    if when == "before":
        model.requires_grad_(False)
    if when == "beside":  # what is left after quantizing was frozen from the start
        model.layer = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32, bias=False)).requires_grad_(False)
    before = {path: p.requires_grad for path, p in model.named_parameters()}
    bigkernels.quantize(model, "int8", **ALL)
    if when == "since":
        model.requires_grad_(False)
    if when == "the layer since":
        model.head.requires_grad_(False)
    bigkernels.dequantize(model)
    expected = {path: False for path in before} if when == "since" else before
    if when == "the layer since":
        expected["head.weight"] = False
    assert {path: p.requires_grad for path, p in model.named_parameters()} == expected


def twice(module, args, out):
    return out * 2


@pytest.mark.parametrize("change", ["quantize", "prepare_qat", "both", "round trip"])
def test_hooks_stay(change: str):
    model, ids = Small(), torch.arange(5)
    seen = []
    handles = [
        model.layer.register_forward_hook(twice),
        model.head.register_full_backward_hook(lambda *_: seen.append(1)),
    ]
    handles.append(model.table.register_forward_pre_hook(lambda module, args, kwargs: seen.append(2), with_kwargs=True))
    expected = model(ids)
    if change in ("prepare_qat", "both"):
        prepare_qat(model, "int8", **ALL)
    if change != "prepare_qat":
        bigkernels.quantize(model, "int8", **ALL)
    if change == "round trip":
        bigkernels.dequantize(model)
    seen.clear()
    found = model(ids)
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    assert seen == [2, 1]
    for handle in handles:
        handle.remove()
    assert not torch.allclose(model(ids), found) and len(seen) == 2


# ---- one layer in several places ------------------------------------------------------------------------------------


class Towers(nn.Module):
    """A layer under two names, inside a block that has two names itself."""

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "k_proj": nn.Linear(64, 64)})
        block["again_proj"] = block["q_proj"]
        self.left = self.right = block
        self.own_proj = nn.Linear(64, 64)

    def forward(self, x):
        for layer in (self.left["q_proj"], self.right["again_proj"], self.right["k_proj"], self.own_proj):
            x = layer(x)
        return x


def test_a_layer_under_several_names_stays_one():
    model, x = Towers(), torch.randn(4, 64)
    expected, before = model(x), described(model)
    report = bigkernels.quantize(model, "int8")
    assert [row.path for row in report.quantized] == ["left.q_proj", "left.k_proj", "own_proj"] and not report.skipped
    assert report.quantized[0].what == "int8, also left.again_proj, also right.q_proj, also right.again_proj"
    assert model.left is model.right and model.left["q_proj"] is model.left["again_proj"]
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 3
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
    bigkernels.dequantize(model)
    assert described(model) == before and model.left["q_proj"] is model.right["again_proj"]
    assert prepare_qat(model, "int8") == ["left.q_proj", "left.k_proj", "own_proj"]
    assert model.left["q_proj"] is model.right["again_proj"]
    adapted = Towers()
    assert LoRALinear.add_to(adapted, rank=2) == ["left.q_proj", "left.k_proj", "own_proj"]
    assert adapted.left["q_proj"] is adapted.right["again_proj"]
    skipped = bigkernels.quantize(Towers(), "int8", skip="again_proj")
    assert {row.path: row.what for row in skipped.skipped} == {"left.q_proj": "left out by skip"}
    mixed = bigkernels.quantize(Towers(), {"*again*": "nf4", "*": "int8"})
    assert "different formats" in mixed.skipped[0].what


def test_a_block_that_is_used_again():
    block = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model, x = nn.Sequential(*[block] * 4), torch.randn(4, 64)
    expected = model(x)
    assert len(bigkernels.quantize(model, "int8").quantized) == 2 and model[0] is model[3]
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.02)


# ---- Conv1D ---------------------------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_conv1d(name: str):
    model, ids = gpt2(), torch.arange(3, 15)[None]
    expected, before = model(ids).logits, described(model)
    report = bigkernels.quantize(model, name)
    assert len(report.quantized) == 8 and isinstance(model.transformer.h[0].attn.c_attn, QuantizedLinear)
    assert model.transformer.h[0].attn.c_attn.weight.shape == (32, 96)
    found = model(ids).logits
    assert (found - expected).norm() < 0.2 * expected.norm()
    plain = copy.deepcopy(model)
    bigkernels.dequantize(plain)
    assert described(plain) == before
    torch.testing.assert_close(plain(ids).logits, found, rtol=1e-4, atol=1e-5)
    names = LoRALinear.add_to(model, ("*c_attn", "*c_proj"), rank=2)
    assert len(names) == 6
    torch.testing.assert_close(model(ids).logits, found)


def test_conv1d_adapted_and_trained():
    model, ids = gpt2(), torch.arange(3, 15)[None]
    expected = model(ids).logits
    LoRALinear.add_to(model, "*c_attn", rank=2)
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        nn.init.normal_(layer.lora_b, std=0.1)
    adapted = model(ids).logits
    assert (adapted - expected).norm() > 1e-3
    for layer in layers:
        layer.merge()
        assert type(layer.base).__name__ == "Conv1D"
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    other = gpt2()
    names = prepare_qat(other, "int8")
    assert len(names) == 8 and list(other.state_dict()) == list(gpt2().state_dict())
    found = other(ids).logits
    other(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in other.parameters())
    bigkernels.quantize(other, "int8")
    torch.testing.assert_close(other(ids).logits, found, rtol=1e-4, atol=1e-5)
    bigkernels.dequantize(other)
    assert described(other) == described(gpt2())


def test_conv1d_is_calibrated():
    model, ids = gpt2(), torch.arange(3, 15)[None]
    report = bigkernels.quantize(model, Int4(32, "gptq"), calibration=[ids])
    assert len(report.quantized) == 8
    plain = copy.deepcopy(model)
    bigkernels.dequantize(plain)
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


# ---- what quantization-aware training prepares ----------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer, self.output = nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 40, bias=False)
        self.output.weight = self.table.weight
        self.attention = nn.MultiheadAttention(64, 4)

    def forward(self, ids):
        return self.output(self.layer(self.table(ids)))


@pytest.mark.parametrize("options", [{}, {"skip": "layer"}, ALL, {**ALL, "filter": lambda name, m: name != "table"}])
def test_qat_prepares_what_is_quantized(options: dict):
    model, ids = Tied(), torch.arange(12)[None]
    shared = model.table.weight
    names = prepare_qat(model, "int8", **options)
    assert model.table.weight is shared is model.output.weight
    trained = model(ids)
    trained.sum().backward()
    report = bigkernels.quantize(model, "int8", **options)
    assert sorted(row.path for row in report.quantized) == sorted(names)
    torch.testing.assert_close(model(ids), trained, rtol=1e-4, atol=1e-4)
    bigkernels.dequantize(model)
    assert model.table.weight is model.output.weight and type(model.layer) is nn.Linear


# ---- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8"])
@pytest.mark.parametrize("ids", [[1, -1], [-10], [3, 10], [-11], [-100]])
def test_ids_out_of_range_raise(name: str, ids: list[int]):
    table = QuantizedEmbedding.from_embedding(nn.Embedding(10, 32), name)
    for dtype in (torch.int64, torch.int32):
        with pytest.raises(IndexError):
            table(torch.tensor(ids, dtype=dtype))
    assert table(torch.tensor([9, 0], dtype=torch.int32)).shape == (2, 32)
    with pytest.raises(ValueError, match="max_norm"):
        QuantizedEmbedding.from_embedding(nn.Embedding(10, 32, max_norm=1.0), name)
