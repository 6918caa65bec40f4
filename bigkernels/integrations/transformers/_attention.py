"""Attention by name: ``attn_implementation="bigkernels"``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ...ops.attention import attention

_NAME = "bigkernels"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`bigkernels.functional.attention` with the arguments of transformers' attention functions.

    Args:
        query, key, value: (B, H, S, D), with fewer heads in key and value where they are grouped.
        attention_mask: boolean (True attends) or added to the scores; None for a causal module means causal.
        softcap, s_aux, position_bias: of the models that have them: a cap of scores, sinks (H,), and what is added to
            scores.

    Returns:
        (B, S, H, Dv), and None for the weights.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "bigkernels: attn_implementation='bigkernels' has no attention weights to give out; load the "
            "model with attn_implementation='eager' for output_attentions=True"
        )
    mask = bias = None
    if attention_mask is not None:
        mask, bias = (attention_mask, None) if attention_mask.dtype == torch.bool else (None, attention_mask)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    out = attention(
        query,
        key,
        value,
        causal=causal,
        scale=scaling,
        softcap=softcap,
        bias=bias,
        mask=mask,
        sinks=sinks,
        dropout_p=dropout,
    )
    return cast(Tensor, out).transpose(1, 2).contiguous(), None


def register_attention() -> None:
    AttentionInterface.register(_NAME, attention_forward)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
