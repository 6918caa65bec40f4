"""Log probabilities of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ._shared import check_layout, check_range, sums, wide


def sequence_logprobs(
    logprobs: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None, average: bool = False
) -> Tensor:
    """Log probabilities of sequences from those of their tokens: the sums, or with `average` the means.

    Args:
        logprobs: (B, S), or (T,) with `cu_seqlens`.
        mask: of that shape, boolean or 0 and 1: which tokens count. Without it all do, and those that `linear_logprobs`
            ignores add 0 to a sum; a mean needs the mask, because they would be counted.
        cu_seqlens: (B + 1,), int32 or int64: the begin of each sequence in (T,), and the end of the last.
        average: divide by the number of tokens that count; 0 where there are none.

    Returns:
        (B,), differentiable.

    Raises:
        ValueError: shapes do not fit, or `average` lacks a mask.
    """
    op = "sequence_logprobs"
    check_layout(op, "logprobs", logprobs, mask, cu_seqlens)
    check_range(op, "mask", mask, "given, as average is", mask is not None or not average)
    logprobs = wide(logprobs)
    if mask is None:
        return sums(logprobs, cu_seqlens)
    kept = mask.bool()
    total = sums(torch.where(kept, logprobs, 0), cu_seqlens)
    return total / sums(kept.to(total.dtype), cu_seqlens).clamp_min(1) if average else total
