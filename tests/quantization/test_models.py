"""Modules and whole models: what is replaced, saved, moved and trained through."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels.functional import quantize_weight
from bigkernels.nn import QuantizedLinear
from bigkernels.quantization import NF4, Int4

NAMES = ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "q4_1", "q8_0", "mxfp4")
ALLOWED = {
    "mxfp4": 0.25,
    "int8": 0.02,
    "int8-dynamic": 0.03,
    "int4": 0.2,
    "nf4": 0.2,
    "fp4": 0.25,
    "fp8": 0.06,
    "q4_1": 0.2,
    "q8_0": 0.02,
}


def layer(config="int4", n=40, k=96, bias=True) -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(k, n, bias=bias), config)


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(3, 27).view(2, 12)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_its_dequantized_one(name: str):
    linear = nn.Linear(96, 40)
    made = QuantizedLinear.from_linear(linear, name)
    x = torch.randn(3, 20, 96)
    plain = made.dequantize()
    assert type(plain) is nn.Linear and plain.bias is linear.bias
    torch.testing.assert_close(made(x), plain(x), rtol=0, atol=2e-2 if name == "int8-dynamic" else 2e-5)
    assert (made(x) - linear(x)).norm() <= ALLOWED[name] * linear(x).norm()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_input_and_bias_alone(name: str):
    made = layer(name)
    x = torch.randn(30, 96, requires_grad=True)
    grad = torch.randn(30, 40)
    made(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ made.qweight.dequantize(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.bias.grad, grad.sum(0))
    assert [n for n, _ in made.named_parameters()] == ["bias"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_copied_and_moved(name: str, tmp_path):
    from safetensors.torch import load_file, save_file

    made, x = layer(name), torch.randn(5, 96)
    out = made(x)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.to("cpu")):
        assert torch.equal(copied(x), out)
    other = layer(name)
    save_file(made.state_dict(), tmp_path / "layer.safetensors")
    for state in (made.state_dict(), load_file(tmp_path / "layer.safetensors")):
        other = layer(name)
        other(x)  # what was derived from the old tensors must go
        other.load_state_dict(state)
        assert torch.equal(other(x), out)
    other = layer(name)
    other.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(other(x), out)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    assert made.load_state_dict(torch.load(file)) is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float64)])
def test_casts_leave_the_weight_alone(name: str, cast):
    made = layer(name)
    before = {n: t.clone() for n, t in made.named_buffers()}
    cast(made)
    for n, t in made.named_buffers():
        assert t.dtype == before[n].dtype and torch.equal(t.view(torch.uint8), before[n].view(torch.uint8))
    assert made.bias.dtype in (torch.bfloat16, torch.float16, torch.float64)
    x = torch.randn(4, 96, dtype=made.bias.dtype)
    assert made(x).dtype == x.dtype


def test_wrong_states_leave_a_layer_as_it_was():
    made, x = layer("int4"), torch.randn(2, 96)
    out = made(x)
    good = made.state_dict()
    wrong = [
        layer("nf4").state_dict(),
        layer(Int4(64)).state_dict(),
        layer("int4", k=64).state_dict(),
        good | {"codes": good["codes"][:-1]},
        good | {"scale": good["scale"].float()},
        {n: t for n, t in good.items() if n != "zero"},
    ]
    for state in wrong:
        with pytest.raises(RuntimeError, match="QuantizedLinear|Missing key"):
            made.load_state_dict(state)
    assert torch.equal(made(x), out)


@pytest.mark.parametrize("name", NAMES)
def test_a_model(name: str):
    model = llama()
    exact = model(IDS).logits
    report = bigkernels.quantize(model, name)
    assert len(report.quantized) == 14 and [row.path for row in report.skipped] == ["model.embed_tokens", "lm_head"]
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14
    assert all(row.after < row.before and row.error < 0.15 for row in report.quantized)
    assert "14" in str(report) and "left out by skip" in str(report)
    found = model(IDS).logits
    assert (found - exact).norm() <= 3 * ALLOWED[name] * exact.norm()
    assert model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (2, 16)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    bigkernels.dequantize(model)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    if name != "int8-dynamic":
        torch.testing.assert_close(model(IDS).logits, found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("first", ["patch", "quantize"])
def test_with_a_patched_model(first: str):
    model = llama()
    alone = copy.deepcopy(model)
    bigkernels.quantize(alone, "int8")
    if first == "patch":
        bigkernels.patch(model)
    bigkernels.quantize(model, "int8")
    if first == "quantize":
        bigkernels.patch(model)
    torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, rtol=1e-3, atol=1e-4)


def test_patterns_and_filters():
    model = llama()
    report = bigkernels.quantize(
        model, {"*.mlp.*": "nf4", "*.layers.1.*": None, "*": Int4(32)}, filter=lambda name, m: "o_proj" not in name
    )
    formats = {row.path: row.what for row in report.quantized}
    assert formats["model.layers.1.mlp.up_proj"] == "nf4" and formats["model.layers.0.self_attn.q_proj"] == "int4"
    assert "model.layers.1.self_attn.q_proj" not in formats and len(formats) == 6 + 3
    reasons = {row.path: row.what for row in report.skipped}
    assert reasons["model.layers.0.self_attn.o_proj"] == "left out by filter"
    assert reasons["model.layers.1.self_attn.k_proj"] == "no pattern names a format for it"


def test_what_is_left_alone_and_why():
    class Special(nn.Linear):
        pass

    class Table(nn.Embedding):
        pass

    class Foreign(nn.Module):  # as other libraries hold 4-bit weights
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 8
            self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))

    model = nn.ModuleDict({
        "plain": nn.Linear(8, 8), "special": Special(8, 8), "tied": nn.Linear(8, 8), "embedding": nn.Embedding(8, 8),
        "state": nn.Linear(8, 8), "conv": nn.Conv1d(4, 5, 3), "image": nn.Conv2d(4, 5, 3), "done": layer("nf4"),
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "attention": nn.MultiheadAttention(8, 2),
        "spectral": nn.utils.spectral_norm(nn.Linear(8, 8)), "own": Table(8, 8), "kept": Foreign(),
        "replaced": nn.Linear(8, 8), "floats": nn.Linear(8, 8), "named": nn.Linear(8, 8),
        "lstm": nn.LSTM(8, 8),
    })  # fmt: skip
    model["tied"].weight = model["embedding"].weight
    model["state"]._register_state_dict_hook(lambda m, state, *_: state)
    model["replaced"].forward = model["plain"].forward
    model["floats"].weight = nn.Parameter(torch.randn(8, 8).to(torch.float8_e4m3fn), requires_grad=False)
    report = bigkernels.quantize(model, "int8", skip="named")
    assert [row.path for row in report.quantized] == ["plain"]
    reasons = {row.path: row.what for row in report.skipped}
    assert reasons == {
        "special": "a Special, not a torch.nn.Linear",
        "own": "a Table, not a torch.nn.Embedding",
        "tied": "its weight is shared with another module (embedding)",
        "state": "it has hooks on its state dict",
        "normed": "a ParametrizedLinear, not a torch.nn.Linear",
        "spectral": "its weight is computed, no parameter",
        "conv.weight": "a 3-D weight of a Conv1d",
        "image.weight": "a 4-D weight of a Conv2d",
        "embedding": "an embedding (embeddings=True quantizes it)",
        "done": "already quantized (nf4)",
        "attention.in_proj_weight": "a 2-D weight of a MultiheadAttention",
        "attention.out_proj": "its MultiheadAttention reads its weight and never calls it",
        "kept": "a Foreign, not a torch.nn.Linear",
        "lstm.weight_ih_l0": "a 2-D weight of a LSTM",
        "lstm.weight_hh_l0": "a 2-D weight of a LSTM",
        "replaced": "its forward was replaced",
        "floats": "its weight is torch.float8_e4m3fn",
        "named": "left out by skip",
    }


def test_all_or_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        bigkernels.quantize(model, "int8")
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    with pytest.raises(ValueError, match="accepted are"):
        bigkernels.quantize(model, "int5")
    with pytest.raises(ValueError, match="from_linear"):
        bigkernels.quantize(nn.Linear(4, 4), "int8")


@pytest.mark.parametrize("name", ["int4", "nf4", "int8-dynamic"])
def test_compiled(name: str):
    torch._dynamo.reset()
    model = nn.Sequential(layer(name, 64, 96), nn.SiLU(), layer(name, 40, 64))
    compiled = torch.compile(model, fullgraph=True)
    for tokens in (3, 20):
        x = torch.randn(tokens, 96, requires_grad=True)
        out = compiled(x)
        torch.testing.assert_close(out, model(x))
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(model(x).sum(), x)[0], rtol=1e-4, atol=1e-5
        )


def test_autocast():
    made, x = layer(), torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        found = made(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, made(x.bfloat16()))


def test_backward_holds_no_dequantized_weight():
    """The largest tensor that a step makes is far smaller than the weight would be."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, torch.Tensor):
                    self.bytes = max(self.bytes, t.nbytes)
            return out

    made = QuantizedLinear(quantize_weight(torch.randn(1024, 1024), NF4()))
    x = torch.randn(32, 1024, requires_grad=True)
    with Largest() as seen:
        made(x).sum().backward()
    assert seen.bytes <= 1024 * 1024 // 2  # its codes, which are looked at


@pytest.mark.parametrize(
    "x, error, message",
    [
        (lambda: torch.randn(2, 95), ValueError, r"\(\.\.\., 96\)"),
        (lambda: torch.ones(2, 96).int(), TypeError, "x"),
        (lambda: torch.tensor(1.0), ValueError, "x"),
    ],
)
def test_wrong_inputs(x, error, message):
    with pytest.raises(error, match=message):
        layer()(x())
    with pytest.raises(ValueError, match="bias"):
        bigkernels.functional.quantized_linear(torch.randn(2, 96), layer().qweight, torch.randn(3))
    with pytest.raises(TypeError, match="QuantizedWeight"):
        bigkernels.functional.quantized_linear(torch.randn(2, 96), torch.randn(40, 96))
