"""Encoders, patched: their hidden states against those of the modules in float64, and what is left to the modules."""

from __future__ import annotations

import copy
import pickle

import encoders
import pytest
import torch
from program import fuzz_encoders
from torch import Tensor, nn

import bigkernels
from bigkernels._load import cpu_library

pytestmark = pytest.mark.skipif(cpu_library().reason is not None, reason=str(cpu_library().reason))


def stack(model: nn.Module):
    """What the only list of layers keeps."""
    found = {
        id(m.__dict__["_bigkernels_encoder"].stack): m.__dict__["_bigkernels_encoder"].stack
        for m in model.modules()
        if "_bigkernels_encoder" in m.__dict__
    }
    (only,) = found.values()
    return only


def patched(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A model and the same model patched."""
    model = encoders.made(name, dtype)
    ours = copy.deepcopy(model)
    bigkernels.patch(ours, verify=False)
    return model, ours


@torch.no_grad()
def states(model: nn.Module, given: dict) -> Tensor:
    return model(**given)[0]


def compare(model: nn.Module, ours: nn.Module, given: dict, taken: bool = True, rounds: bool = False) -> Tensor:
    """Hidden states of tokens that are no padding; the rest may be zeros. `taken`: by the program."""
    dtype = next(model.parameters()).dtype
    before = stack(ours).taken
    exact = states(copy.deepcopy(model).double(), encoders.cast(given, torch.float64))
    theirs, made = (states(m, encoders.cast(given, dtype)) for m in (model, ours))
    assert (stack(ours).taken > before) == taken, stack(ours).why
    mask = given.get("attention_mask")
    seen = torch.ones(exact.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    scale = exact[seen].abs().max()
    own, error = ((x.double()[seen] - exact[seen]).abs().max() / scale for x in (theirs, made))
    least = {torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    assert error <= max(2 * own, 5e-2 if rounds else least), (error, own)
    if taken and mask is not None and bool((mask.sort(1, descending=True)[0] == mask).all()):
        assert not made[~seen].any() or made.shape[1] != mask.shape[1] or _normed_after(ours)
    return made


def _normed_after(model: nn.Module) -> bool:
    """Whether the model computes more of the hidden states after its layers."""
    return type(model).__name__ in ("ModernBertModel", "CLIPTextModel")


@pytest.mark.parametrize("name", [*encoders.TEXTS, *encoders.OTHERS])
def test_families(name):
    model, ours = patched(name)
    compare(model, ours, encoders.inputs(name))


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert", "t5-gated", "vit", "whisper"])
def test_bfloat16(name):
    model, ours = patched(name, torch.bfloat16)
    compare(model, ours, encoders.inputs(name))


@pytest.mark.parametrize("name", ["bert", "nomic", "t5"])
def test_int8(name):
    model = encoders.made(name)
    ours = copy.deepcopy(model)
    bigkernels.quantize(ours, "int8-dynamic")
    quantized = copy.deepcopy(ours)
    bigkernels.patch(ours, verify=False)
    given = encoders.inputs(name)
    made, theirs, exact = (states(m, given) for m in (ours, quantized, model))
    assert stack(ours).taken == 1, stack(ours).why
    seen = given["attention_mask"].bool()
    # Rounding tokens 32 values at a time loses less than a whole row at a time does; T5's first layer is rounded alike.
    own, error = ((x[seen] - exact[seen]).square().mean().sqrt() for x in (theirs, made))
    assert error < own * (1.1 if name == "t5" else 1) and error < 0.03 * exact[seen].std()


@pytest.mark.parametrize("lengths", [[12], [1], [12, 12], [3, 12, 7, 1, 1, 5]])
def test_paddings(lengths):
    model, ours = patched("bert")
    compare(model, ours, encoders.texts(lengths))
    compare(model, ours, encoders.texts(lengths, left=True))
    given = encoders.texts(lengths)
    ragged = given["attention_mask"].clone()
    ragged[:, 0] = 1
    ragged[0, 0] = 0
    if bool(ragged.any(1).all()):
        compare(model, ours, {**given, "attention_mask": ragged})


def test_left_padding_is_as_the_modules_have_it():
    # Its first token, which classifiers read, is padding.
    model, ours = patched("bert")
    given = encoders.texts([12, 5], left=True)
    torch.testing.assert_close(states(ours, given), states(model, given), rtol=1e-4, atol=1e-5)


def test_empty_masks_are_the_modules():
    model, ours = patched("bert")
    given = encoders.texts([12, 5])
    given["attention_mask"][1] = 0
    before = stack(ours).left
    torch.testing.assert_close(states(ours, given), states(model, given), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert stack(ours).left > before and stack(ours).taken == 0


@pytest.mark.parametrize("kind", ["bool", "float", "causal", "heads"])
def test_masks_of_four_dimensions(kind):
    model, ours = patched("bert")
    given = encoders.texts([9, 9])
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 4 if kind == "heads" else 1, 12, 12, generator=g) < 0.6
    mask |= torch.eye(12, dtype=torch.bool)
    if kind == "causal":
        mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    given["attention_mask"] = mask
    if kind == "float":
        given["attention_mask"] = torch.randn(2, 1, 12, 12, generator=g).masked_fill(~mask, -3e38)
    before = stack(ours).taken
    torch.testing.assert_close(states(ours, given), states(model, given), rtol=1e-4, atol=1e-5)
    assert stack(ours).taken == before + 1, stack(ours).why


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    _, ours = patched("bert", torch.bfloat16)
    given = encoders.texts([12, 9, 1, 4, 12, 12, 2])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = states(ours, given)
        torch.set_num_threads(threads)
        assert torch.equal(states(ours, given), one)
    finally:
        torch.set_num_threads(before)


def test_a_text_does_not_depend_on_its_neighbours():
    _, ours = patched("bert")
    given = encoders.texts([12, 7, 3])
    alone = states(ours, {k: v[1:2, :7] for k, v in given.items()})
    torch.testing.assert_close(states(ours, given)[1, :7], alone[0], rtol=1e-5, atol=1e-6)


# ---- what users do around it


def test_edited_weights_are_seen():
    model, ours = patched("bert")
    given = encoders.inputs("bert")
    compare(model, ours, given)
    for m in (model, ours):
        with torch.no_grad():
            m.encoder.layer[0].intermediate.dense.weight.mul_(1.5)
            m.encoder.layer[1].output.LayerNorm.weight.data = m.encoder.layer[1].output.LayerNorm.weight.data * 2
            m.encoder.layer[0].attention.self.query.bias = nn.Parameter(torch.ones(48))
    compare(model, ours, given)


def test_edited_codes_are_seen():
    model = encoders.made("bert")
    bigkernels.quantize(model, "int8-dynamic")
    ours = copy.deepcopy(model)
    bigkernels.patch(ours, verify=False)
    given = encoders.texts([12] * 8)
    first = states(ours, given)
    for m in (model, ours):
        m.encoder.layer[0].output.dense.qweight.tensors["codes"].neg_()
    made, theirs = states(ours, given), states(model, given)
    assert (made - theirs).norm() < 0.1 * (first - theirs).norm()


def test_hooks_see_their_modules():
    model, ours = patched("bert")
    given = encoders.inputs("bert")
    compare(model, ours, given)
    calls = []
    handle = ours.encoder.layer[0].attention.register_forward_hook(lambda *a: calls.append(1))
    compare(model, ours, given, taken=False)
    assert calls == [1]
    handle.remove()
    compare(model, ours, given)


def test_a_layers_hook_may_change_its_output():
    model, ours = patched("bert")
    given = encoders.inputs("bert")
    for m in (model, ours):
        m.encoder.layer[0].register_forward_hook(lambda module, args, out: out * 2)
    compare(model, ours, given, taken=False)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_collected_outputs(asked):
    model, ours = patched("bert-eager")
    given = encoders.inputs("bert")
    with torch.no_grad():
        theirs, made = (m(**given, **{asked: True}) for m in (model, ours))
    key = "hidden_states" if asked == "output_hidden_states" else "attentions"
    assert len(theirs[key]) == len(made[key]) > 0
    for a, b in zip(theirs[key], made[key], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_training_and_gradients_keep_the_modules():
    model, ours = patched("bert")
    given = encoders.inputs("bert")
    out = ours(**given)[0]
    assert out.requires_grad and stack(ours).taken == 0
    out.sum().backward()
    assert ours.encoder.layer[0].output.dense.weight.grad is not None
    ours.train()
    with torch.no_grad():
        ours(**given)
    assert stack(ours).taken == 0
    ours.eval()
    compare(model, ours, given)
    ours.encoder.layer[1].output.dropout.train()  # for estimates of uncertainty
    with torch.no_grad():
        assert not torch.equal(ours(**given)[0], ours(**given)[0])


def test_copies_pickles_casts_and_unpatch():
    model, ours = patched("bert")
    given = encoders.inputs("bert")
    first = compare(model, ours, given)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert stack(other) is not stack(ours)
        assert torch.equal(states(other, given), first) and stack(other).taken == 1
    assert ours.state_dict().keys() == model.state_dict().keys()
    compare(copy.deepcopy(model).bfloat16(), ours.bfloat16(), given)
    compare(copy.deepcopy(model).bfloat16().float(), ours.float(), given)
    bigkernels.unpatch(ours)
    assert (
        "_bigkernels_encoder" not in ours.encoder.layer[0].__dict__ and "forward" not in ours.encoder.layer[0].__dict__
    )


def test_layers_that_are_left_out_or_called_alone():
    model, ours = patched("bert")
    given = encoders.inputs("bert")
    compare(model, ours, given)
    x = torch.randn(2, 5, 48)
    with torch.no_grad():
        for i in (0, 1):
            theirs, made = (m.encoder.layer[i](x) for m in (model, ours))
            torch.testing.assert_close(made + 0, theirs, rtol=1e-4, atol=1e-5)
    for m in (model, ours):
        m.encoder.layer = m.encoder.layer[:1]
    before = states(model, given)
    torch.testing.assert_close(states(ours, given) + 0, before, rtol=1e-4, atol=1e-5)


def test_a_state_between_layers_is_read_late():
    _, ours = patched("bert")
    kept = []
    with torch.no_grad():
        x = torch.randn(2, 5, 48)
        first = ours.encoder.layer[0](x)
        ours.encoder.layer[1](first)
        kept.append(first)
        ours.encoder.layer[0].output.dense.weight.zero_()
    with pytest.raises(RuntimeError, match="have changed"):
        kept[0].sum()


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_between_two_layers_and_writes_that_nobody_counts(edited, dtype):
    model, ours = patched("bert", dtype)
    with torch.no_grad():
        x = torch.randn(2, 5, 48).to(dtype)
        first = ours.encoder.layer[0](x)
        ours.encoder.layer[1](first)
        assert stack(ours).taken == 1
        if edited:
            ours.encoder.layer[0].output.dense.weight.data.mul_(-40)
            with pytest.raises(RuntimeError, match="have changed"):
                first.sum()
        else:
            torch.testing.assert_close(first + 0, model.encoder.layer[0](x), rtol=2e-2, atol=2e-2)


def test_classes_that_wrap_an_encoder():
    import transformers as t

    torch.manual_seed(0)
    config = t.BertConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, num_labels=3
    )
    model = t.BertForSequenceClassification(config).eval()
    ours = copy.deepcopy(model)
    report = bigkernels.patch(ours)
    given = encoders.texts([12, 4])
    with torch.no_grad():
        torch.testing.assert_close(ours(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-5)
    assert "encoder program: 2 layers, 12 products (12 float32)" in str(report)
    assert any(m["model"] == "BertLayer" for m in bigkernels.info()["programs"]["models"])
    off = copy.deepcopy(model)
    bigkernels.patch(off, encode=False)
    assert "_bigkernels_encoder" not in off.bert.encoder.layer[0].__dict__


@pytest.mark.parametrize("seed", range(1000, 1006))
def test_random_encoders(seed):
    assert fuzz_encoders.run(seed) == "taken"


@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_of_torch(padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 4, 80, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    ours = copy.deepcopy(model)
    bigkernels.patch(ours, verify=False)
    x = torch.randn(3, 9, 48)
    mask = torch.arange(9) >= torch.tensor([[9], [4], [7]]) if padded else None
    with torch.no_grad():
        for _ in range(2):
            made, theirs = (m(x, src_key_padding_mask=mask) for m in (ours, model))
            seen = torch.ones(3, 9, dtype=torch.bool) if mask is None else ~mask
            torch.testing.assert_close(made[seen], theirs[seen], rtol=1e-4, atol=1e-5)


def test_hidden_states_that_change_under_the_layers():
    _, ours = patched("bert")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.randn(2, 5, 48)
            first = ours.encoder.layer[0](x)
            x.mul_(2)
            with pytest.raises(RuntimeError, match="have changed"):
                ours.encoder.layer[1](first)


# ---- what the modules have to answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "mpnet", "whisper"])
def test_gradients_of_later_layers(name):
    """The first layers may be frozen, and the model in evaluation."""
    model, ours = patched(name)
    given, norms = encoders.inputs(name), []
    states(ours, given)
    for m in (model, ours):
        m.requires_grad_(False)
        (layers,) = (x for x in m.modules() if isinstance(x, nn.ModuleList) and len(x) == len(stack(ours).layers))
        layers[-1].requires_grad_(True)
        out = m(**given)[0]
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float32).view(out.shape)
        (out * weights).sum().backward()
        norms.append(sum(p.grad.norm() for p in layers[-1].parameters() if p.grad is not None))
    assert norms[0] > 0
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=1e-5)


def test_a_hidden_text_of_a_quantized_model():
    model, given = encoders.made("bert"), encoders.inputs("bert")
    given["attention_mask"][1] = 0
    bigkernels.quantize(model, "int8-dynamic")
    ours = copy.deepcopy(model)
    bigkernels.patch(ours, verify=False)
    for _ in range(2):
        seen = given["attention_mask"].bool()
        torch.testing.assert_close(states(ours, given)[seen], states(model, given)[seen], rtol=1e-2, atol=2e-2)


def test_kept_states_are_there_at_once():
    """A loop that keeps what its layers give, and weights that change before it is read."""
    layers = nn.ModuleList([layer for _ in range(2) for layer in encoders.made("bert").encoder.layer])
    layers = nn.ModuleList([copy.deepcopy(layer) for layer in layers])
    ours = copy.deepcopy(layers)
    bigkernels.patch(ours, verify=False)
    x = torch.randn(2, 5, next(layers.parameters()).shape[-1])
    results = []
    with torch.no_grad():
        for stack_of in (layers, ours):
            kept = [x]
            for layer in stack_of:
                out = layer(kept[-1])
                kept.append(out if isinstance(out, Tensor) else out[0])
            for p in stack_of.parameters():
                p.data.mul_(2)
            results.append(kept[1:])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b + 0, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "clip_vision"])
@pytest.mark.parametrize("where", ["class", "function"])
def test_replaced_linear_layers(name, where, monkeypatch):
    names = [*encoders.TEXTS, *encoders.OTHERS]
    model, ours = patched(name if name in names else next(n for n in names if "clip" in n))
    given = encoders.inputs(name if name in names else next(n for n in names if "clip" in n))
    before = states(ours, given)
    owner, key = (nn.Linear, "forward") if where == "class" else (torch.nn.functional, "linear")
    original = getattr(owner, key)
    monkeypatch.setattr(owner, key, lambda *args, **kwargs: original(*args, **kwargs) * 1.25)
    expected = states(model, given)
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(states(ours, given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, owner, key",
    [
        ("bert", torch.nn.functional, "layer_norm"),
        ("bert", torch, "layer_norm"),
        ("bert", torch.nn.functional, "scaled_dot_product_attention"),
        ("bert-eager", torch.nn.functional, "dropout"),
        ("bert-eager", torch.nn.functional, "softmax"),
        ("bert-eager", torch, "matmul"),
        ("t5", torch, "rsqrt"),
        ("t5", torch.nn.functional, "relu"),
        ("t5", torch.nn.functional, "scaled_dot_product_attention"),
    ],
)
def test_replaced_functions_of_torch(name, owner, key, monkeypatch):
    """By whoever wants to see or change what they do: nobody is given the old function's numbers."""
    model, ours = patched(name)
    given = encoders.inputs(name)
    seen = given["attention_mask"].bool()
    before = states(ours, given)[seen]
    original = getattr(owner, key)
    with monkeypatch.context() as patching:
        patching.setattr(owner, key, lambda *args, **kwargs: original(*args, **kwargs) * 1.25)
        expected = states(model, given)[seen]
        made = states(ours, given)[seen]
    assert not torch.allclose(before, expected, atol=5e-3)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    count = stack(ours).taken
    torch.testing.assert_close(states(ours, given)[seen], before, rtol=0, atol=0)
    assert stack(ours).taken == count + 1


def test_quick_gelu_without_verification():
    from transformers.activations import QuickGELUActivation

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(32, 64), QuickGELUActivation(), nn.Linear(64, 32)

        def forward(self, x):
            x = self.fc1(x)
            x = self.act(x)
            return self.fc2(x)

    model = Layers().eval()
    ours = copy.deepcopy(model)
    report = bigkernels.patch(ours, verify=False)
    assert any("quick_gelu" in row.what for row in report.patched)
    x = torch.randn(40, 32) * 3
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-5, atol=1e-5)


# ---- T5: a bias of positions, which the first layer makes ----------------------------------------------------------


def test_t5_reads_edited_positions():
    model, ours = patched("t5")
    given = encoders.inputs("t5")
    before = compare(model, ours, given)
    for m in (model, ours):
        table = m.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        table.data.add_(torch.linspace(-2, 2, table.numel(), dtype=torch.float32).view_as(table))
    assert (compare(model, ours, given) - before).abs().max() > 1e-2
    compare(model, ours, encoders.texts([12, 5], left=True))
    assert len(stack(ours).layers) == 2


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_t5_generates(activation):
    import transformers as t

    torch.manual_seed(0)
    sizes = dict(d_model=48, d_kv=12, d_ff=80, num_layers=3, num_heads=4, vocab_size=99)
    model = t.T5ForConditionalGeneration(t.T5Config(**sizes, feed_forward_proj=activation, decoder_start_token_id=0))
    model.eval()
    ours = copy.deepcopy(model)
    report = bigkernels.patch(ours, verify=False)
    given = encoders.texts([12, 4])
    made, theirs = (m.generate(**given, max_new_tokens=6, do_sample=False) for m in (ours, model))
    assert torch.equal(made, theirs)
    stacks = {path: s for path, s in report.programs.items() if hasattr(s, "layers")}
    assert stacks["encoder.block"].taken == 1 and stacks["decoder.block"].taken == 0
    scores = [m(**given, decoder_input_ids=torch.tensor([[0, 5], [0, 7]])).logits for m in (ours, model)]
    torch.testing.assert_close(scores[0] + 0, scores[1], rtol=1e-4, atol=1e-4)
