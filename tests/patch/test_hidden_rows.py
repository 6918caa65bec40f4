"""Queries that see no key, as left padding makes them: the gradients of the model's own attention."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

import bigkernels

transformers = pytest.importorskip("transformers")
CONFIG = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
)
MODELS = {
    "llama": lambda kind: transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, attn_implementation=kind)),
    "mistral": lambda kind: transformers.MistralForCausalLM(
        transformers.MistralConfig(**CONFIG, sliding_window=4, attn_implementation=kind)
    ),
    "gemma2": lambda kind: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**CONFIG, sliding_window=4, query_pre_attn_scalar=8, attn_implementation=kind)
    ),
}
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))


def padding(side):
    mask = torch.ones_like(IDS)
    mask[1, {"left": slice(0, 3), "right": slice(9, None), "none": slice(0, 0)}[side]] = 0
    return mask


def gradients(model, mask):
    model.zero_grad()
    model(input_ids=IDS, attention_mask=mask, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.fixture
def calls(monkeypatch):
    rule, found = sys.modules["bigkernels.patch.rules.attention_interface"], []
    attend = rule.attend
    monkeypatch.setattr(rule, "attend", lambda *args, **options: found.append(1) or attend(*args, **options))
    return found


@pytest.mark.parametrize("side", ["left", "right", "none", "4-D"])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_padding(name, kind, side, calls):
    if (name, kind) == ("gemma2", "sdpa") or (kind, side) == ("sdpa", "4-D"):
        pytest.skip("transformers has no such model, or mask")
    torch.manual_seed(0)
    model = MODELS[name](kind).train()
    if side == "4-D":
        seen = torch.ones(12, 12, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
        seen[1, :, :, :3] = False
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        mask = dict.fromkeys(model.config.layer_types, mask) if hasattr(model.config, "layer_types") else mask
    else:
        mask = padding(side)
    expected = gradients(copy.deepcopy(model), mask)
    bigkernels.patch(model, decode=False)
    calls.clear()
    found = gradients(model, mask)
    top = max(g.abs().max().item() for g in expected.values())
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e-4 * max(g.abs().max().item(), 1e-2 * top), msg=name)
    # The kernels' layers are left to the model in such batches only, and only where a gradient needs it.
    assert bool(calls) == (kind == "sdpa" or side in ("right", "none"))
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=mask)
    assert calls


def test_t5_with_padding():
    """Its boolean masks become finite beside the bias."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).train()

    def step(model):
        model.zero_grad()
        model(input_ids=IDS, attention_mask=padding("left"), labels=IDS, decoder_attention_mask=padding("left"))[
            0
        ].backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = step(copy.deepcopy(model))
    bigkernels.patch(model, decode=False)
    found = step(model)
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=2e-4 * max(g.abs().max().item(), 1e-4), msg=name)
