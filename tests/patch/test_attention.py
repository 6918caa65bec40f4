"""Attention: Hugging Face's interface and its masks, `scaled_dot_product_attention` and `nn.MultiheadAttention`."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import logging
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import bigkernels
from bigkernels._load import cpu_library
from bigkernels.patch.rules import attention as shared
from bigkernels.patch.rules import attention_interface, attention_mask, attention_multihead, attention_sdpa
from bigkernels.patch.rules.attention_mask import StructuredMask

transformers = pytest.importorskip("transformers")
masking_utils = pytest.importorskip("transformers.masking_utils")

pytestmark = pytest.mark.skipif(cpu_library().reason is not None, reason="without kernels attention is left to torch")

ONLY = {"norm": False, "rope": False, "mlp": False, "loss": False, "encode": False}
TEXT = dict(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT = dict(
    vocab_size=199,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=64,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    bos_token_id=1,
    eos_token_id=2,
)
ENCODER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
SEQ2SEQ = dict(
    vocab_size=199,
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    dropout=0.0,
)
VISION = dict(image_size=16, patch_size=8, **ENCODER)


@dataclass(frozen=True)
class Model:
    name: str
    config: str
    options: dict[str, Any]
    attention: int  # calls of an attention function or of torch's, per forward
    masks: int
    implementation: str = "sdpa"
    kernel: str = "attention"
    inputs: str = "text"
    generates: bool = True


MODELS = {
    "llama": Model("LlamaForCausalLM", "LlamaConfig", TEXT, 2, 1),
    "llama-eager": Model("LlamaForCausalLM", "LlamaConfig", TEXT, 2, 1, "eager"),
    "mistral": Model("MistralForCausalLM", "MistralConfig", TEXT | {"sliding_window": 5}, 2, 1),
    "mistral-eager": Model("MistralForCausalLM", "MistralConfig", TEXT | {"sliding_window": 5}, 2, 1, "eager"),
    "qwen2": Model("Qwen2ForCausalLM", "Qwen2Config", TEXT | {"use_sliding_window": True, "sliding_window": 4,
                                                              "max_window_layers": 1}, 2, 1),
    "gemma2": Model("Gemma2ForCausalLM", "Gemma2Config", TEXT | {"sliding_window": 5, "attn_logit_softcapping": 2.0,
                                                                 "query_pre_attn_scalar": 16}, 2, 1, "eager"),
    "gpt_oss": Model("GptOssForCausalLM", "GptOssConfig", TEXT | {"sliding_window": 5, "num_local_experts": 4,
                                                                 "experts_implementation": "eager"}, 2, 1,
                     "eager", "attention (sinks)"),
    "gpt2": Model("GPT2LMHeadModel", "GPT2Config", GPT, 2, 1),
    "phi": Model("PhiForCausalLM", "PhiConfig", TEXT | {"num_key_value_heads": 4, "attention_dropout": 0.0}, 2, 1),
    "falcon": Model("FalconForCausalLM", "FalconConfig", ENCODER | {"vocab_size": 199, "alibi": True, "bos_token_id": 1,
                                                                    "eos_token_id": 2}, 4, 1),
    "bert": Model("BertForMaskedLM", "BertConfig", ENCODER | {"vocab_size": 199}, 2, 0, generates=False),
    "vit": Model("ViTModel", "ViTConfig", VISION, 2, 1, inputs="image", generates=False),
    "bart": Model("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, 6, 2, inputs="pair"),
    "t5": Model("T5ForConditionalGeneration", "T5Config",
                dict(vocab_size=199, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
                     decoder_start_token_id=1), 6, 2, inputs="pair"),
    "whisper": Model("WhisperForConditionalGeneration", "WhisperConfig",
                     SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32,
                                "begin_suppress_tokens": None}, 6, 1, inputs="audio", generates=False),
}  # fmt: skip


def _build(model: Model, **more: Any) -> nn.Module:
    config = getattr(transformers, model.config)(**model.options, **more)
    config._attn_implementation = model.implementation
    torch.manual_seed(0)
    built = getattr(transformers, model.name)(config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "sinks" in name or "bias" in name:  # made as zeros
                parameter.normal_()
    return built


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


@dataclass
class Spy:
    """What reached the kernels' functions: the options, and the ends of packed sequences."""

    dense: list[dict[str, Any]] = field(default_factory=list)
    packed: list[dict[str, Any]] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.dense) + len(self.packed)

    def clear(self) -> None:
        self.__init__()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen = Spy()

    def attention(q, k, v, **options):
        seen.dense.append(options)
        return bigkernels.functional.attention(q, k, v, **options)

    def varlen_attention(q, k, v, ends_q, ends_k, *lengths, **options):
        seen.packed.append(options)
        seen.ends.append(ends_q.tolist())
        return bigkernels.functional.varlen_attention(q, k, v, ends_q, ends_k, *lengths, **options)

    monkeypatch.setattr(shared, "attention", attention)
    monkeypatch.setattr(shared, "varlen_attention", varlen_attention)
    return seen


def _patch(module: nn.Module, spy: Spy, **flags: bool) -> Any:
    """The report; what was called to check the kernels is forgotten. Calls are the modules', whose rules are tested."""
    report = bigkernels.patch(module, **{"decode": False} | flags)
    spy.clear()
    return report


def _ids(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(3, 199, (batch, length), generator=torch.Generator().manual_seed(seed))


def _padding(left: bool, length: int = 12) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :4] = 0
    return mask if left else mask.flip(1)


def _inputs(model: Model) -> dict[str, dict[str, Any]]:
    if model.inputs == "image":
        return {"plain": {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}}
    if model.inputs == "audio":
        features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1))
        return {"plain": {"input_features": features, "decoder_input_ids": _ids(length=7)}}
    more = {"decoder_input_ids": _ids(length=7, seed=2)} if model.inputs == "pair" else {}
    return {
        "plain": {"input_ids": _ids(), **more},
        "left": {"input_ids": _ids(), "attention_mask": _padding(True), **more},
        "right": {"input_ids": _ids(), "attention_mask": _padding(False), **more},
    }


def _step(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The output and all gradients, also of what stands at padding."""
    module.zero_grad()
    out = module(**inputs)
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state
    weights = torch.linspace(-1, 1.7, logits.numel(), dtype=torch.float64).view(logits.shape)
    padding = inputs.get("attention_mask")
    if isinstance(padding, Tensor) and padding.shape == logits.shape[:2]:
        weights = weights * padding[..., None]
    (logits.double() * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().clone(), **gradients}


def _assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 5e-5) -> None:
    assert set(ours) == set(theirs)
    floor = 1e-3 * max(t.abs().max() for n, t in theirs.items() if n != "logits")
    for name, b in theirs.items():
        a = ours[name]
        assert a.dtype == b.dtype, name
        scale = b.abs().max() if name == "logits" else max(b.abs().max(), floor)
        assert (a - b).abs().max() <= tolerance * scale, name


def _attributes(module: nn.Module) -> dict[str, dict[str, int]]:
    return {path: {k: id(v) for k, v in vars(m).items()} for path, m in module.named_modules()}


def test_models_give_what_they_gave(model, spy, count):
    """Outputs and gradients with and without padding, through the kernels in every layer, and exactly undone."""
    module = _build(model)
    before = {name: _step(module, given) for name, given in _inputs(model).items()}
    attributes, config = _attributes(module), copy.deepcopy(vars(module.config))
    report = _patch(module, spy, **ONLY)
    assert report.skipped == []
    found = count(report)
    assert (found.get(model.kernel), found.get("attention mask", 0)) == (model.attention, model.masks)
    assert all(row.error < 0.02 for row in report.patched)
    for name, given in _inputs(model).items():
        spy.clear()
        _assert_close(_step(module, given), before[name])
        # Queries that see no key have a gradient by eager attention, which is then the model's own.
        hidden = name == "left" and model.implementation == "eager" and model.inputs != "pair"
        assert len(spy) == (0 if hidden else model.attention if model.name != "FalconForCausalLM" else 2)
    assert vars(module.config) == config
    bigkernels.unpatch(module)
    assert _attributes(module) == attributes
    again = _step(module, _inputs(model)["plain"])
    assert all(torch.equal(t, before["plain"][n]) for n, t in again.items())


def test_bfloat16(model, spy):
    """Not further from float64 than the model's own attention."""
    (given,) = list(_inputs(model).values())[:1]

    def cast(dtype):
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}

    module = _build(model)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(**cast(torch.float64))[0]
        theirs = module.bfloat16()(**cast(torch.bfloat16))[0]
        _patch(module, spy, **ONLY)
        ours = module(**cast(torch.bfloat16))[0]
    assert len(spy) > 0
    assert ours.dtype == theirs.dtype
    mine, base = ((t.double() - exact).square().mean().sqrt() for t in (ours, theirs))
    assert mine <= 1.5 * base + 2**-9 * exact.square().mean().sqrt()


GENERATION = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("name", ["llama", "mistral", "mistral-eager", "gemma2", "gpt_oss", "gpt2", "falcon", "t5"])
def test_generation(name, spy):
    module = _build(MODELS[name])
    options = {"attention_mask": _padding(True), "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    ways = {n: w for n, w in GENERATION.items() if n != "chunked prefill" or name != "t5"}
    if name == "falcon":
        ways = {n: ways[n] for n in ("dynamic", "beams")}
    before = {n: module.generate(_ids(), **options, **way) for n, way in ways.items()}
    _patch(module, spy, **ONLY)
    for n, way in ways.items():
        spy.clear()
        assert torch.equal(module.generate(_ids(), **options, **way), before[n]), n
        assert len(spy) > 7, n


def test_assisted_generation(spy):
    """Several new tokens after a cache: causal with fewer queries than keys."""
    module, assistant = _build(MODELS["llama"]), _build(MODELS["mistral"])
    options = {"max_new_tokens": 12, "do_sample": False, "assistant_model": assistant}
    before = module.generate(_ids(1), **options)
    _patch(module, spy, **ONLY)
    assert torch.equal(module.generate(_ids(1), **options), before)
    assert {"window", "scale"} <= set(spy.dense[0])


@pytest.mark.parametrize("name", ["llama", "mistral", "mistral-eager", "gemma2"])
def test_packed_sequences_are_independent(name, spy):
    """Position ids that start again: the packed kernel gets the sequences, and each gives what it gives alone."""
    module = _build(MODELS[name])
    ids, lengths = _ids(1, 24), [7, 1, 16]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    before = _step(module, given)
    alone = torch.cat([module(part).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(before["logits"], alone, rtol=1e-4, atol=1e-5)
    _patch(module, spy, **ONLY)
    _assert_close(_step(module, given), before)
    assert spy.ends == [[0, 7, 8, 24]] * 2
    assert not spy.dense
    two = {"input_ids": _ids(2, 24), "position_ids": torch.cat((positions, positions.flip(1) * 0 + torch.arange(24)))}
    spy.clear()
    ours = module(**two, use_cache=False).logits
    assert spy.ends[0] == [0, 7, 8, 24, 48]
    bigkernels.unpatch(module)
    torch.testing.assert_close(ours, module(**two, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_no_mask_as_large_as_the_scores_is_made(monkeypatch, spy):
    """Sliding windows, padding and packing reach the kernels as options."""
    built = []
    monkeypatch.setattr(StructuredMask, "dense", property(lambda mask: built.append(mask) or mask._build()))
    module = _build(MODELS["mistral"])
    _patch(module, spy, **ONLY)
    built.clear()  # of the check of the builders, which a process makes once
    module(_ids())
    module(_ids(), attention_mask=_padding(True))
    module(_ids(), position_ids=torch.arange(12).remainder(5).expand(2, -1), use_cache=False)
    assert not built
    assert all(call["window"] == (4, 0) for call in (*spy.dense, *spy.packed))
    assert [call["mask"] is None for call in spy.dense] == [True, True, False, False]
    assert spy.dense[2]["mask"].shape == (2, 1, 1, 12)


@pytest.mark.parametrize("name", ["llama", "llama-eager", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks_of_the_caller(name, kind, spy):
    """Four dimensions are handed on as they are, also one that differs between heads."""
    module = _build(MODELS[name])
    seen = torch.rand(2, 4, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.3
    seen |= torch.eye(12, dtype=torch.bool)
    mask: Any = (
        seen if kind == "boolean" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    )
    if kind == "boolean" and MODELS[name].implementation == "eager":
        return  # eager attention adds it
    given = {"input_ids": _ids(), "attention_mask": mask}
    if "layer_types" in vars(module.config):
        given["attention_mask"] = dict.fromkeys(module.config.layer_types, mask)
    before = _step(module, given)
    _patch(module, spy, **ONLY)
    _assert_close(_step(module, given), before)
    assert len(spy) == 2


def test_prefix_of_an_image_is_seen_both_ways(spy):
    """Gemma 3 overlays a bidirectional block of image tokens, which no option of the kernels describes."""
    options = TEXT | {"sliding_window": 5, "query_pre_attn_scalar": 16}
    config = transformers.Gemma3Config(
        text_config=options,
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    torch.manual_seed(0)
    module = transformers.Gemma3ForConditionalGeneration(config).eval()
    ids = _ids(1, 14).clamp_min(9)
    ids[0, 3:7] = 5
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 5).long()}
    before = _step(module, given)
    report = _patch(module, spy, **ONLY)
    assert {row.path.split(".")[1] for row in report.patched} >= {"language_model", "vision_tower"}
    _assert_close(_step(module, given), before)
    assert len(spy) == 4
    assert any(c["mask"] is not None and c["mask"].shape[2:] == (14, 14) for c in spy.dense)


@pytest.mark.parametrize("name", ["llama-eager", "gemma2", "gpt_oss", "llama", "t5"])
def test_output_attentions(name, spy, caplog):
    """The weights are the model's own, in that call alone, and the reason is logged once."""
    model = MODELS[name]
    module, given = _build(model), _inputs(model)["left"]
    before = module(**given, output_attentions=True)
    key = "decoder_attentions" if name == "t5" else "attentions"
    _patch(module, spy, **ONLY)
    shared._logged.clear()
    with caplog.at_level(logging.INFO, "bigkernels"):
        after = [module(**given, output_attentions=True) for _ in range(2)][1]
    assert torch.allclose(after.logits, before.logits, atol=1e-5)
    if model.implementation == "eager":
        assert not spy.dense
        assert [r.message.split(": ")[1] for r in caplog.records].count("attention weights are asked for") == 1
        assert all(torch.equal(a, b) for a, b in zip(after[key], before[key], strict=True))
    else:
        assert after[key] == before[key]  # torch's function gives none
    spy.clear()
    with torch.no_grad():
        module(**given)
    assert len(spy) == model.attention


def test_a_hook_sees_the_weights_of_eager_attention(spy):
    module = _build(MODELS["llama-eager"])
    seen = []
    module.model.layers[1].self_attn.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    module(_ids())
    _patch(module, spy, **ONLY)
    module(_ids())
    assert len(spy) == 1
    assert torch.allclose(seen[0], seen[1], atol=1e-6)


def test_a_config_may_be_shared():
    """Patching writes nothing into a config: the other model runs its own attention, and files name no kernel."""
    config = transformers.LlamaConfig(**TEXT)
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    text = config.to_json_string()
    want = [m(_ids()).logits for m in (first, second)]
    bigkernels.patch(first, **ONLY)
    assert first.config is second.config is first.model.layers[0].self_attn.config is config
    assert config._attn_implementation == "sdpa"
    assert torch.equal(second(_ids()).logits, want[1])
    assert not any("forward" in vars(m) for m in second.modules())
    assert config.to_json_string() == text
    torch.testing.assert_close(first(_ids()).logits, want[0], rtol=1e-4, atol=1e-5)
    bigkernels.unpatch(first)
    assert first.config is config
    assert torch.equal(first(_ids()).logits, want[0])


def test_saved_configs_are_those_of_the_model(tmp_path):
    module = _build(MODELS["mistral"])
    module.save_pretrained(tmp_path / "before")
    bigkernels.patch(module)
    module.save_pretrained(tmp_path / "after")
    files = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("before", "after")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "whisper"])
def test_copies_and_pickles(name, spy):
    model = MODELS[name]
    module, given = _build(model), _inputs(model)["plain"]
    _patch(module, spy, **ONLY)
    want = module(**given)[0]
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        spy.clear()
        assert torch.equal(again(**given)[0], want)
        assert len(spy) == model.attention
        bigkernels.unpatch(again)
        assert not any("forward" in vars(m) for m in again.modules())
        torch.testing.assert_close(again(**given)[0], want, rtol=1e-4, atol=1e-5)


def test_the_implementation_may_change_later(spy):
    """The interface is asked at every call, as before."""
    module = _build(MODELS["mistral"])
    want = module(_ids(), attention_mask=_padding(True)).logits
    _patch(module, spy, **ONLY)
    module.set_attn_implementation("eager")
    module(_ids(), attention_mask=_padding(False))
    assert len(spy) == 2

    def half(*args: Any, **kwargs: Any):
        out, weights = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
        return out / 2, weights

    transformers.AttentionInterface.register("half", half)
    transformers.AttentionMaskInterface.register("half", masking_utils.sdpa_mask)
    try:
        spy.clear()
        module.set_attn_implementation("half")
        halved = module(_ids(), attention_mask=_padding(True)).logits
        assert len(spy) == 0
        module.set_attn_implementation("sdpa")
        got = module(_ids(), attention_mask=_padding(True)).logits
    finally:
        del transformers.AttentionInterface._global_mapping["half"]
        del transformers.AttentionMaskInterface._global_mapping["half"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (halved - want).abs().max() > 1e-3


def test_other_implementations_are_left_alone():
    module = _build(MODELS["llama"])
    module.config._attn_implementation_internal = "flash_attention_2"
    report = bigkernels.patch(module, **ONLY)
    assert report.patched == []
    assert {row.what for row in report.skipped} == {"its attention runs through flash_attention_2"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "falcon"])
def test_float64_is_left_to_the_model(name, spy):
    """No kernel supports it, and the reference would hold all scores."""
    module, given = _build(MODELS[name]).double(), _inputs(MODELS[name])["right"]
    want = module(**given).logits
    _patch(module, spy, **ONLY)
    assert torch.equal(module(**given).logits, want)
    assert len(spy) == 0


@pytest.mark.parametrize("name", ["mistral", "mistral-eager"])
def test_dropout(name, spy):
    """In training alone, decided by torch's seed, and right on average."""
    module = _build(MODELS[name], attention_dropout=0.3)
    given = {"input_ids": _ids(), "attention_mask": _padding(False)}
    want = module(**given).logits
    _patch(module, spy, **ONLY)
    torch.testing.assert_close(module(**given).logits, want, rtol=1e-4, atol=1e-5)
    assert {call["dropout_p"] for call in spy.dense} == {0.0}
    module.train()
    spy.clear()
    torch.manual_seed(3)
    first, second = module(**given).logits, module(**given).logits
    torch.manual_seed(3)
    assert torch.equal(module(**given).logits, first)
    assert not torch.equal(first, second)
    assert {call["dropout_p"] for call in spy.dense} == {0.3}
    attention = module.model.layers[0].self_attn
    x, sin = torch.randn(1, 6, 64), torch.zeros(1, 6, 16)
    with torch.no_grad():
        draws = torch.stack([attention(x, (sin + 1, sin), None)[0] for _ in range(1500)])
        exact = attention.eval()(x, (sin + 1, sin), None)[0]
    assert (draws.mean(0) - exact).abs().max() < 6 * (draws.std(0) / 1500**0.5).max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_masks(reentrant, spy):
    module = _build(MODELS["mistral"]).train()
    given = {"input_ids": _ids(), "attention_mask": _padding(True)}
    before = _step(module, given)
    _patch(module, spy, **ONLY)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    _assert_close(_step(module, given), before)
    assert len(spy) == 4


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_layers_get_masks(padded):
    """Masks made outside of a compiled region are traced as dense ones."""
    module = _build(MODELS["mistral"])
    given = {"input_ids": _ids(), "use_cache": False} | ({"attention_mask": _padding(True)} if padded else {})
    before = _step(module, given)
    bigkernels.patch(module, **ONLY)
    torch._dynamo.reset()
    for layer in module.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    _assert_close(_step(module, given), before)


def test_autocast(spy):
    module = _build(MODELS["gemma2"])
    dtypes = []
    for patched in (False, True):
        if patched:
            _patch(module, spy, **ONLY)
        attention = module.model.layers[0].self_attn
        handle = attention.o_proj.register_forward_pre_hook(lambda m, args: dtypes.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            module(_ids())
        handle.remove()
    assert dtypes == [torch.bfloat16] * 2
    assert len(spy) == 2


# Masks that say what they hold.

MASKS = ["create_causal_mask", "create_sliding_window_causal_mask", "create_bidirectional_mask"]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MASKS)
def test_structures_are_the_masks_they_stand_for(kind, name):
    """Every length, cache, window and padding: the structure, the dense mask and the original builder agree."""
    create = getattr(masking_utils, name)
    structured = 0
    for queries, past, window, padding in itertools.product((2, 3, 8), (0, 1, 5), (1, 3, 9), (None, "left", "right")):
        config = transformers.LlamaConfig(**TEXT, sliding_window=window)
        config._attn_implementation = kind
        given: dict[str, Any] = {"inputs_embeds": torch.zeros(2, queries, 4), "attention_mask": None}
        if "causal" in name:
            cache = transformers.DynamicCache(config=config if "sliding" in name else None)
            if past:
                cache.update(*(torch.zeros(2, 2, past, 16) for _ in range(2)), 0)
            given[CACHE] = cache
        elif past:
            continue
        if padding:
            mask = torch.ones(2, past + queries, dtype=torch.bool)
            mask[1, :1] = False
            given["attention_mask"] = mask if padding == "left" else mask.flip(1)
        theirs = create(config=config, **given)
        ours = attention_mask._structured(create)(config=config, **given)
        assert (ours is None) == (theirs is None)
        if type(ours) is not StructuredMask:
            continue
        structured += 1
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(ours.dense, theirs)
        seen = ours.structure.visible(torch.arange(queries)).expand(theirs.shape)
        assert torch.equal(seen, theirs if kind == "sdpa" else theirs == 0)
    assert structured > 5


def _mask(window: int = 3) -> tuple[StructuredMask, Tensor]:
    config = transformers.MistralConfig(**TEXT, sliding_window=window)
    config._attn_implementation = "sdpa"
    given = {"config": config, "inputs_embeds": torch.zeros(2, 6, 4), "attention_mask": None, CACHE: None}
    create = masking_utils.create_sliding_window_causal_mask
    return attention_mask._structured(create)(**given), create(**given)


def test_a_structured_mask_is_a_tensor():
    """Whatever reads it finds the dense mask."""
    mask, dense = _mask()
    assert isinstance(mask, Tensor)
    assert (mask.shape, mask.dtype, mask.device, mask.dim()) == (dense.shape, dense.dtype, dense.device, 4)
    reads: list[Callable[[Tensor], Any]] = [
        lambda m: m[:, :, 2:, :4],
        lambda m: ~m,
        lambda m: m.view(2, 36),
        lambda m: m.sum(),
        lambda m: m.float() * 2,
        lambda m: torch.where(m, 1.0, 2.0),
        lambda m: torch.cat((m, m)),
        lambda m: m.clone(),
        copy.deepcopy,
        lambda m: m.to(torch.uint8),
        lambda m: m.expand(2, 4, 6, 6),
        lambda m: torch.stack(list(m.unbind(2))),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.detach(),
        lambda m: m & m,
    ]
    for read in reads:
        mask, dense = _mask()
        found = read(mask)
        assert type(found) is Tensor
        assert torch.equal(found, read(dense.contiguous()))
    assert mask.tolist() == mask.numpy().tolist() == dense.tolist()
    assert repr(mask) == repr(dense)
    mask, _ = _mask()
    assert bool(mask.any())
    assert mask.structure is not None


@pytest.mark.parametrize(
    "change", [lambda m: m[0, :, :, 0].fill_(False), lambda m: m.logical_not_(), lambda m: m.unbind(0)[1].zero_()]
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_changed_mask_forgets_its_structure(change, inference, spy):
    with torch.inference_mode(inference):
        mask, dense = _mask()
        dense = dense.clone(memory_format=torch.contiguous_format)
        for m in (mask, dense):
            change(m)
        q, k, v = (torch.randn(2, 4, 6, 16) for _ in range(3))
        out = shared.attend(q, k, v, mask)
        want = scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    assert spy.dense[0]["window"] is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_structured_mask_through_a_checkpoint(reentrant):
    mask, dense = _mask()
    q = torch.randn(2, 4, 6, 16, requires_grad=True)
    out = checkpoint(lambda q, m: shared.attend(q, q, q, m), q, mask, use_reentrant=reentrant)
    out.square().sum().backward()
    ours, q.grad = q.grad, None
    scaled_dot_product_attention(q, q, q, attn_mask=dense).square().sum().backward()
    torch.testing.assert_close(ours, q.grad, rtol=1e-4, atol=1e-5)


# Attention functions that are not what they look like.


def eager_plain(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.dropout(weights.softmax(-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def eager_masked(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def eager_scaled_twice(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    out, weights = eager_plain(module, query, key, value, attention_mask, 2 * scaling, dropout)
    return out, weights


def eager_sigmoid(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = query @ key.transpose(2, 3) * scaling
    weights = weights.sigmoid() if attention_mask is None else (weights + attention_mask).sigmoid()
    return (weights @ value).transpose(1, 2), weights


def eager_option(module, query, key, value, attention_mask, scaling, dropout=0.0, temperature=None, **kwargs):
    return eager_plain(module, query / temperature if temperature else query, key, value, attention_mask, scaling)


def eager_kwargs(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    return eager_plain(module, query, key, value, attention_mask, scaling * kwargs.get("factor", 1.0))


def eager_attribute(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = (query @ key.transpose(2, 3) * scaling * module.factor).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


INTERFACE = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
# Renamed in transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(masking_utils.create_causal_mask).parameters else "past_key_values"


class Attention(nn.Module):
    """As Hugging Face's modules are written; the tests put the function in."""

    def __init__(self, implementation: str = "eager"):
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation=implementation)
        self.factor = 1.5

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (x, 2 * x, x + 1))


class Plain(Attention):
    def forward(self, x, mask=None, **kwargs):
        attention_interface = INTERFACE.get_interface(self.config._attn_implementation, eager_plain)
        out, weights = attention_interface(self, *self.heads(x), mask, dropout=0.0, scaling=0.3, **kwargs)
        return out, weights


class Masked(Attention):
    def forward(self, x, mask=None, **kwargs):
        attention_interface = INTERFACE.get_interface(self.config._attn_implementation, eager_masked)
        return attention_interface(self, *self.heads(x), mask, scaling=0.3, **kwargs)


class ScaledTwice(Attention):
    def forward(self, x, mask=None, **kwargs):
        attention_interface = INTERFACE.get_interface(self.config._attn_implementation, eager_scaled_twice)
        return attention_interface(self, *self.heads(x), mask, scaling=0.3, **kwargs)


class Sigmoid(Attention):
    def forward(self, x, mask=None, **kwargs):
        attention_interface = INTERFACE.get_interface(self.config._attn_implementation, eager_sigmoid)
        return attention_interface(self, *self.heads(x), mask, scaling=0.3, **kwargs)


class Option(Attention):
    def forward(self, x, mask=None, **kwargs):
        attention_interface = INTERFACE.get_interface(self.config._attn_implementation, eager_option)
        return attention_interface(self, *self.heads(x), mask, scaling=0.3, **kwargs)


class Kwargs(Attention):
    def forward(self, x, mask=None, **kwargs):
        attention_interface = INTERFACE.get_interface(self.config._attn_implementation, eager_kwargs)
        return attention_interface(self, *self.heads(x), mask, scaling=0.3, **kwargs)


class Attribute(Attention):
    def forward(self, x, mask=None, **kwargs):
        attention_interface = INTERFACE.get_interface(self.config._attn_implementation, eager_attribute)
        return attention_interface(self, *self.heads(x), mask, scaling=0.3, **kwargs)


class UsesWeights(Attention):
    def forward(self, x, mask=None, **kwargs):
        attention_interface = INTERFACE.get_interface(self.config._attn_implementation, eager_plain)
        out, weights = attention_interface(self, *self.heads(x), mask, scaling=0.3, **kwargs)
        return out * weights.mean(), weights


LOOK_ALIKES = [
    (Plain, None, 1, {}),
    (Plain, None, 1, {"temperature": 3.0, "position_ids": torch.arange(5)}),
    (Masked, None, 1, {"mask": torch.zeros(5, 5)}),
    (ScaledTwice, "eager_scaled_twice hands its module on", 0, {}),
    (Sigmoid, "computes something else", 0, {}),
    (Option, "eager_option hands its module on", 0, {"temperature": 3.0}),
    (Kwargs, "eager_kwargs reads options that it does not name", 0, {"factor": 3.0}),
    (Attribute, "eager_attribute reads factor of its module", 0, {}),
    (UsesWeights, "its forward computes with the attention weights", 0, {}),
]


@pytest.mark.parametrize(("build", "reason", "calls", "options"), LOOK_ALIKES)
def test_attention_functions_that_look_alike(build, reason, calls, options, spy):
    module, x = build(), torch.randn(2, 5, 16)
    want = module(x, **options)[0]
    report = _patch(module, spy)
    assert [reason in row.what for row in report.skipped] == ([] if reason is None else [True])
    torch.testing.assert_close(module(x, **options)[0], want, rtol=1e-5, atol=1e-6)
    assert len(spy) == calls


def test_an_eager_function_that_needs_a_mask_fails_as_before():
    module, x = Masked(), torch.randn(2, 5, 16)
    bigkernels.patch(module)
    with pytest.raises(TypeError):
        module(x)


def test_options_the_kernels_do_not_have(spy, caplog):
    """Options that the model's function knows and the kernels do not are left to it; what it ignores, they ignore."""
    module, x = Plain("sdpa"), torch.randn(2, 5, 16)
    _patch(module, spy)
    shared._logged.clear()
    with caplog.at_level(logging.INFO, "bigkernels"):
        with pytest.raises(ValueError, match="softcap"):
            module(x, softcap=2.0)
        for _ in range(3):
            module(x, torch.zeros(2, 1, 5, 5), cache=object())
    # transformers before 5.24 names a paged cache among the arguments.
    named = "cache" in inspect.signature(INTERFACE["sdpa"]).parameters
    assert len(spy) == (0 if named else 3)
    reasons = ["the option softcap"] + ["the option cache"] * named
    assert [r.message.split(": ")[1] for r in caplog.records] == reasons


# scaled_dot_product_attention


class Heads(nn.Module):
    def __init__(self, shape=(2, 4), queries=7, keys=7, groups=None):
        super().__init__()
        self.shapes = [(*shape, queries, 16), *[(*shape[:-1], groups or shape[-1], keys, 16)] * 2]

    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(s, generator=generator).requires_grad_() for s in self.shapes]


class Positional(Heads):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, None, 0.0, True)


class Imported(Heads):
    def forward(self, q, k, v):
        return scaled_dot_product_attention(query=q, key=k, value=v, scale=0.3)


class Dotted(Heads):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)


class Boolean(Heads):
    def forward(self, q, k, v):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(1)
        mask[2] = False
        return nn.functional.scaled_dot_product_attention(q, k, v, mask)


class Additive(Heads):
    def __init__(self, **options):
        super().__init__(**options)
        self.bias = nn.Parameter(torch.randn(self.shapes[0][-2], self.shapes[1][-2]))

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


class OfHeads(Heads):
    def forward(self, q, k, v):
        mask = torch.zeros(*q.shape[:-1], k.shape[-2])
        mask[..., 1] = float("-inf")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask + q.mean().detach())


class Grouped(Heads):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Unpacked(Heads):
    def forward(self, *args):
        return F.scaled_dot_product_attention(*args, **{"is_causal": True})


SDPA = [
    (Positional, {}, 1),
    (Positional, {"queries": 5, "keys": 9}, 1),
    (Positional, {"queries": 9, "keys": 5}, 1),
    (Imported, {"queries": 5, "keys": 9}, 1),
    (Dotted, {"queries": 1, "keys": 9}, 1),
    (Boolean, {}, 1),
    (Boolean, {"queries": 5, "keys": 9}, 1),
    (Additive, {}, 1),
    (Additive, {"queries": 5, "keys": 9}, 1),
    (OfHeads, {}, 1),
    (Grouped, {"groups": 2}, 1),
    (Unpacked, {}, 1),
    (Positional, {"shape": (3,)}, 1),
    (OfHeads, {"shape": (3,)}, 1),
    (Positional, {"shape": (2, 3, 4)}, 1),
    (Additive, {"shape": (2, 3, 4)}, 1),
    (OfHeads, {"shape": (2, 3, 4)}, 0),
    (Positional, {"shape": ()}, 0),
    (Positional, {"groups": 1}, 1),
]


@pytest.mark.parametrize(("build", "options", "calls"), SDPA)
def test_scaled_dot_product_attention(build, options, calls, spy):
    if options.get("shape") == ():
        module = Positional()
        module.shapes = [(7, 16)] * 3
    else:
        module = build(**options)

    def step():
        tensors = [*module.tensors(), *module.parameters()]
        module.zero_grad()
        out = module(*tensors[:3])
        weights = torch.linspace(-1, 1.7, out.numel()).view(out.shape)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]

    before = step()
    report = _patch(module, spy)
    assert [row.what for row in report.patched] == ["attention"]
    after = step()
    assert len(spy) == calls
    largest = max(t.abs().max() for t in before)
    for ours, theirs in zip(after, before, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert (ours - theirs).abs().max() <= 1e-5 * max(theirs.abs().max(), 0.1 * largest)


class Dropped(Heads):
    def forward(self, q, k, v, p=0.4):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)


def test_dropout_of_scaled_dot_product_attention(spy):
    module = Dropped()
    _patch(module, spy)
    tensors = module.tensors()
    torch.manual_seed(1)
    first, second = module(*tensors), module(*tensors)
    torch.manual_seed(1)
    assert torch.equal(module(*tensors), first)
    assert not torch.equal(first, second)
    spy.clear()
    assert torch.equal(module(*tensors, p=1.0), torch.zeros_like(first))  # torch's own, as before
    assert len(spy) == 0


class Refused(Heads):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, torch.ones(7, 7, dtype=torch.bool), is_causal=True)


class Mixed(Heads):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v.double())


@pytest.mark.parametrize(("build", "options"), [(Refused, {}), (Mixed, {}), (Positional, {"groups": 2})])
def test_errors_are_those_of_torch(build, options, spy):
    module = build(**options)
    messages = []
    for patched in (False, True):
        if patched:
            assert _patch(module, spy).patched
        try:
            messages.append(str(module(*module.tensors())[0, 0, 0, 0]))
        except RuntimeError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]
    assert len(spy) == 0


def test_a_function_put_in_later_is_called(monkeypatch, spy):
    module = Positional()
    _patch(module, spy)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest, **kwargs: 2 * q)
    q, k, v = module.tensors()
    assert torch.equal(module(q, k, v), 2 * q)
    assert len(spy) == 0


def test_kernels_chosen_by_the_caller(spy):
    """Second derivatives need torch's plain attention, and asking for it is how one gets them."""
    module = Positional()
    tensors = [t.detach()[:1, :1, :3, :2].contiguous().requires_grad_() for t in module.tensors()]
    _patch(module, spy)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(module, [t.double().detach().requires_grad_() for t in tensors])
        (gradient,) = torch.autograd.grad(module(*tensors).square().sum(), tensors[0], create_graph=True)
        torch.autograd.grad(gradient.square().sum(), tensors[0])
    assert len(spy) == 0
    module(*tensors)
    assert len(spy) == 1


def test_nested_tensors_and_transforms_are_left_to_torch(spy):
    module = Imported()
    _patch(module, spy)
    q, k, v = (t.detach() for t in module.tensors())
    want = scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(torch.func.vmap(module)(q, k, v), want)
    nested = [
        torch.nested.nested_tensor([t[0].transpose(0, 1)[:n] for n in (3, 7)], layout=torch.jagged).transpose(1, 2)
        for t in (q, k, v)
    ]
    module(*nested)
    assert len(spy) == 0


# nn.MultiheadAttention

LAYOUTS = [{"batch_first": True}, {}, {"bias": False, "batch_first": True}, {"kdim": 24, "vdim": 8}]
WAYS = ["self", "memory", "cross"]
MULTIHEAD_MASKS = [
    "none",
    "boolean",
    "padding",
    "both",
    "of heads",
    "additive",
    "additive both",
    "causal",
    "causal and padding",
    "nothing seen",
]


def _multihead_masks(kind: str, heads: int, queries: int, keys: int, padding: Tensor) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    boolean = torch.ones(queries, keys, dtype=torch.bool).triu(2)
    causal = {"attn_mask": torch.ones(queries, keys, dtype=torch.bool).triu(1), "is_causal": True}
    nothing = boolean.clone()
    nothing[2] = True
    additive = torch.randn(heads, queries, keys, generator=generator)
    return {
        "none": {},
        "boolean": {"attn_mask": boolean},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": boolean, "key_padding_mask": padding},
        "of heads": {"attn_mask": additive > 0.7},
        "additive": {"attn_mask": additive[0]},
        "additive both": {"attn_mask": additive, "key_padding_mask": torch.where(padding, -2.0, 1.0)},
        "causal": causal,
        "causal and padding": causal | {"key_padding_mask": padding},
        "nothing seen": {"attn_mask": nothing},
    }[kind]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MULTIHEAD_MASKS)
def test_multihead(layout, kind, spy):
    """Self and cross attention, with and without a batch: outputs and gradients of inputs and weights."""
    for way, batched in itertools.product(WAYS, (True, False)):
        if ("kdim" in layout and way != "cross") or ("causal" in kind and way != "self"):
            continue
        torch.manual_seed(0)
        module = nn.MultiheadAttention(16, 2, **layout)
        first = module.batch_first
        lengths = (5, 5 if way == "self" else 7)

        def tensor(length, size, batched=batched, first=first):
            shape = ((3, length, size) if first else (length, 3, size)) if batched else (length, size)
            return torch.randn(shape).requires_grad_()

        query = tensor(lengths[0], 16)
        key = query if way == "self" else tensor(lengths[1], module.kdim)
        value = tensor(lengths[1], module.vdim) if way == "cross" else key
        padding = torch.zeros(3, lengths[1], dtype=torch.bool)
        padding[1, 3:] = True
        masks = _multihead_masks(kind, 2 * (3 if batched else 1), *lengths, padding if batched else padding[1])

        def step(module=module, query=query, key=key, value=value, masks=masks):
            out, weights = module(query, key, value, need_weights=False, **masks)
            assert weights is None
            leaves = [*{id(t): t for t in (query, key, value)}.values(), *module.parameters()]
            scale = torch.linspace(-1, 1.7, out.numel()).view(out.shape)
            return [out.detach(), *torch.autograd.grad((out * scale).sum(), leaves)]

        before = step()
        assert [row.what for row in _patch(module, spy).patched] == ["attention"]
        spy.clear()
        after = step()
        assert len(spy) == 1
        largest = max(t.abs().max() for t in before[1:])
        for ours, theirs in zip(after, before, strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() <= 1e-5 * max(theirs.abs().max(), 1e-3 * largest)


def test_multihead_weights_are_the_classes_own(spy):
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(3, 5, 16)
    for options in ({}, {"average_attn_weights": False}):
        want = module(x, x, x, **options)
        with bigkernels.patched(module):
            spy.clear()  # of what was compared
            found = module(x, x, x, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert len(spy) == 0


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_multihead_with_keys_of_its_own_is_skipped(options):
    report = bigkernels.patch(nn.MultiheadAttention(16, 2, **options))
    assert report.patched == []
    assert [row.what for row in report.skipped] == ["it adds keys of its own (add_bias_kv or add_zero_attn)"]


def test_multihead_look_alikes():
    class Other(nn.MultiheadAttention):
        def forward(self, query, key, value, **kwargs):
            return query + key + value, None

    class Same(nn.MultiheadAttention):
        pass

    report = bigkernels.patch(nn.ModuleList([Other(16, 2), Same(16, 2)]))
    assert [row.path for row in report.patched] == ["1"]


def test_multihead_errors_are_those_of_torch():
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(3, 5, 16)
    wrong: list[tuple[tuple, dict]] = [
        ((x, x, x), {"is_causal": True}),
        ((x, x, x), {"attn_mask": torch.ones(4, 5, dtype=torch.bool)}),
        ((x, x, x), {"key_padding_mask": torch.ones(3, 4, dtype=torch.bool)}),
        ((x, x[:2], x[:2]), {}),
        ((x, x[..., :8], x), {}),
        ((x.double(), x.double(), x.double()), {}),
    ]
    for args, options in wrong:
        messages = []
        for patched in (False, True):
            if patched:
                bigkernels.patch(module)
            with pytest.raises((RuntimeError, AssertionError)) as error:
                module(*args, need_weights=False, **options)
            messages.append(str(error.value))
        bigkernels.unpatch(module)
        assert messages[0] == messages[1]


def test_multihead_dropout(spy):
    module = nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True)
    x = torch.randn(3, 5, 16)
    want = module.eval()(x, x, x, need_weights=False)[0]
    _patch(module, spy)
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], want, rtol=1e-4, atol=1e-6)
    module.train()
    torch.manual_seed(0)
    first = module(x, x, x, need_weights=False)[0]
    torch.manual_seed(0)
    assert torch.equal(module(x, x, x, need_weights=False)[0], first)
    assert [call["dropout_p"] for call in spy.dense] == [0.0, 0.3, 0.3]


def test_layers_of_torch_keep_their_fast_path(spy):
    """In evaluation without gradients the encoder layer does not call its attention module; patched as before."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        want = layer(x, src_key_padding_mask=padding)
    slow = layer(x, src_key_padding_mask=padding).detach()
    report = _patch(layer, spy, **ONLY)
    assert [row.path for row in report.patched] == ["self_attn"]
    with torch.no_grad():
        assert torch.equal(layer(x, src_key_padding_mask=padding), want)
    assert len(spy) == 0
    torch.testing.assert_close(layer(x, src_key_padding_mask=padding), slow, rtol=1e-4, atol=1e-5)
    assert len(spy) == 1


def test_a_transformer_of_torch(spy):
    torch.manual_seed(0)
    module = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)
    source, target = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(5)

    def step():
        module.zero_grad()
        out = module(source, target, tgt_mask=causal, tgt_is_causal=True)
        (out * torch.linspace(-1, 1.7, out.numel()).view(out.shape)).sum().backward()
        return {"logits": out.detach(), **{n: p.grad.clone() for n, p in module.named_parameters()}}

    before = step()
    report = _patch(module, spy, **ONLY)
    assert len(report.patched) == 6
    _assert_close(step(), before)
    assert len(spy) == 6


def test_a_check_that_fails_is_a_row(monkeypatch):
    """A kernel that computes something else is not used."""
    monkeypatch.setattr(shared, "attention", lambda q, k, v, **options: v.mean(2, keepdim=True).expand_as(q) + 0 * q)
    checks = (attention_interface._identify, attention_sdpa._error, attention_multihead._error)

    def forget():
        attention_interface._replacements.clear()
        for check in checks:
            check.cache_clear()

    forget()
    try:
        for module in (Positional(), nn.MultiheadAttention(16, 2), Plain(), Plain("sdpa")):
            report = bigkernels.patch(module)
            assert report.patched == []
            assert len(report.skipped) == 1
    finally:
        forget()
