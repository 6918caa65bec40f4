"""What a step program will take beside its model and its cache, told from the shapes of weights."""

from __future__ import annotations

import torch
from torch import nn

from ..nn.quantized import Quantized
from . import _layers

RUN = 256  # tokens of a run, as `_forward` cuts longer calls
OWN_PLACES = 8 << 20  # bytes of values up to which each has a place of its own (csrc/cpu/program_plan.cpp)
_LIVE = 3  # values of a layer that are there at once: what comes in, what is added to it, what is normed


def workspace(model: nn.Module, batch: int, tokens: int, keep: int, positions: int) -> int:
    """Bytes, about: the values of a run and its logits in float32, tokens made ready for products, and rotary tables.

    Args:
        model: a causal language model, on any device.
        tokens: of each of `batch` sequences in one call.
        keep: rows of logits that a sequence gets.
        positions: how many the rotary tables hold.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    width, vocabulary, pairs = 0, 0, []
    for module in model.modules():
        if _layers.is_linear(module):
            n, k = _layers.shape(module)
            if module is head:
                vocabulary = n
            else:
                pairs.append((n, k))
    tokens_of = getattr(model, "get_input_embeddings", lambda: None)()
    width = getattr(tokens_of, "embedding_dim", 0) or max((k for _, k in pairs), default=0)
    rows = batch * min(tokens, max(1, RUN // batch))
    values = 4 * rows * sum(n + k for n, k in pairs)  # what goes into products and comes out, each in its own place
    ready = 4 * rows * sum(k for _, k in pairs)
    if torch.get_num_threads() == 1 or (values > OWN_PLACES and rows > 1):
        # Places are used again: a layer's widest step, three products of the width and one, or the inner of a unit.
        inner = max((n for n, k in pairs if k == width), default=width)
        values = 4 * rows * (_LIVE * width + max(4 * width, inner + width))
        ready = 4 * rows * max((k for _, k in pairs), default=width)
    values = (values + ready) * (
        1 if tokens * batch <= rows else 2
    )  # the last run, which has logits, is of another shape
    angles = 2 * 4 * positions * _head(model)
    return values + 4 * batch * keep * vocabulary + angles


def panels(model: nn.Module) -> int:
    """Bytes, about: the copy of codes that steps of a few tokens read, where there is memory for it."""
    held = (m for m in model.modules() if isinstance(m, Quantized) and (_layers.is_linear(m) or hasattr(m, "experts")))
    rounded = (m.qweight for m in held if m.dtype != torch.float32 or m.weight_format.dynamic)
    return sum(w.nbytes for w in rounded if w.format.name != "fp8")


def _head(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    size = getattr(config, "head_dim", None)
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    return size if isinstance(size, int) else hidden // heads if heads and hidden else 0
