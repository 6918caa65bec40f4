"""The language models of transformers, with tiny configurations."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
auto = transformers.models.auto.modeling_auto

LARGEST = 3e7  # parameters: configurations that ignore the sizes below make models of billions
# By all the names that configurations give them.
SIZES = {
    160: "vocab_size",
    64: "hidden_size n_embd d_model embedding_size dim attention_hidden_size",
    96: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff decoder_ffn_dim encoder_ffn_dim hidden_dim",
    4: "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads"
    " decoder_attention_heads encoder_attention_heads num_experts n_routed_experts num_local_experts conv_kernel",
    2: "num_key_value_heads multi_query_group_num num_experts_per_tok decoder_layers encoder_layers type_vocab_size"
    " eos_token_id",
    128: "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx",
    16: "head_dim kv_lora_rank qk_nope_head_dim v_head_dim mamba_d_head",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_dim",
    8: "qk_rope_head_dim mamba_d_state mamba_n_heads state_size",
    24: "q_lora_rank",
    5: "sliding_window",
    0: "pad_token_id",
    1: "bos_token_id n_group topk_group first_k_dense_replace",
}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
MODELS = {
    model.__name__: (model, config)
    for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_MASKED_LM_MAPPING)
    for config, models in mapping.items()
    for model in (models if isinstance(models, tuple) else (models,))
}


def build(name: str, implementation: str) -> nn.Module:
    """A model in evaluation mode, or a skip that says why there is none."""
    model, config = MODELS[name]
    try:
        known = {*inspect.signature(config.__init__).parameters, *config().to_dict(), *config.attribute_map}
        given = {key: value for key, value in TINY.items() if key in known}
        made = config(**given, **({"text_config": dict(TINY)} if "text_config" in known else {}))
        with torch.device("meta"):
            parameters = sum(p.numel() for p in model(made).parameters())
    except Exception as error:
        pytest.skip(f"no tiny configuration: {type(error).__name__}: {str(error)[:80]}")
    if parameters > LARGEST:
        pytest.skip(f"{parameters / 1e6:.0f} million parameters")
    try:
        built = model._from_config(made, attn_implementation=implementation)
    except Exception as error:
        pytest.skip(f"does not build: {type(error).__name__}: {str(error)[:80]}")
    for p in built.parameters():
        if p.dim() < 2:
            p.data += 0.1 * torch.randn_like(p)  # ones and zeros hide what is done with them
    return built.float().eval()
