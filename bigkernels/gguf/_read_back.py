"""Whether a model computes what readers of its file will: numbers of its modules that no tensor holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._config import config_of
from ._load import Unfilled, open_file

_WHAT = "bigkernels.save_gguf"
# What changes no output in evaluation, or is a module's own bookkeeping.
_IRRELEVANT = frozenset(
    "training gradient_checkpointing attention_dropout dropout p inplace padding_idx max_seq_len_cached "
    "original_max_seq_len max_norm norm_type scale_grad_by_freq sparse in_features out_features num_embeddings "
    "embedding_dim vocab_size name_or_path".split()
)
_OF_CONFIG = (
    "hidden_act hidden_activation rms_norm_eps layer_norm_eps norm_epsilon layer_norm_epsilon rope_parameters "
    "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar sliding_window layer_types "
    "num_experts_per_tok norm_topk_prob scoring_func n_head num_attention_heads num_key_value_heads head_dim "
    "scale_attn_weights scale_attn_by_inverse_layer_idx partial_rotary_factor logit_scale"
).split()
_Scalar = (int, float, bool, str, type(None))


def check_read_back(model: Any, path: Path) -> None:
    """Compare a model with the one that a written file makes, apart from its tensors.

    A number may have been edited in a module (`norm.eps`, `attention.scaling`), or in the configuration alone, which
    modules read when they are made. A file has the configuration's.

    Raises:
        ValueError: they differ; the module and its attribute are named.
    """
    file = open_file(path)
    config = config_of(file)
    from transformers import AutoModelForCausalLM

    try:
        with Unfilled():
            read = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # of numbers that fit no model it raises what it likes
        raise ValueError(f"{_WHAT}: readers of the file make no model of its metadata: {error}") from error
    for name in _OF_CONFIG:
        ours, theirs = (getattr(c.get_text_config(), name, None) for c in (model.config, read.config))
        if not _same(ours, theirs):
            raise ValueError(f"{_WHAT}: config.{name} is {ours!r}, and readers of the file take {theirs!r}")
    modules = dict(model.named_modules())
    for name, expected in read.named_modules():
        if (module := modules.get(name)) is not None:
            for key, ours, theirs in _differing(module, expected):
                where = f"{name}.{key}" if name else key
                raise ValueError(
                    f"{_WHAT}: {where} is {ours!r}, and readers of the file take {theirs!r}: it has no place for that"
                )


def _differing(module: nn.Module, expected: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    ours, theirs = vars(module), vars(expected)
    for key, value in theirs.items():
        if key.startswith("_") or key in _IRRELEVANT or key not in ours or not isinstance(value, _Scalar):
            continue
        if not _same(ours[key], value):
            yield key, ours[key], value
    bare = not any((expected._parameters, expected._buffers, expected._modules))
    if bare and not isinstance(module, type(expected)):  # an activation
        yield "class", type(module).__name__, type(expected).__name__
    for key, parameter in expected.named_parameters(recurse=False):
        held = getattr(module, key, None)
        if isinstance(held, torch.Tensor) and held.shape != parameter.shape:
            yield f"{key}.shape", tuple(held.shape), tuple(parameter.shape)
    for key, buffer in expected.named_buffers(recurse=False):
        held = getattr(module, key, None)
        if isinstance(held, torch.Tensor) and not buffer.is_meta and not _close(held, buffer):
            yield key, "changed", "the usual values"


def _close(held: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a buffer has the expected values, or those that a cast of the model rounds them to."""
    if held.shape != expected.shape:
        return False
    held = held.detach().cpu()
    wide = held.to(torch.float64)
    if torch.allclose(wide, expected.to(torch.float64), rtol=1e-3, atol=1e-6):
        return True
    return any(
        torch.allclose(wide, expected.to(dtype).to(torch.float64), rtol=1e-6, atol=1e-9)
        for dtype in {held.dtype, torch.bfloat16, torch.float16}
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):  # a file holds float32
        numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
        return numbers and abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(_same(a.get(key), b.get(key)) for key in {*a, *b})
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return list(a) == list(b)
    return bool(a == b)
