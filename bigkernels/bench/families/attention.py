"""Causal attention in training: lengths, head sizes, a sliding window, and packed sequences."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ... import functional
from ..._samples import Draw
from ...ops import use
from ..case import Case, Settings
from ..operators import operator_case, upstream
from ..peers import cudnn, flash_attention, flash_attention_4, flex, on_cuda

HEADS = 16
OURS_ALONE = "bigkernels by its own kernels"  # where the table of routes sends calls to PyTorch's
_LARGEST_EAGER = 2048  # its scores take gigabytes beyond
_LARGEST_COMPILED = 512
_LARGEST_DENSE = 8192  # SDPA with a dense mask takes half a minute a step beyond
_ROWS = 512  # queries that the check computes at once
_PACKED = (1024, 37, 512, 891, 130, 640, 257, 64, 777, 384, 1000, 90, 450, 702, 333, 901)
_PACKED_QUICK = (30, 7, 19)


def _ours_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with use("triton"):
        return functional.attention(q, k, v, causal=True)


def visible(length: int, left: int = -1) -> int:
    """How many (query, key) pairs causal attention computes, where a query sees `left` keys before its own."""
    window = length if left < 0 else min(length, left + 1)
    return window * (window + 1) // 2 + (length - window) * window


def flops(pairs: int, size: int, *, backward: bool) -> int:
    """Of all heads: two products forward and five backward, of 2 operations an element and pair."""
    return (7 if backward else 2) * 2 * size * HEADS * pairs


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As models without SDPA write it: scores rounded to the dtype, the softmax in float32."""
    length = q.shape[2]
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(hidden, torch.finfo(q.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def first_head(result: Tensor) -> Tensor:
    """Of (B, H, S, D) and (T, H, D) alike: heads do not know of each other, so one stands for all in the check."""
    return result[:, :1]


def one_sequence(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, left: int = -1) -> tuple[Tensor, ...]:
    """Causal attention (B, H, S, D) by the reference, and with `grad` its gradients, a few queries at a time."""
    out = torch.empty_like(q)
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    for begin in range(0, q.shape[2], _ROWS):
        end = min(begin + _ROWS, q.shape[2])
        first = 0 if left < 0 else max(0, begin - left)
        spans = (begin, first, first)
        leaves = [
            t[:, :, a:end].detach().requires_grad_(grad is not None) for t, a in zip((q, k, v), spans, strict=True)
        ]
        with use("reference"), torch.set_grad_enabled(grad is not None):
            # The last query is aligned to the last key, so that leaving out what these queries cannot see is no change.
            some = functional.attention(*leaves, causal=True, window=(left, 0))
        out[:, :, begin:end] = some.detach()
        if grad is not None:
            added = torch.autograd.grad(some, leaves, grad[:, :, begin:end])
            for total, a, g in zip(grads, spans, added, strict=True):
                total[:, :, a:end] += g
    return (out, *grads) if grad is not None else (out,)


def _checked(
    made: Mapping[str, Tensor], *, wide: torch.dtype, ends: list[int] | None, backward: bool, left: int = -1
) -> dict[str, Tensor]:
    """The results of the first head, computed in `wide`; unless that is float64, rounded to the dtype of the inputs."""
    dtype = made["q"].dtype
    grad = first_head(upstream((made["q"],))[0]).to(wide) if backward else None
    q, k, v = (first_head(made[name].detach()).to(wide) for name in "qkv")
    if ends is None:
        results = one_sequence(q, k, v, grad, left)
    else:
        parts = [
            one_sequence(*(t if t is None else t[a:b].transpose(0, 1)[None] for t in (q, k, v, grad)))
            for a, b in zip(ends, ends[1:], strict=False)
        ]
        results = tuple(torch.cat([t[0].transpose(0, 1) for t in same]) for same in zip(*parts, strict=True))
    names = ("out0", "grad q", "grad k", "grad v")
    return {name: t if wide == torch.float64 else t.to(dtype) for name, t in zip(names, results, strict=False)}


def _case(
    settings: Settings,
    name: str,
    dtype: torch.dtype,
    *,
    backward: bool,
    ends: list[int] | None = None,
    left: int = -1,
    **options,
) -> Case:
    checked = partial(_checked, ends=ends, backward=backward, left=left)
    return operator_case(
        "attention",
        name,
        settings=settings,
        dtype=dtype,
        differentiable=("q", "k", "v") if backward else (),
        exact=partial(checked, wide=torch.float64),
        plain=partial(checked, wide=torch.float32),
        part=first_head,
        metric="TFLOP/s",
        **options,
    )


def causal(
    settings: Settings, length: int, size: int, dtype: torch.dtype, *, backward: bool, with_flex: bool = False
) -> Case:
    peers = flash_attention(
        lambda peer: (
            lambda q, k, v: peer.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True).transpose(1, 2)
        )
    )
    peers |= flash_attention_4(
        lambda call: lambda q, k, v: call(*(t.transpose(1, 2) for t in (q, k, v)), causal=True).transpose(1, 2)
    )
    peers |= cudnn(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    peers |= on_cuda(OURS_ALONE, lambda: _ours_alone)
    if with_flex:
        peers = peers | flex(settings, _flex(length, lambda b, h, i, j: i >= j))
    return _case(
        settings,
        f"S {length}, D {size}",
        dtype,
        backward=backward,
        inputs=partial(_heads, length, size),
        ours=lambda q, k, v: functional.attention(q, k, v, causal=True),
        eager=eager if length <= _LARGEST_EAGER else None,
        builtin=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        compiled=length <= _LARGEST_COMPILED,
        peers=peers,
        flops=flops(visible(length), size, backward=backward),
    )


def windowed(
    settings: Settings,
    length: int,
    size: int,
    dtype: torch.dtype,
    *,
    window: int,
    backward: bool,
    with_flex: bool = False,
) -> Case:
    """Each query sees itself and the window - 1 keys before it."""
    left = window - 1
    mask: list[Tensor] = []  # made once, before the timing

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not mask:
            at = torch.arange(length, device=q.device, dtype=torch.int64)
            ago = at[:, None] - at
            mask.append((ago >= 0) & (ago <= left))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[0])

    peers = flash_attention(
        lambda peer: (
            lambda q, k, v: peer.flash_attn_func(
                *(t.transpose(1, 2) for t in (q, k, v)), causal=True, window_size=(left, 0)
            ).transpose(1, 2)
        )
    )
    peers |= flash_attention_4(
        lambda call: (
            lambda q, k, v: call(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, window_size=(left, 0)).transpose(
                1, 2
            )
        )
    )
    if with_flex:
        peers = peers | flex(settings, _flex(length, lambda b, h, i, j: (i >= j) & (i - j <= left)))
    return _case(
        settings,
        f"window {window}, S {length}, D {size}",
        dtype,
        backward=backward,
        left=left,
        inputs=partial(_heads, length, size),
        ours=lambda q, k, v: functional.attention(q, k, v, causal=True, window=(left, 0)),
        eager=None,
        builtin=dense if length <= _LARGEST_DENSE else None,
        peers=peers,
        flops=flops(visible(length, left), size, backward=backward),
    )


def packed(settings: Settings, lengths: tuple[int, ...], size: int, dtype: torch.dtype, *, backward: bool) -> Case:
    ends = [0, *torch.tensor(lengths, dtype=torch.int64, device="cpu").cumsum(0).tolist()]
    longest = max(lengths)

    def inputs(draw: Draw) -> dict[str, Tensor]:
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=draw.device)
        return {name: draw.normal(ends[-1], HEADS, size) for name in "qkv"} | {"cu_seqlens": cu_seqlens}

    def ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return functional.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)

    def loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        outs = [
            F.scaled_dot_product_attention(*(t[a:b].transpose(0, 1)[None] for t in (q, k, v)), is_causal=True)
            for a, b in zip(ends, ends[1:], strict=False)
        ]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    return _case(
        settings,
        f"packed {len(lengths)} x {min(lengths)} to {longest}, D {size}",
        dtype,
        backward=backward,
        ends=ends,
        inputs=inputs,
        ours=ours,
        eager=None,
        builtin=loop,
        peers=flash_attention(
            lambda peer: (
                lambda q, k, v, cu_seqlens: peer.flash_attn_varlen_func(
                    q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True
                )
            )
        ),
        flops=flops(sum(map(visible, lengths)), size, backward=backward),
    )


def _flex(length: int, sees: Callable) -> Callable:
    def make(flex: Callable) -> Callable:
        mask: list[BlockMask] = []  # made once, before the timing

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not mask:
                mask.append(create_block_mask(sees, None, None, length, length, device=q.device))
            return flex(q, k, v, block_mask=mask[0])

        return call

    return make


def _heads(length: int, size: int, draw: Draw) -> dict[str, Tensor]:
    """(B, S, H, D) in memory, as the projections leave them."""
    return {name: draw.normal(1, length, HEADS, size).transpose(1, 2) for name in "qkv"}


def cases(settings: Settings) -> list[Case]:
    bf16 = torch.bfloat16
    ways = (False, True)
    if settings.quick:
        cases = [
            causal(settings, 64, size, dtype, backward=b)
            for size, dtype in ((32, bf16), (40, torch.float32))
            for b in ways
        ]
        cases += [windowed(settings, 640, 16, bf16, window=100, backward=b) for b in ways]
        return cases + [packed(settings, _PACKED_QUICK, 32, bf16, backward=b) for b in ways]
    cases = [
        causal(settings, length, size, bf16, backward=b, with_flex=length == 2048 and not b)
        for size in (64, 128)
        for length in (512, 2048, 8192)
        for b in ways
    ]
    cases += [causal(settings, 2048, size, torch.float32, backward=b) for size in (64, 128) for b in ways]
    cases += [causal(settings, 2048, size, bf16, backward=b) for size in (72, 80, 96) for b in ways]
    cases += [
        windowed(settings, length, 128, bf16, window=512, backward=b, with_flex=length == 8192 and not b)
        for length in (2048, 4096, 8192, 16384)
        for b in ways
    ]
    return cases + [packed(settings, _PACKED, 128, bf16, backward=b) for b in ways]
