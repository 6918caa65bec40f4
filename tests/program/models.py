"""Tiny language models of transformers that decode with a cache: those of `architectures`, with what it takes."""

from __future__ import annotations

import architectures
import pytest
import torch
from torch import nn

# What tiny configurations need besides the common sizes.
MORE = {"is_decoder": True, "rotary_dim": 8, "default_language": "en_XX", "hc_mult": 2}
# Families whose heads have a part that is rotated and one that is not: `head_dim` is that of the first.
ROTATED_PART = {"head_dim": 8}


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
