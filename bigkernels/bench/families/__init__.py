"""The benchmark families, one file each with `cases(settings)`. A new family adds its name here."""

from __future__ import annotations

import importlib

from ..case import Case, Settings

# What the measured operators do, for tables and plots.
FAMILIES = {
    "rms_norm": "RMSNorm, with and without the residual addition",
    "layer_norm": "LayerNorm, with and without the residual addition",
    "rope": "rotary position embedding of queries and keys",
    "glu": "gated linear units",
    "mlp": "MLPs without a gate",
    "group_norm": "GroupNorm and SiLU",
    "batch_norm": "BatchNorm and ReLU, with and without a residual between them",
    "cross_entropy": "cross entropy over large vocabularies",
    "linear_cross_entropy": "the loss of a language model from its hidden states",
    "attention": "causal attention, 16 heads",
    "decode": "one new token over a cache, 32 query heads on 8",
    "linear": "linear layers",
    "quantized": "linear layers with quantized weights",
    "optimizers": "a step of an optimizer, 100 million parameters",
    "checkpointing": "less kept for backward: eight Llama blocks",
    "small": "one token: the cost of a call",
    "generation": "a language model reads a prompt and generates",
    "encoders": "texts, images and speech are encoded",
    "model": "a Llama model at the size of SmolLM2-135M",
}


def cases(family: str, settings: Settings) -> list[Case]:
    """The cases of one family.

    Raises:
        ValueError: there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no benchmark family {family!r}; there are {', '.join(FAMILIES)}")
    return importlib.import_module(f"{__name__}.{family}").cases(settings)
