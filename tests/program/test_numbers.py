"""How exact the logits of patched models are: in 16 bits, with quantized weights, with adapters, on any threads."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from decoders import (
    CACHE,
    MODELS,
    Pair,
    build,
    generate,
    given,
    pair,
    patch_modules,
    prompt,
    uses_modules,
    uses_program,
)
from torch import Tensor, nn

import bigkernels
from bigkernels._compare import compare

IDS = prompt(2, 24, seed=6)
# Experts that are chosen or not by a rounding make large differences: here all are chosen.
ALL_EXPERTS = {"qwen3_moe": dict(num_experts_per_tok=4)}
FORMATS = ["int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8"]


def _logits(model: nn.Module, sizes=(9, 1, 1, 3, 10), ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    """Of `ids` in parts of these sizes, one cache for all of them."""
    made, cache, begin = [], None, 0
    with torch.no_grad():
        for size in sizes:
            masks = {} if mask is None else {"attention_mask": mask[:, : begin + size]}
            out = model(input_ids=ids[:, begin : begin + size], use_cache=True, **{CACHE: cache}, **masks)
            cache, begin = given(out), begin + size
            made.append(out.logits)
    return torch.cat(made, dim=1)


@functools.cache
def _exact(name: str, dtype: torch.dtype) -> nn.Module:
    model = build(name, dtype, **ALL_EXPERTS.get(name, {})).double()
    if name in ALL_EXPERTS:
        model.set_experts_implementation("eager")  # grouped products are not of float64
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_16_bits(name: str, dtype: torch.dtype):
    """At most twice as far from the exact logits as the patched modules' are, and one rounding."""
    modules = build(name, dtype, **ALL_EXPERTS.get(name, {}))
    ours = copy.deepcopy(modules)
    bigkernels.patch(ours)
    patch_modules(modules)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    for given_mask in (None, mask):
        exact = _logits(_exact(name, dtype), mask=given_mask)
        with uses_modules(modules):
            plain = _logits(modules, mask=given_mask)
        with uses_program(ours):
            got = _logits(ours, mask=given_mask)
        assert got.dtype == dtype
        seen = torch.ones(2, 24, dtype=torch.bool) if given_mask is None else mask.bool()
        found = compare(got[seen], plain[seen], exact[seen], scale="row")
        assert found.ok, str(found)


@pytest.mark.parametrize("config", FORMATS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_quantized_in_float32(name: str, config: str):
    """Codes are multiplied with tokens as they are, but by int8-dynamic, which rounds them."""
    modules = build(name)
    bigkernels.quantize(modules, config, skip=())
    ours, exact = copy.deepcopy(modules), copy.deepcopy(modules)
    bigkernels.patch(ours)
    patch_modules(modules)
    with uses_program(ours):
        got = _logits(ours)
    plain = _logits(modules)
    bigkernels.dequantize(exact)
    exact = _logits(exact.double())
    if config == "int8-dynamic":
        assert _far(got, exact) < max(0.03, 1.5 * _far(plain, exact))
        return
    found = compare(got, plain, exact, scale="row")
    assert found.ok, str(found)


@pytest.mark.parametrize("config", FORMATS)
def test_quantized_in_bfloat16(config: str):
    """Tokens may be rounded to 8 bits in blocks: the error of logits stays that of a few thousandths a product."""
    modules = build("llama", torch.bfloat16)
    bigkernels.quantize(modules, config, skip=(), embeddings=True)
    ours, exact = copy.deepcopy(modules), copy.deepcopy(modules)
    bigkernels.patch(ours)
    patch_modules(modules)
    bigkernels.dequantize(exact)
    exact = _logits(exact.double())
    with uses_program(ours):
        got = _logits(ours)
    assert got.dtype == torch.bfloat16
    assert _far(got, exact) < max(0.03, 1.5 * _far(_logits(modules), exact))


def _far(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bits_do_not_depend_on_threads(name: str, threads: int):
    ours = _patched(name)
    with uses_program(ours):
        expected = _logits(ours)
        try:
            torch.set_num_threads(threads)
            assert torch.equal(_logits(ours), expected)
        finally:
            torch.set_num_threads(2)
    assert torch.equal(_logits(ours), expected)


@functools.cache
def _patched(name: str) -> nn.Module:
    ours = build(name, torch.bfloat16)
    bigkernels.patch(ours)
    return ours


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bits_do_not_depend_on_neighbours(name: str):
    """What a sequence gets is the same alone, in a batch, and after another model has run."""
    ours = _patched(name)
    both = _logits(ours, (6, 1, 1))
    _logits(_patched("gpt2"))
    assert torch.equal(_logits(ours, (6, 1, 1)), both)
    torch.testing.assert_close(_logits(ours, (6, 1, 1), IDS[1:]), both[1:], rtol=0.03, atol=0.03)


# ---- adapters


def _adapter(model: nn.Module, name: str = "default", seed: int = 0, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if f"lora_B.{name}" in path:
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
            elif f"lora_A.{name}" in path:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
    return model.eval()


@pytest.mark.parametrize("order", ["patched first", "adapters first"])
@pytest.mark.parametrize("base", ["plain", "int4"])
def test_adapters(order: str, base: str):
    """On, switched off, switched to another, merged, merged back, and merged for good."""
    theirs = build("llama")
    if base != "plain":
        bigkernels.quantize(theirs, base)
    ours = copy.deepcopy(theirs)
    if order == "patched first":
        bigkernels.patch(ours)
        generate(ours)
    theirs, ours = _adapter(theirs), _adapter(ours)
    if order == "adapters first":
        bigkernels.patch(ours)
    models = Pair(theirs, ours)
    made = [_same(models)]
    for model in (theirs, ours):
        _adapter(model, "other", seed=1)
        model.set_adapter("other")
        model.eval()
    made.append(_same(models))
    with theirs.disable_adapter(), ours.disable_adapter():
        made.append(_same(models))
    made.append(_same(models))
    for model in (theirs, ours):
        model.set_adapter("default")
    made.append(_same(models))
    assert torch.equal(made[1], made[3])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(made[i], made[j], atol=1e-2)
    if base == "plain":
        for model in (theirs, ours):
            model.merge_adapter()
        _same(models)
        for model in (theirs, ours):
            model.unmerge_adapter()
        _same(models)
        _same(Pair(theirs.merge_and_unload(), ours.merge_and_unload()))
    else:
        _same(Pair(theirs.unload(), ours.unload()))


def _same(models: Pair) -> Tensor:
    with torch.no_grad():
        theirs, ours = models.both(lambda model: _logits(model, (6, 1, 2)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * theirs.abs().max().item())
    return ours


def test_an_adapter_that_is_scaled_and_trained():
    models = Pair(_adapter(build("llama")), _adapter(build("llama")))
    bigkernels.patch(models.ours)
    _same(models)
    for model in (models.theirs, models.ours):
        for m in model.modules():
            if hasattr(m, "scale_layer"):
                m.scale_layer(0.3)
    _same(models)
    for model in (models.theirs, models.ours):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
        model.eval()
    theirs, ours = models.both(_logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * theirs.abs().max().item())


def test_adapters_that_do_more():
    """DoRA, rank-stabilized scales, biases, dropout in evaluation, a head that is trained whole."""
    for options in (
        dict(use_dora=True),
        dict(use_rslora=True, lora_dropout=0.5),
        dict(bias="lora_only"),
        dict(modules_to_save=["lm_head"]),
        dict(layers_to_transform=[1]),
    ):
        models = Pair(_adapter(build("llama"), **options), _adapter(build("llama"), **options))
        bigkernels.patch(models.ours)
        _same(models)


def test_a_prompt_that_is_trained():
    """Virtual tokens come with embeddings or as a cache."""
    peft = pytest.importorskip("peft")
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        models = pair("llama")
        wrapped = []
        for model in (models.theirs, models.ours):
            torch.manual_seed(2)
            wrapped.append(peft.get_peft_model(model, config).eval())
        Pair(*wrapped).same(_generated)


def _generated(model: nn.Module) -> Tensor:
    ids = prompt()
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
