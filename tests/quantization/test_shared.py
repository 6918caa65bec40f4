"""Codes that two modules share, and models that are saved, moved and loaded with them."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils import _python_dispatch
from torch.utils.flop_counter import FlopCounterMode

import bigkernels
from bigkernels.nn import QuantizedEmbedding, QuantizedLinear
from bigkernels.ops.registry import is_watched
from bigkernels.quantization import Int4

IDS = torch.arange(24).reshape(2, 12) % 50
ALL = {"embeddings": True, "skip": ()}
FORMATS = ("int8", "int4", "nf4", "fp8", "q4_1", "q8_0")


class Tied(nn.Module):
    """A head that shares the table's weight, under a name of its own."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.output = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50)
        self.output.weight = self.table.weight

    def forward(self, ids):
        return self.output(self.layer(self.table(ids)))


def tied(name: str = "int8") -> Tied:
    model = Tied()
    assert len(bigkernels.quantize(model, name, **ALL).quantized) == 3
    return model


def same(model: Tied) -> bool:
    a, b = model.table.qweight.tensors, model.output.qweight.tensors
    return all(a[name] is b[name] or (a[name].data_ptr() == b[name].data_ptr() != 0) for name in a)


def llama(tie: bool) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
    )
    return transformers.LlamaForCausalLM(config).eval()


MOVES = {
    "cast": lambda m: m.double().float(),
    "twice": lambda m: m.to("cpu").to(torch.float64).float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "copied memory": lambda m: m._apply(lambda t: t.clone()),
    "shared memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_move_keeps_them_one(name: str, move):
    model = tied(name)
    expected = model(IDS)
    for _ in range(2):
        model = move(model)
        assert same(model) and torch.equal(model(IDS), expected)
    bigkernels.dequantize(model)
    assert model.output.weight is model.table.weight


@pytest.mark.parametrize("name", FORMATS)
def test_through_the_meta_device(name: str):
    source = tied(name)
    state, expected = source.state_dict(), source(IDS)
    model = tied(name).to("meta").to_empty(device="cpu")
    assert same(model)
    model.load_state_dict(state)
    assert same(model) and torch.equal(model(IDS), expected)
    model = tied(name).to("meta")
    model.load_state_dict(state, assign=True)
    assert same(model) and torch.equal(model(IDS), expected)
    with torch.device("meta"):
        model = Tied()
    report = bigkernels.quantize(model, name, **ALL)
    assert len(report.quantized) == 3 and all(row.error is None and row.after <= row.before for row in report.quantized)
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(IDS), expected)
    bigkernels.dequantize(model)
    assert model.output.weight is model.table.weight


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_an_assigned_state_brings_its_dtype(name: str, metadata: bool, tmp_path):
    source = tied(name).bfloat16()
    torch.save(source.state_dict(), tmp_path / "state")
    state, model = torch.load(tmp_path / "state"), tied(name)
    if not metadata:  # a file of tensors alone: the dtype is that of the bias, where there is one
        state = {key: t for key, t in state.items() if key.startswith("output")}
    model.load_state_dict(state, assign=True, strict=metadata)
    assert model.output.weight.dtype == torch.bfloat16
    assert metadata == (model.table.weight.dtype == torch.bfloat16)
    if metadata:
        assert torch.equal(model(IDS), source(IDS)) and model(IDS).dtype == torch.bfloat16
        bigkernels.dequantize(model)
        assert model(IDS).dtype == torch.bfloat16 and model.output.weight is model.table.weight


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("saved", ["table", "output"])
def test_a_state_may_hold_them_once(saved: str, assign: bool):
    source = tied()
    other = {"table": "output", "output": "table"}[saved]
    state = {
        name: t
        for name, t in source.state_dict().items()
        if not name.startswith(other) or name.endswith(("bias", "format"))
    }
    model = tied()
    assert not torch.equal(model(IDS), source(IDS))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=assign)  # missing, as torch has it
    assert not unexpected and {name.partition(".")[0] for name in missing} == {other}
    assert same(model) and torch.equal(model(IDS), source(IDS))


@pytest.mark.parametrize("name", ["int8", "nf4"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("options", [{}, ALL], ids=["linear", "all"])
def test_transformers_saves_and_ties_them(tie: bool, options: dict, name: str, tmp_path):
    from safetensors.torch import load_file, load_model, save_model

    model = llama(tie)
    bigkernels.quantize(model, name, **options)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.codes" in state) == (options != {} and not tie)
    for assign in (False, True):
        fresh = llama(tie)
        bigkernels.quantize(fresh, name, **options)
        result = fresh.load_state_dict(state, strict=False, assign=assign)
        assert all(key.startswith("lm_head") for key in result.missing_keys) and not result.unexpected_keys
        fresh.tie_weights()
        assert torch.equal(fresh(IDS).logits, expected)
    save_model(model, tmp_path / "whole.safetensors")
    fresh = llama(tie)
    bigkernels.quantize(fresh, name, **options)
    load_model(fresh, tmp_path / "whole.safetensors")
    assert torch.equal(fresh(IDS).logits, expected)


@pytest.mark.parametrize("kind", ["Bert", "T5"])
def test_heads_with_other_names(kind: str, tmp_path):
    """BERT ties biases beside the weights; T5 has the table under three names."""
    from safetensors.torch import load_file

    tf = pytest.importorskip("transformers")

    def make() -> nn.Module:
        if kind == "T5":
            config = tf.T5Config(
                vocab_size=50,
                d_model=64,
                d_ff=96,
                num_layers=1,
                num_heads=4,
                d_kv=16,
                decoder_start_token_id=0,
                pad_token_id=0,
            )
            return tf.T5ForConditionalGeneration(config).eval()
        config = tf.BertConfig(
            vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
        )
        return tf.BertForMaskedLM(config).eval()

    def run(model: nn.Module) -> torch.Tensor:
        return model(input_ids=IDS, **({"decoder_input_ids": IDS} if kind == "T5" else {})).logits.detach()

    model = make()
    plain = dict(model._tied_weights_keys)
    bigkernels.quantize(model, "nf4", **ALL)
    expected = run(model)
    model.tie_weights()
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert len(state) < len(model.state_dict())
    for assign in (False, True):
        fresh = make()
        bigkernels.quantize(fresh, "nf4", **ALL)
        assert not torch.equal(run(fresh), expected)
        assert not fresh.load_state_dict(state, strict=False, assign=assign).unexpected_keys
        fresh.tie_weights()
        assert torch.equal(run(fresh), expected)
    for each in (model, copied):
        assert torch.equal(run(each), expected)
        bigkernels.dequantize(each)
        assert each._tied_weights_keys == plain and "_tied_weights_keys" not in each.__dict__
        each.tie_weights()
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
        torch.testing.assert_close(run(each), expected, rtol=1e-3, atol=1e-4)


def test_transformers_resizes_what_is_plain():
    """A quantized table is refused by name; a plain one beside quantized layers is resized."""
    model = llama(True)
    bigkernels.quantize(model, "int8", **ALL)
    expected = model(IDS).logits
    with pytest.raises(TypeError, match="QuantizedEmbedding"):
        model.resize_token_embeddings(60)
    assert torch.equal(model(IDS).logits, expected)
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (50, 64)
    bigkernels.dequantize(model)
    model.resize_token_embeddings(60)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model(IDS).logits.shape[-1] == 60
    torch.testing.assert_close(model(IDS).logits[..., :50], expected, rtol=1e-4, atol=1e-5)


def test_layers_are_tied_by_their_weight():
    a, b = (
        QuantizedEmbedding.from_embedding(nn.Embedding(50, 64), "nf4"),
        QuantizedLinear.from_linear(nn.Linear(64, 50), "nf4"),
    )
    assert not torch.equal(a.weight, b.weight)
    b.weight = a.weight
    assert torch.equal(a.weight, b.weight) and b.shares(a)
    b.to("cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="cannot stand for"):
        b.weight = QuantizedLinear.from_linear(nn.Linear(64, 50), "int8").weight


def layer(config="int4", n: int = 40) -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(96, n), config)


WRONG = {
    "another format": (lambda: layer("nf4"), "was saved as .*nf4.*, and is .*int4"),
    "other options": (lambda: layer(Int4(64)), "was saved as .*64.*, and is"),
    "another size": (lambda: layer("int4", 41), r"was saved as .*\[41, 96\].*, and is"),
    "plain": (lambda: nn.Linear(96, 40), "is quantized and the state has a plain weight"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("where", ["cpu", "meta", "emptied"])
@pytest.mark.parametrize("case", WRONG)
def test_the_message_says_what_is_wrong(case: str, where: str, assign: bool):
    made, message = WRONG[case]
    model = nn.Sequential(QuantizedLinear.from_linear(nn.Linear(96, 40), "int4"))
    if where != "cpu":
        model.to("meta")
    if where == "emptied":
        model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=message) as error:
        model.load_state_dict(nn.Sequential(made()).state_dict(), assign=assign)
    assert "size mismatch for 0.codes" not in str(error.value) and "expected torch" not in str(error.value)


def test_wrong_tensors_of_the_right_format():
    model = nn.Sequential(QuantizedLinear.from_linear(nn.Linear(96, 40), "int4"))
    good = model.state_dict()
    for key, t in (("codes", good["0.codes"][:-1]), ("scale", good["0.scale"].float())):
        with pytest.raises(RuntimeError, match=f"0.{key} is .*, expected"):
            model.load_state_dict(good | {f"0.{key}": t})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: t for k, t in good.items() if k != "0.zero"})


@pytest.mark.parametrize("name", FORMATS)
def test_cast_buffers_are_refused_where_operations_are_followed(name: str):
    made = layer(name)
    key = next(key for key, t in made.named_buffers() if t.is_floating_point())
    buffer = made.get_buffer(key)
    buffer.data = buffer.data.bfloat16()
    with FlopCounterMode(display=False), pytest.raises(TypeError, match=f"{key} is torch.bfloat16"):
        made(torch.randn(2, 96))


def test_modes_that_threads_left_in_the_order_of_entering_are_over(monkeypatch):
    monkeypatch.setattr(_python_dispatch, "_is_in_torch_dispatch_mode", False)  # which stays set otherwise
    entered, left = threading.Event(), threading.Event()

    def other():
        with FlopCounterMode(display=False):
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with FlopCounterMode(display=False):
        thread.start()
        entered.wait()
        assert is_watched()
    left.set()
    thread.join()
    assert not is_watched()


@pytest.mark.parametrize("name", FORMATS)
def test_buffers_that_were_cast_one_by_one_are_refused(name: str):
    """As FSDP's `buffer_dtype` does: rounded scales would be another weight."""
    for key, t in layer(name).named_buffers():
        if t.is_floating_point():
            made = layer(name)
            for again in (False, True):
                if again:
                    made(torch.randn(2, 96))
                with pytest.raises(TypeError, match=f"{key} is torch.bfloat16"):
                    buffer = made.get_buffer(key)
                    buffer.data = buffer.data.bfloat16()
                    made(torch.randn(2, 96))
                made = layer(name)


# ---- what is derived from codes -------------------------------------------------------------------------------------

WRITES = {
    "in place": lambda t, new: t.copy_(new),
    "through data": lambda t, new: t.data.copy_(new),
    "numpy": lambda t, new: t.numpy().__setitem__(..., new.numpy()),
    "data": lambda t, new: setattr(t, "data", new.clone()),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("name", FORMATS)
def test_written_codes_count(name: str, write, mode):
    """A loop over buffers that fills them from a checkpoint, as users write it."""
    with mode():
        layer, other = (QuantizedLinear.from_linear(nn.Linear(96, 40, bias=False), name) for _ in range(2))
        x = torch.randn(3, 96)
        layer(x)
        for key, t in layer.named_buffers():
            write(t, dict(other.named_buffers())[key])
        assert torch.equal(layer(x), other(x)) and torch.equal(layer.weight, other.weight)
        layer.load_state_dict(QuantizedLinear.from_linear(nn.Linear(96, 40, bias=False), name).state_dict())
        assert not torch.equal(layer(x), other(x))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        bigkernels.refresh(layer)
        assert torch.equal(layer(x), other(x))
