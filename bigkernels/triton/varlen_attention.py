"""Packed attention on GPUs: the kernels and launches of `attention`, with the ends of the sequences."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import varlen_attention as op
from ..ops.registry import nondeterministic
from .attention import _rows, _serves, prepare, run_backward, run_forward


def _call(q, k, v, cu_q, cu_k, alibi_slopes, prefix_lengths, seed, max_q, max_k, *options):
    vectors = (t if t is None else t.contiguous() for t in (alibi_slopes, prefix_lengths, seed, cu_q, cu_k))
    return prepare(q, k, v, None, None, *vectors, cu_q.shape[0] - 1, max_q, max_k, *options)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    op._check(q, k, v, cu_q, cu_k, alibi_slopes, sinks, prefix_lengths, max_q, max_k)
    options = (max_q, max_k, left, right, scale, softcap, dropout_p)
    if not _serves(q, k, v) or cu_q.shape[0] < 2 or not max_q:
        return op._fwd_fallback(q, k, v, cu_q, cu_k, alibi_slopes, sinks, prefix_lengths, seed, *options)
    # Tokens outside of every sequence belong to no program.
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    q, k, v = _rows(q, k, v)
    sinks = None if sinks is None else sinks.contiguous()
    call = _call(q, k, v, cu_q, cu_k, alibi_slopes, prefix_lengths, seed, *options)
    run_forward(call, q, k, v, sinks, out, lse)
    return out, lse


def infer(*args) -> Tensor:
    return forward(*args)[0]


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (max_q, max_k, left, right, scale, softcap, dropout_p)
    if not _serves(q, k, v) or cu_q.shape[0] < 2 or not max_q or not max_k:
        return op._bwd_fallback(
            grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, alibi_slopes, sinks, prefix_lengths, seed, *options
        )
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    grad, q, k, v, out = _rows(grad, q, k, v, out)
    grad_lse, lse = (t if t is None else t.contiguous() for t in (grad_lse, lse))
    call = _call(q, k, v, cu_q, cu_k, alibi_slopes, prefix_lengths, seed, *options)
    dsinks = run_backward(call, grad, grad_lse, q, k, v, out, lse, sinks, dq, dk, dv, None, nondeterministic())
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles."""
    for heads, key_heads, size, everything in ((32, 8, 128, False), (16, 16, 64, False), (16, 4, 128, True)):
        q, k, v = (torch.empty(4096, h, size, dtype=dtype, device="meta") for h in (heads, key_heads, key_heads))
        out = torch.empty_like(q)
        lse = torch.empty(heads, 4096, device="meta", dtype=torch.float32)
        ends = torch.empty(9, dtype=torch.int32, device="meta")
        vector = torch.empty(heads, device="meta", dtype=torch.float32) if everything else None
        prefix = torch.empty(8, dtype=torch.int32, device="meta") if everything else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if everything else None
        rest = (ends, ends, vector, vector, prefix, seed, 1024, 1024, 255 if everything else -1, 0, 0.1,
                30.0 if everything else 0.0, 0.1 if everything else 0.0)  # fmt: skip
        yield forward, (q, k, v, *rest)
        yield backward, (out, lse if everything else None, q, k, v, out, lse, *rest)
