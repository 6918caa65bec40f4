"""A GGUF file of a model that came from none: what its metadata says, and where each tensor goes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..nn._quantized import Quantized
from ..quantization import GGUFBlocks
from ..quantization._ggml import BLOCK_TYPES
from ._codes import blocks_of
from ._file import STRING, Pair
from ._source import Place, Source
from ._state import _names

_WHAT = "bigkernels.save_gguf"
_UINT32, _FLOAT32, _BOOL = 4, 6, 7

# Of a configuration's `model_type`: the file's architecture, and what its metadata has beyond what all have.
_More = Callable[[Any, int], dict[str, Any]]
_ARCHITECTURES: dict[str, tuple[str, _More]] = {
    "llama": ("llama", lambda c, head: {"rope.dimension_count": head}),
    "mistral": ("llama", lambda c, head: {"rope.dimension_count": head}),
    "qwen2": ("qwen2", lambda c, head: {}),
    "qwen3": ("qwen3", lambda c, head: {"attention.key_length": head, "attention.value_length": head}),
    "gemma2": (
        "gemma2",
        lambda c, head: {
            "attention.key_length": head,
            "attention.value_length": head,
            "attention.sliding_window": c.sliding_window,
            "attn_logit_softcapping": float(c.attn_logit_softcapping),
            "final_logit_softcapping": float(c.final_logit_softcapping),
        },
    ),
}
# What a file cannot say, by attributes of the configuration, and what they are where it need not.
_UNSAID = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
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
    _check(config, rope, head)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    } | more(config, head)
    found = {
        "general.architecture": _pair(architecture),
        "general.name": _pair(architecture),
        "general.quantization_version": _pair(2),
    }
    return found | {f"{architecture}.{key}": _pair(value) for key, value in values.items()}


def _check(config: Any, rope: Any, head: int) -> None:
    for name, value in _UNSAID.items():
        if getattr(config, name, value) not in (value, None):
            raise ValueError(
                f"{_WHAT}: {name} is {getattr(config, name)!r}, which no GGUF file of a {config.model_type} says"
            )
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{_WHAT}: the rotary embedding is {rope}; only the usual one is written")
    if config.model_type in ("llama", "mistral", "qwen2") and head * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"{_WHAT}: head_dim is {head}, and hidden_size {config.hidden_size} of "
            f"{config.num_attention_heads} heads; readers take their quotient"
        )
    if config.model_type == "mistral" and config.sliding_window is not None:
        raise ValueError(f"{_WHAT}: sliding_window is {config.sliding_window}, which no GGUF file of a mistral says")
    usual = {"gemma2": "gelu_pytorch_tanh"}.get(config.model_type, "silu")
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    if act != usual:
        raise ValueError(f"{_WHAT}: the activation is {act}, and readers take {usual}")
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
    if config.model_type == "qwen3" and head != 128:
        raise ValueError(f"{_WHAT}: head_dim is {head}; transformers takes 128, whatever the file says")


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
    file_names = {
        target: name for name, target in _names(architecture, model.config.num_hidden_layers, expected).items()
    }
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and not _share(model.get_input_embeddings(), model.get_output_embeddings()):
        raise ValueError(
            f"{_WHAT}: config.tie_word_embeddings is set, and lm_head has a weight of its own: readers would tie it to "
            "the embedding. Set it to False to write both"
        )
    for target in expected:
        if tied and target == "lm_head.weight":
            continue
        if target not in file_names:
            raise ValueError(f"{_WHAT}: a GGUF file of the architecture {architecture} has no place for {target}")
        path = target.removesuffix(".weight")
        if path in coded and target not in dense:
            yield from _of_codes(model, file_names[target], path, coded[path], type)
            continue
        p = dense[target]
        kind = "F32" if p.dim() < 2 else type or _exact(p.dtype)
        if kind not in ("F32", "F16", "BF16") and p.shape[-1] % BLOCK_TYPES[kind].block:
            kind = "F16"
        yield Place(file_names[target], tuple(p.shape), BLOCK_TYPES[kind].number, target, False)


def _exact(dtype: torch.dtype) -> str:
    return {torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtype, "F32")


def _of_codes(model: nn.Module, name: str, path: str, module: Any, type: str | None) -> Iterator[Place]:
    """A layer in codes: as they are where a type of blocks holds them, else as numbers."""
    weight, config = module.qweight, module.weight_format
    shape, kind = tuple(weight.shape), None
    if getattr(weight, "channel", None) is None:
        if isinstance(config, GGUFBlocks):
            kind = config.type
        elif config.name in ("q4_1", "q8_0", "mxfp4"):
            kind = {"q8_0": "Q8_0", "mxfp4": "MXFP4"}.get(config.name)
            if kind is None:
                kind = "Q4_1" if blocks_of("Q4_0", weight.tensors) is None else "Q4_0"
    if kind is not None:
        order = _order(model, name, shape[0])
        yield Place(name, shape, BLOCK_TYPES[kind].number, path, True, order)
        return
    kind = type or "F32"
    if kind not in ("F32", "F16", "BF16") and shape[-1] % BLOCK_TYPES[kind].block:
        kind = "F16"
    yield Place(name, shape, BLOCK_TYPES[kind].number, f"{path}.weight", False)


def _order(model: Any, name: str, rows: int) -> torch.Tensor | None:
    """The row of the file that becomes each row of the weight, as transformers reads it."""
    from ._write import processor

    found = processor(model, _ARCHITECTURES[model.config.get_text_config().model_type][0])(
        name, np.arange(rows, dtype=np.int64)[:, None]
    )[:, 0]
    return None if torch.equal(found, torch.arange(rows, dtype=torch.int64, device="cpu")) else found
