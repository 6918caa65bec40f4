"""Samples of the attention operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._sample import Draw, Sample, strided

# The weights are rounded before they are multiplied. Backward works from the output and the logsumexp as forward
# rounded them, and the gradient of a query that sees one key is a difference of equals; PyTorch without fusion keeps
# the weights.
_CRITERION: dict[str, Any] = {"scale": "row", "gradient_scale": "tensor", "gradient_roundings": 6.0}


def _heads(
    draw: Draw, batch: int, heads: int, length: int, size: int, *, tokens_first: bool, scale: float = 1.0
) -> Tensor:
    """(B, H, S, D); with `tokens_first` (B, S, H, D) in memory, as a projection leaves it."""
    if tokens_first:
        return draw.normal(batch, length, heads, size, scale=scale).transpose(1, 2)
    return draw.normal(batch, heads, length, size, scale=scale)


def attention_sample(
    name: str,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    queries: int = 37,
    keys: int | None = None,
    size: int = 32,
    value_size: int | None = None,
    *,
    bias: tuple[int, ...] | None = None,
    mask: Callable[[Draw, int, int], Tensor] | None = None,
    alibi: bool = False,
    sinks: bool = False,
    prefix: list[int] | None = None,
    tokens_first: bool = True,
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
    scale: float = 1.0,
    **options: object,
) -> Sample:
    keys = queries if keys is None else keys

    def make(draw: Draw) -> dict[str, Tensor]:
        inputs = {
            "q": _heads(draw, batch, heads, queries, size, tokens_first=tokens_first, scale=scale),
            "k": _heads(draw, batch, groups, keys, size, tokens_first=tokens_first),
            "v": _heads(draw, batch, groups, keys, value_size or size, tokens_first=tokens_first),
        }
        inputs = {name: arrange(t) for name, t in inputs.items()}
        if bias is not None:
            inputs["bias"] = draw.normal(*bias)
        if mask is not None:
            inputs["mask"] = mask(draw, queries, keys)
        if alibi:
            inputs["alibi_slopes"] = draw.slopes(heads)
        if sinks:
            inputs["sinks"] = draw.normal(heads)
        if prefix is not None:
            inputs["prefix_lengths"] = torch.tensor(prefix, dtype=torch.int32, device=draw.device)
        return inputs

    differentiable = ("q", "k", "v") + ("bias",) * (bias is not None) + ("sinks",) * sinks
    return Sample("attention", name, make, options, differentiable, **_CRITERION)


def _random_mask(draw: Draw, queries: int, keys: int) -> Tensor:
    """Every key is hidden from a third of the queries, and two queries see nothing."""
    mask = draw.integers(3, queries, keys) > 0
    mask[1::19] = False
    return mask


def _padding_mask(draw: Draw, queries: int, keys: int) -> Tensor:
    """The first keys of the second of two batches are padding."""
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool, device=draw.device)
    mask[1, ..., : keys // 3] = False
    return mask


def _empty_mask(draw: Draw, queries: int, keys: int) -> Tensor:
    return torch.zeros(queries, keys, dtype=torch.bool, device=draw.device)


ATTENTION = [
    attention_sample("plain"),
    attention_sample("causal", causal=True),
    attention_sample("causal, long", 1, 2, 1, 300, size=64, causal=True, tokens_first=False),
    attention_sample("one head", 1, 1, 1, 65, size=64, causal=True),
    attention_sample("one key head", 2, 6, 1, 33, size=40, causal=True),
    attention_sample("as many key heads", 2, 3, 3, 33, size=16, tokens_first=False),
    attention_sample("fewer queries, causal", queries=19, keys=53, causal=True),
    attention_sample("fewer keys, causal", queries=53, keys=19, causal=True),
    attention_sample("one query", 2, 8, 2, 1, 130, 64, causal=True),
    attention_sample("few queries", 2, 8, 2, 5, 77, 64, causal=True, return_lse=True),
    # With a sink: the gradients of q and k would be zero, exactly in PyTorch and but for rounding in a fused kernel.
    attention_sample("one key", 2, 4, 2, 9, 1, 16, sinks=True),
    attention_sample("no queries", 1, 2, 1, 0, 5, 16),
    attention_sample("no keys", 1, 2, 1, 5, 0, 16, sinks=True),
    attention_sample("head of 8", 1, 2, 2, 40, size=8, causal=True),
    attention_sample("head of 72", 1, 2, 1, 70, size=72, causal=True),
    attention_sample("head of 80", 1, 2, 1, 70, size=80),
    attention_sample("head of 96", 1, 2, 1, 70, size=96, causal=True),
    attention_sample("head of 128", 1, 4, 2, 113, size=128, causal=True),
    attention_sample("head of 192, values of 128", 1, 2, 1, 50, size=192, value_size=128, causal=True),
    attention_sample("head of 256", 1, 2, 1, 50, size=256),
    attention_sample("odd head of 13, values of 5", 1, 2, 2, 21, size=13, value_size=5),
    attention_sample("scale", scale=3.0, causal=True).with_options(scale=0.3),
    attention_sample("window", 1, 2, 1, 150, size=32, window=(20, 9)),
    attention_sample("causal window", 1, 2, 1, 150, size=32, causal=True, window=(33, -1)),
    attention_sample("window narrower than a block", 1, 2, 1, 640, size=16, causal=True, window=(20, 0)),
    attention_sample("window, fewer queries", 1, 2, 1, 40, 90, 32, causal=True, window=(7, 0)),
    attention_sample("softcap", softcap=2.0, causal=True, scale=2.0),
    attention_sample("bias", bias=(2, 4, 37, 37)),
    attention_sample("bias of all batches", 3, bias=(1, 4, 37, 37), causal=True),
    attention_sample("bias of all heads", bias=(2, 1, 37, 37)),
    attention_sample("bias of two dimensions", bias=(37, 37)),
    attention_sample("bias a key", bias=(2, 1, 1, 37)),
    attention_sample("mask", mask=_random_mask),
    attention_sample("mask and causal", mask=_random_mask, causal=True),
    attention_sample("padding", mask=_padding_mask, causal=True),
    attention_sample("nothing seen", mask=_empty_mask),
    attention_sample("alibi", alibi=True, causal=True),
    attention_sample("alibi both ways", alibi=True, queries=20, keys=47),
    attention_sample("sinks", sinks=True, causal=True),
    attention_sample("sinks and mask", sinks=True, mask=_random_mask, return_lse=True),
    attention_sample("prefix", prefix=[11, 0], causal=True),
    attention_sample("prefix and window", prefix=[5, 40], causal=True, window=(6, -1), queries=70),
    attention_sample("dropout", dropout_p=0.2, causal=True, queries=70),
    attention_sample("dropout and bias", dropout_p=0.5, bias=(1, 4, 37, 37)),
    attention_sample("lse", return_lse=True, causal=True),
    attention_sample("large scores", scale=30.0, causal=True),
    attention_sample("strided elements", arrange=strided, causal=True),
    attention_sample("everything", 2, 4, 2, 71, 90, 40, 24, bias=(1, 4, 71, 90), mask=_random_mask, alibi=True,
                     sinks=True, prefix=[12, 3], causal=True, window=(30, -1), softcap=3.0, dropout_p=0.1,
                     return_lse=True),
]  # fmt: skip


def varlen_sample(
    name: str,
    queries: list[int],
    keys: list[int] | None = None,
    heads: int = 4,
    groups: int = 2,
    size: int = 32,
    value_size: int | None = None,
    *,
    alibi: bool = False,
    sinks: bool = False,
    prefix: list[int] | None = None,
    dtype: torch.dtype = torch.int32,
    rest: int = 0,
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
    **options: object,
) -> Sample:
    keys = queries if keys is None else keys

    def make(draw: Draw) -> dict[str, Tensor]:
        def ends(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0).to(draw.device, dtype)

        inputs = {
            "q": arrange(draw.normal(sum(queries) + rest, heads, size)),
            "k": arrange(draw.normal(sum(keys) + rest, groups, size)),
            "v": arrange(draw.normal(sum(keys) + rest, groups, value_size or size)),
            "cu_seqlens_q": ends(queries),
            "cu_seqlens_k": ends(keys),
        }
        if alibi:
            inputs["alibi_slopes"] = draw.slopes(heads)
        if sinks:
            inputs["sinks"] = draw.normal(heads)
        if prefix is not None:
            inputs["prefix_lengths"] = torch.tensor(prefix, dtype=dtype, device=draw.device)
        return inputs

    most = {"max_seqlen_q": max(queries, default=0), "max_seqlen_k": max(keys, default=0)}
    differentiable = ("q", "k", "v") + ("sinks",) * sinks
    return Sample("varlen_attention", name, make, most | options, differentiable, **_CRITERION)


VARLEN_ATTENTION = [
    varlen_sample("plain", [13, 40, 1, 27]),
    varlen_sample("causal", [13, 40, 1, 27], causal=True),
    varlen_sample("one sequence", [129], causal=True, heads=2, groups=1, size=64),
    varlen_sample("empty sequences", [0, 17, 0, 0, 30, 0], causal=True),
    varlen_sample("other lengths of keys", [5, 30, 0, 8], [20, 30, 7, 0], causal=True),
    varlen_sample("many short ones", [3, 1, 2, 7, 5, 1, 4, 9, 6, 8, 2, 3], causal=True, heads=6, groups=2, size=40),
    varlen_sample("values of another size", [33, 18], size=48, value_size=24, causal=True),
    varlen_sample("tokens after the last sequence", [12, 20], rest=5, causal=True),
    varlen_sample("int64", [12, 20], dtype=torch.int64, prefix=[4, 0], causal=True),
    varlen_sample("no tokens", [0, 0]),
    varlen_sample("strided elements", [9, 14], arrange=strided),
    varlen_sample(
        "everything",
        [40, 70, 3],
        [60, 70, 9],
        alibi=True,
        sinks=True,
        prefix=[6, 0, 2],
        causal=True,
        window=(25, -1),
        softcap=3.0,
        dropout_p=0.1,
        return_lse=True,
        size=48,
    ),
]
