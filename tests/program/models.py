"""Tiny language models of transformers that decode with a cache: those of `architectures`, with what it takes."""

from __future__ import annotations

import architectures
import pytest
import torch
import transformers
from torch import nn

# What tiny configurations need besides the common sizes.
MORE = {"is_decoder": True, "rotary_dim": 8, "default_language": "en_XX", "hc_mult": 2}
# What some families need else, tried in order: heads with a part that is rotated and one that is not, whose `head_dim`
# is that of the first; keys and values of each head, made from latents; layers with attention among those with states.
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
_MIXED = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "attn_layer_indices": [1, 3],
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "num_key_value_heads": 4,
}
VARIANTS = (
    {},
    {"head_dim": 8},
    _LATENT,
    _MIXED,
    _MIXED | {"layer_types": ["mamba", "attention"] * 2},
    {"num_key_value_heads": 4, "layer_types": ["full_attention"] * 4},
)


def causal() -> list[str]:
    """The names of all causal language models."""
    found = architectures.auto.MODEL_FOR_CAUSAL_LM_MAPPING
    return sorted(
        {m.__name__ for models in found.values() for m in (models if isinstance(models, tuple) else (models,))}
    )


def build(name: str, implementation: str, **more: object) -> nn.Module:
    """A model in evaluation mode, or a skip that says why there is none."""
    before = dict(architectures.TINY)
    architectures.TINY.update(MORE)
    architectures.TINY.update(more)
    try:
        torch.manual_seed(0)
        return architectures.build(name, implementation)
    finally:
        architectures.TINY.clear()
        architectures.TINY.update(before)


def any_build(name: str, **more: object) -> nn.Module:
    """With the attention that it supports."""
    try:
        return build(name, "sdpa", **more)
    except pytest.skip.Exception:
        return build(name, "eager", **more)


_SMALL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
# (the configuration's class, its arguments) of models that the common sizes do not make small.
OWN = {
    "GPTNeoForCausalLM": ("GPTNeoConfig", {
        "vocab_size": 160, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96,
        "window_size": 5, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128}),
    "Dots1ForCausalLM": ("Dots1Config", {
        **_SMALL, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16}),
    "DbrxForCausalLM": ("DbrxConfig", {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 160, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}}),
    "Emu3ForCausalLM": ("Emu3TextConfig", _SMALL),
    "Phi4MultimodalForCausalLM": ("Phi4MultimodalConfig", _SMALL),
}  # fmt: skip


def own(name: str) -> nn.Module:
    """A model of OWN."""
    config, given = OWN[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**given)).eval()
    for p in model.parameters():
        if p.dim() < 2:
            p.data += 0.1 * torch.randn_like(p)  # ones and zeros hide what is done with them
    return model


def small(name: str) -> nn.Module:
    """A model that runs, or a skip."""
    if name in OWN:
        return own(name)
    skip, built = None, False
    for more in VARIANTS:
        try:
            model = any_build(name, **more)
        except pytest.skip.Exception as reason:
            skip = skip or reason
            continue
        built = True
        if runs(model):
            return model
    raise pytest.skip.Exception("does not run") if built else skip


def runs(model: nn.Module) -> bool:
    """Whether it takes a few tokens at all: not every configuration fits every family."""
    try:
        with torch.no_grad():
            model(input_ids=torch.randint(8, 100, (1, 4)))
    except Exception:  # noqa: BLE001  in any way
        return False
    return True
