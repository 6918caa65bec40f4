"""`layer.weight` of layers that hold no such tensor: known without values, read as a tensor, not written in silence."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bigkernels
from bigkernels.nn import LoRALinear, QuantizedEmbedding, QuantizedLinear

FORMATS = ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "q4_1", "q8_0")


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(40, 96)


def lora(base: nn.Module) -> LoRALinear:
    made = LoRALinear(base, rank=3)
    nn.init.normal_(made.lora_b)
    return made


def quantized(name: str = "int8") -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(96, 40), name)


LAYERS = {
    **{name: lambda name=name: quantized(name) for name in FORMATS},
    "embedding": lambda: QuantizedEmbedding.from_embedding(nn.Embedding(40, 96), "nf4"),
    "conv1d": lambda: QuantizedLinear.from_linear(conv1d(), "int8"),
    "lora": lambda: lora(nn.Linear(96, 40)),
    "lora, quantized": lambda: lora(quantized()),
    "lora, conv1d": lambda: lora(conv1d()),
    "lora, quantized conv1d": lambda: lora(QuantizedLinear.from_linear(conv1d(), "int8")),
}


def values(layer: nn.Module) -> Tensor:
    """What its weight must be, in its shape."""
    if not isinstance(layer, LoRALinear):
        return layer.dequantize().weight.detach()
    base = layer.base.dequantize() if isinstance(layer.base, QuantizedLinear) else layer.base
    delta = layer.delta()
    return (base.weight + (delta if base.weight.shape == delta.shape else delta.T)).detach()


class Operators(TorchDispatchMode):
    """Counts what is computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace != "prim"  # which asks for sizes and the like
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_known_without_values(kind: str):
    layer = LAYERS[kind]()
    expected = values(layer)
    with Operators() as operators:
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device) == (expected.shape, torch.float32, torch.device("cpu"))
        assert weight.size(-1) == expected.shape[1] and weight.dim() == 2 and weight.numel() == 40 * 96
        # That of a transposed layer is none: PEFT transposes it, and a parameter would have to stay one.
        assert isinstance(weight, nn.Parameter) == (kind != "conv1d")
        assert weight.requires_grad == kind.startswith("lora")
    assert operators.count == 0
    torch.testing.assert_close(layer.weight.clone(), expected, rtol=1e-6, atol=1e-7)
    assert not any(n.endswith("weight") for n in layer.state_dict() if "base" not in n)
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        layer.to(dtype)
        assert layer.weight.dtype == layer.weight.clone().dtype == dtype
        torch.testing.assert_close(layer.weight.float(), values(layer).float(), rtol=1e-2, atol=1e-2)
    assert layer.to("meta").weight.is_meta


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_of_the_layer(kind: str):
    layer = LAYERS[kind]()
    expected = layer.weight.clone()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other.weight, expected)
    if kind.startswith("lora"):
        return  # the weight is computed from leaves, and no leaf
    for of_weight in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))):
        assert torch.equal(of_weight, expected)


WRITES = {
    "fill_": lambda w: w.fill_(1), "data.copy_": lambda w: w.data.copy_(torch.ones(w.shape)),
    "element": lambda w: w.__setitem__((0, 0), 1.0), "data element": lambda w: w.data.__setitem__(0, 1.0),
    "row": lambda w: w[0].zero_(), "column of data": lambda w: w.data[:, 1].zero_(),
    "transposed": lambda w: w.t().mul_(2),
    "detached": lambda w: w.detach().add_(1), "view": lambda w: w.view(-1)[3:5].zero_(), "init": nn.init.normal_,
    "cast that casts nothing": lambda w: w.float().add_(1), "of a list": lambda w: torch._foreach_add_([w], 1.0),
    "data replaced": lambda w: setattr(w, "data", torch.ones(w.shape)), "split": lambda w: w.split(8)[0].add_(1),
    "numpy": lambda w: w.detach().numpy().__setitem__((0, 0), 1.0), "rows": lambda w: [r.zero_() for r in w],
    "address": lambda w: w.data_ptr(), "storage": lambda w: w.untyped_storage(), "resize": lambda w: w.resize_(3),
    "memory of another": lambda w: w.set_(torch.ones(w.shape)),
    "trained": lambda w: w.requires_grad_(), "gradient": lambda w: setattr(w, "grad", torch.ones(w.shape)),
    "index": lambda w: w.data.index_fill_(0, torch.tensor([1]), 0.0), "imul": lambda w: w.__imul__(2),
    "out": lambda w: torch.add(torch.ones(w.shape), 1, out=w),
    "numpy of a row": lambda w: w[0].detach().numpy().fill(0),
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["int8", "conv1d", "lora"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_raise(kind: str, write, mode):
    layer = LAYERS[kind]()
    expected = values(layer)
    with mode(), pytest.raises((RuntimeError, ValueError, TypeError)):
        write(layer.weight)
    torch.testing.assert_close(layer.weight.clone(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [lambda: torch.ones(40, 96), lambda: nn.Parameter(torch.ones(40, 96))])
@pytest.mark.parametrize("kind", ["int8", "embedding"])
def test_it_cannot_be_set(kind: str, value):
    layer = LAYERS[kind]()
    with pytest.raises(TypeError, match="held in codes and cannot be set"):
        layer.weight = value()
    assert list(layer.state_dict()) == list(LAYERS[kind]().state_dict())


READS = {
    "linear": lambda w, x: F.linear(x, w),
    "matmul": lambda w, x: x @ w.t(),
    "row": lambda w, x: w[3] + 0,
    "norm": lambda w, x: w.norm(),
    "cat": lambda w, x: torch.cat([w, w]),
    "stack": lambda w, x: torch.stack(list(w)),
    "embedding": lambda w, x: F.embedding(torch.tensor([3, 0]), w),
    "copied": lambda w, x: torch.zeros(w.shape).copy_(w),
    "assigned": lambda w, x: torch.zeros(50, 96).index_copy_(0, torch.arange(40), w.data),
    "numpy": lambda w, x: torch.tensor(np.asarray(w.detach())),
    "vmap": lambda w, x: torch.vmap(lambda t: F.linear(t, w))(x[None]),
    "svd": lambda w, x: torch.linalg.svdvals(w.float()),
    "where": lambda w, x: torch.where(w > 0, w, 0.0),
    "autocast": lambda w, x: autocast(w, x),
}


def autocast(w: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, w)


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "nf4", "embedding", "lora", "lora, quantized"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_are_those_of_a_tensor(kind: str, read):
    layer, x = LAYERS[kind](), torch.randn(5, 96)
    found, expected = read(layer.weight, x), read(values(layer), x)
    tolerance = 2e-2 if expected.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.detach().clone(), expected, rtol=tolerance, atol=tolerance)


def test_a_linear_product_dequantizes_nothing(monkeypatch):
    layer, x = quantized("nf4"), torch.randn(5, 96, requires_grad=True)
    expected = F.linear(x, layer.dequantize().weight, layer.bias)

    def refuse(*_):
        raise AssertionError("dequantized")

    monkeypatch.setattr(bigkernels.quantization.QuantizedWeight, "dequantize", refuse)
    found = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [k for k in LAYERS if k.startswith("lora")])
def test_gradients_of_an_adapter_go_through_it(kind: str):
    layer, x = LAYERS[kind](), torch.randn(5, 96)
    by_forward = torch.autograd.grad((layer(x) - layer.bias).square().sum(), (layer.lora_a, layer.lora_b))
    weight = layer.weight
    out = F.linear(x, weight.T if "conv1d" in kind else weight)
    by_weight = torch.autograd.grad(out.square().sum(), (layer.lora_a, layer.lora_b))
    for ours, theirs in zip(by_weight, by_forward, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_an_adapter_on_what_attention_reads():
    """`nn.MultiheadAttention` never calls `out_proj`: an adapter by hand is trained, `add_to` leaves it alone."""
    attention, x = nn.MultiheadAttention(96, 4, batch_first=True), torch.randn(2, 7, 96)
    expected = attention(x, x, x)[0]
    attention.out_proj = LoRALinear(attention.out_proj, rank=3)
    for need_weights in (True, False):
        torch.testing.assert_close(attention(x, x, x, need_weights=need_weights)[0], expected)
    attention(x, x, x)[0].sum().backward()
    assert attention.out_proj.lora_b.grad.abs().sum() > 0
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(96, 4, 64, batch_first=True), 1)
    with pytest.raises(ValueError, match="out_proj: its MultiheadAttention reads its weight"):
        LoRALinear.add_to(model)
    with pytest.warns(UserWarning, match="reads its weight and never calls it"):
        assert LoRALinear.add_to(model, "layers*") == ["layers.0.linear1", "layers.0.linear2"]
    assert model.eval()(x).shape == x.shape


def build(name: str):
    tf, ids = pytest.importorskip("transformers"), torch.arange(3, 12)[None]
    sizes = {
        "vocab_size": 99,
        "d_model": 64,
        "d_ff": 96,
        "num_layers": 1,
        "num_heads": 4,
        "d_kv": 16,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    if name in ("T5", "UMT5", "SwitchTransformers"):
        extra = {"num_experts": 2} if name == "SwitchTransformers" else {}
        config = getattr(tf, f"{name}Config")(**sizes, **extra)
        return getattr(tf, f"{name}ForConditionalGeneration")(config), {"input_ids": ids, "decoder_input_ids": ids}
    if name in ("Mamba", "Mamba2"):
        extra = {"num_heads": 8, "head_dim": 16, "n_groups": 2} if name == "Mamba2" else {}
        config = getattr(tf, f"{name}Config")(vocab_size=99, hidden_size=64, num_hidden_layers=1, **extra)
        return getattr(tf, f"{name}ForCausalLM")(config), {"input_ids": ids}
    if name == "Bloom":  # with its products cut in slices
        config = tf.BloomConfig(
            vocab_size=99, hidden_size=64, n_layer=1, n_head=4, slow_but_exact=True, pretraining_tp=2
        )
        return tf.BloomForCausalLM(config), {"input_ids": ids}
    if name == "MobileBert":
        config = tf.MobileBertConfig(
            vocab_size=99,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=96,
            embedding_size=32,
            intra_bottleneck_size=32,
        )
        return tf.MobileBertForMaskedLM(config), {"input_ids": ids}
    norm_first = name == "encoder, norm first"
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first), {"src": torch.randn(2, 7, 64)}


MODELS = (
    "T5",
    "UMT5",
    "SwitchTransformers",
    "Mamba",
    "Mamba2",
    "Bloom",
    "MobileBert",
    "encoder",
    "encoder, norm first",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_weights(name: str, adapted: bool):
    model, inputs = build(name)
    model.eval()
    bigkernels.quantize(model, "int8")
    if adapted:
        LoRALinear.add_to(model, "*")
        for module in model.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.lora_b, std=0.1)
    plain = copy.deepcopy(model)
    if adapted:
        for path, module in list(plain.named_modules()):
            if isinstance(module, LoRALinear):
                expected = nn.Parameter(values(module))
                plain.set_submodule(path, module.base)
                bigkernels.dequantize(plain)
                plain.get_submodule(path).weight = expected
    bigkernels.dequantize(plain)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            found, expected = (first(m(**inputs)) for m in (model, plain))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def first(out) -> Tensor:
    return (out if isinstance(out, Tensor) else out.logits).detach()


def test_compiled_code_reads_it():
    layer = quantized()

    def code(x: Tensor) -> Tensor:
        return F.linear(x.to(layer.weight.dtype), layer.weight) + layer.weight.sum()

    torch._dynamo.reset()
    x = torch.randn(3, 96)
    torch.testing.assert_close(
        torch.compile(code, fullgraph=True, backend="aot_eager")(x), code(x), rtol=1e-4, atol=1e-4
    )
