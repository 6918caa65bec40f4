"""A GGUF file of a model that came from none: what its metadata says, and where each tensor goes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..nn.quantized import Quantized
from ..quantization import GGUFBlocks
from ..quantization.ggml import BLOCK_TYPES
from ._codes import blocks_of
from ._file import STRING, Pair
from ._source import Place, Source
from ._state import _names, expert_places

_WHAT = "bigkernels.save_gguf"
_UINT32, _FLOAT32, _BOOL = 4, 6, 7


def _heads(config: Any, head: int) -> dict[str, Any]:
    return {"attention.key_length": head, "attention.value_length": head}


def _experts(config: Any, head: int) -> dict[str, Any]:
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    } | ({} if shared is None else {"expert_shared_feed_forward_length": shared})


def _rotated(config: Any, head: int) -> dict[str, Any]:
    return {"rope.dimension_count": head}


def _partly(config: Any, head: int) -> dict[str, Any]:
    return {"rope.dimension_count": int(head * config.rope_parameters["partial_rotary_factor"])}


def _windowed(config: Any, head: int) -> dict[str, Any]:
    return _heads(config, head) | {"attention.sliding_window": config.sliding_window}


def _capped(config: Any, head: int) -> dict[str, Any]:
    return _windowed(config, head) | {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


# Of a configuration's `model_type`: the file's architecture, and what its metadata has beyond what all have.
_More = Callable[[Any, int], dict[str, Any]]
_ARCHITECTURES: dict[str, tuple[str, _More]] = {
    "llama": ("llama", _rotated),
    "mistral": ("llama", _rotated),
    "qwen2": ("qwen2", lambda config, head: {}),
    "qwen3": ("qwen3", _heads),
    "qwen2_moe": ("qwen2moe", _experts),
    "qwen3_moe": ("qwen3moe", lambda config, head: _heads(config, head) | _experts(config, head)),
    "gemma2": ("gemma2", _capped),
    "gemma3_text": ("gemma3", _windowed),
    "phi3": ("phi3", _rotated),
    "starcoder2": ("starcoder2", lambda config, head: {}),
    "stablelm": ("stablelm", _partly),
}
# What a file cannot say, by attributes of the configuration, and what they are where it need not.
_UNSAID = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}


def described(model: Any, type: str | None) -> Source:
    """The metadata and the places of a model's tensors, whose matrices of numbers are written as a type.

    Raises:
        ValueError: the file format, or transformers' reading of it, has no such model.
    """
    config = model.config.get_text_config() if hasattr(model, "config") else None
    kind = getattr(config, "model_type", None)
    if kind not in _ARCHITECTURES or not hasattr(model, "lm_head"):
        raise ValueError(
            f"{_WHAT}: {model.__class__.__name__} came from no GGUF file, and is none of the causal "
            f"language models that are written anew ({', '.join(_ARCHITECTURES)}); llama.cpp's "
            "convert_hf_to_gguf.py writes others, of a folder that `save_pretrained` made"
        )
    architecture, more = _ARCHITECTURES[kind]
    metadata = _metadata(model, config, architecture, more)
    return Source(architecture, metadata, list(_places(model, architecture, type)), anew=True)


def _metadata(model: nn.Module, config: Any, architecture: str, more: _More) -> dict[str, Pair]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)  # readers have the other kind's from elsewhere
    _check(config, rope, head)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
        **_epsilon(config),
    } | more(config, head)
    found = {
        "general.architecture": _pair(architecture),
        "general.name": _pair(architecture),
        "general.quantization_version": _pair(2),
    }
    return found | {f"{architecture}.{key}": _pair(value) for key, value in values.items()}


def _epsilon(config: Any) -> dict[str, float]:
    if hasattr(config, "rms_norm_eps"):
        return {"attention.layer_norm_rms_epsilon": float(config.rms_norm_eps)}
    eps = next(getattr(config, name) for name in ("layer_norm_eps", "norm_epsilon") if hasattr(config, name))
    return {"attention.layer_norm_epsilon": float(eps)}


def _check(config: Any, rope: Any, head: int) -> None:
    for name, value in _UNSAID.items():
        if getattr(config, name, value) not in (value, None):
            raise ValueError(
                f"{_WHAT}: {name} is {getattr(config, name)!r}, which no GGUF file of a {config.model_type} says"
            )
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{_WHAT}: the rotary embedding is {rope}; only the usual one is written")
    if config.model_type in ("llama", "mistral", "qwen2") and head * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"{_WHAT}: head_dim is {head}, and hidden_size {config.hidden_size} of "
            f"{config.num_attention_heads} heads; readers take their quotient"
        )
    if config.model_type == "mistral" and config.sliding_window is not None:
        raise ValueError(f"{_WHAT}: sliding_window is {config.sliding_window}, which no GGUF file of a mistral says")
    scale = getattr(config, "query_pre_attn_scalar", 256)
    if config.model_type == "gemma2" and (scale, head) != (256, 256):
        raise ValueError(f"{_WHAT}: head_dim is {head} and query_pre_attn_scalar {scale}; readers take 256 for both")
    if config.model_type == "gemma2":
        caps = config.attn_logit_softcapping, config.final_logit_softcapping
        kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(config.num_hidden_layers)]
        if caps != (50.0, 30.0) or list(getattr(config, "layer_types", None) or kinds) != kinds:
            raise ValueError(
                f"{_WHAT}: the softcaps are {caps} and the layers {config.layer_types}; readers take 50 and 30, and "
                "windows in every other layer"
            )


def _pair(value: Any) -> Pair:
    if isinstance(value, str):
        raw = value.encode()
        return Pair(STRING, 1, struct.pack("<Q", len(raw)) + raw, value)
    kind, code = {bool: (_BOOL, "?"), float: (_FLOAT32, "f")}.get(type(value), (_UINT32, "I"))
    return Pair(kind, 1, struct.pack("<" + code, value), value)


# ---- tensors --------------------------------------------------------------------------------------------------------


def _share(embedding: Any, head: Any) -> bool:
    if isinstance(embedding, Quantized) or isinstance(head, Quantized):
        if not (isinstance(embedding, Quantized) and isinstance(head, Quantized)):
            return False
        pairs = zip(embedding.qweight.tensors.values(), head.qweight.tensors.values(), strict=False)
        return embedding.weight_format == head.weight_format and all(a is b or torch.equal(a, b) for a, b in pairs)
    return head is None or head.weight is embedding.weight or torch.equal(head.weight, embedding.weight)


def _places(model: Any, architecture: str, type: str | None) -> Iterator[Place]:
    coded = {path: m for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Quantized)}
    dense = dict(model.named_parameters(remove_duplicate=False))
    expected = [*dense, *(f"{path}.weight" for path in coded)]
    layers = model.config.get_text_config().num_hidden_layers
    file_names = {target: name for name, target in _names(architecture, layers, expected).items()}
    experts = expert_places((*dense, *coded))
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and not _share(model.get_input_embeddings(), model.get_output_embeddings()):
        raise ValueError(
            f"{_WHAT}: config.tie_word_embeddings is set, and lm_head has a weight of its own: readers would tie it to "
            "the embedding. Set it to False to write both"
        )
    for target, places in experts.items():
        held = coded.get(target, dense.get(target))
        if getattr(held, "transposed", False):
            raise ValueError(f"{_WHAT}: {target} is transposed, which is written of no architecture yet")
        for name, part in places:
            yield _of_experts(held, target, name, part, type)
    for target in expected:
        path = target.removesuffix(".weight")
        if tied and target == "lm_head.weight" or target in experts or path in experts:
            continue
        if target not in file_names:
            raise ValueError(f"{_WHAT}: a GGUF file of the architecture {architecture} has no place for {target}")
        if path in coded and target not in dense:
            yield _of_codes(model, file_names[target], path, coded[path], type)
            continue
        p = dense[target]
        kind = "F32" if p.dim() < 2 else _type_of_numbers(type, _exact(p.dtype), p.shape[-1])
        shape = tuple(p.shape)
        if file_names[target].endswith(".ffn_gate_inp_shexp.weight"):  # one row, a vector in files
            shape, kind = shape[1:], "F32"
        yield Place(file_names[target], shape, BLOCK_TYPES[kind].number, target, False)


def _exact(dtype: torch.dtype) -> str:
    return {torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtype, "F32")


def _type_of_numbers(type: str | None, exact: str, length: int) -> str:
    kind = type or exact
    return "F16" if kind not in ("F32", "F16", "BF16") and length % BLOCK_TYPES[kind].block else kind


def _type_of_codes(module: Any) -> str | None:
    """The type of blocks that holds a weight's codes as they are."""
    config = module.weight_format
    if getattr(module.qweight, "channel", None) is not None:
        return None
    if isinstance(config, GGUFBlocks):
        return config.type
    if config.name == "q4_1":
        return "Q4_1" if blocks_of("Q4_0", module.qweight.tensors) is None else "Q4_0"
    return {"q8_0": "Q8_0", "mxfp4": "MXFP4"}.get(config.name)


def _of_codes(model: nn.Module, name: str, path: str, module: Any, type: str | None) -> Place:
    """A layer in codes: as they are where a type of blocks holds them, else as numbers."""
    shape = tuple(module.qweight.shape)
    if (kind := _type_of_codes(module)) is not None:
        return Place(name, shape, BLOCK_TYPES[kind].number, path, True, _order(model, name, shape[0]))
    return Place(name, shape, BLOCK_TYPES[_type_of_numbers(type, "F32", shape[-1])].number, f"{path}.weight", False)


def _of_experts(held: Any, target: str, name: str, part: tuple[int, int], type: str | None) -> Place:
    """One of the matrices that lie one below the other in the weight of each expert."""
    coded = isinstance(held, Quantized)
    e, n, k = (held.num_experts, held.out_features // held.num_experts, held.in_features) if coded else held.shape
    kind = _type_of_codes(held) if coded else None
    number = BLOCK_TYPES[kind or _type_of_numbers(type, "F32" if coded else _exact(held.dtype), k)].number
    return Place(name, (e, n // part[1], k), number, target, kind is not None, None, part)


def _order(model: Any, name: str, rows: int) -> torch.Tensor | None:
    """The row of the file that becomes each row of the weight, as transformers reads it."""
    from ._write import processor

    found = processor(model, _ARCHITECTURES[model.config.get_text_config().model_type][0])(
        name, np.arange(rows, dtype=np.int64)[:, None]
    )[:, 0]
    return None if torch.equal(found, torch.arange(rows, dtype=torch.int64, device="cpu")) else found
