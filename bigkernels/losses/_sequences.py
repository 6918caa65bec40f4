"""Log probabilities of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ._shared import check_layout, check_range, check_shapes, kept_of, spread, sums, wide


def sequence_logprobs(
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    ld_alpha: float | None = None,
) -> Tensor:
    """Log probabilities of sequences from those of their tokens: the sums, or with `average` the means.

    Args:
        logprobs: (B, S), or (T,) with `cu_seqlens`.
        mask: of that shape, boolean or 0 and 1: which tokens count. Without it all do, and those that `linear_logprobs`
            ignores add 0 to a sum; a mean and `ld_alpha` need the mask, because they would be counted.
        cu_seqlens: (B + 1,), int32 or int64: the begin of each sequence in (T,), and the end of the last.
        average: divide by the number of tokens that count; 0 where there are none.
        ld_alpha: in [0, 1], for pairs, the chosen ones in the first half of the sequences: of the longer sequence of a
            pair, the tokens beyond the length of the shorter one count this much (LD-DPO, Liu et al. 2024,
            https://arxiv.org/abs/2409.06411). None and 1 count them as the others.

    Returns:
        (B,), differentiable.

    Raises:
        ValueError: shapes or values do not fit, or `average` or `ld_alpha` lacks a mask.
    """
    op = "sequence_logprobs"
    check_layout(op, "logprobs", logprobs, mask, cu_seqlens)
    for name, given in (("average", average), ("ld_alpha", ld_alpha is not None)):
        check_range(op, "mask", mask, f"given, as {name} is", mask is not None or not given)
    check_range(
        op, "ld_alpha", ld_alpha, "in [0, 1], without average", ld_alpha is None or (0 <= ld_alpha <= 1 and not average)
    )
    logprobs = wide(logprobs)
    if mask is None:
        return sums(logprobs, cu_seqlens)
    kept = mask.bool()
    logprobs = torch.where(kept, logprobs, 0)
    lengths = sums(kept.to(logprobs.dtype), cu_seqlens)
    if ld_alpha is not None:
        logprobs = torch.where(_beyond(op, kept, lengths, cu_seqlens), ld_alpha * logprobs, logprobs)
    total = sums(logprobs, cu_seqlens)
    return total / lengths.clamp_min(1) if average else total


def _beyond(op: str, kept: Tensor, lengths: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Which tokens come after as many as the shorter sequence of their pair has."""
    check_range(op, "ld_alpha", f"given for {lengths.shape[0]} sequences", "two a pair", lengths.shape[0] % 2 == 0)
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    position = kept.cumsum(-1)
    if cu_seqlens is not None:
        before = lengths.cumsum(0) - lengths
        position = position - spread(before, position, cu_seqlens)
    return position > spread(shorter, position, cu_seqlens)


def wpo_weights(
    logprobs: Tensor, log_sum_sq_probs: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """How much like the model's own a sequence is: the weights of weighted preference optimization (Zhou et al. 2024,
    https://arxiv.org/abs/2406.11827, with its alignment to what the model itself would sample)::

        w = exp(mean over tokens of (log p(token) - log(sum over the vocabulary of p^2)))

    A pair's weight, for `dpo_loss`, is the product of both: ``weights=w_chosen * w_rejected``.

    Args:
        logprobs: (B, S), or (T,) with `cu_seqlens`.
        log_sum_sq_probs: of that shape, by ``linear_logprobs(..., reports=("log_sum_sq_probs",))``.
        mask: of that shape, boolean or 0 and 1: which tokens count; None for all.
        cu_seqlens: (B + 1,), int32 or int64: the begin of each sequence in (T,), and the end of the last.

    Returns:
        (B,), constants. A sequence of no token has 1.

    Raises:
        ValueError: shapes do not fit.
    """
    op = "wpo_weights"
    check_shapes(op, "logprobs", logprobs, log_sum_sq_probs=log_sum_sq_probs)
    aligned = wide(logprobs.detach()) - log_sum_sq_probs.detach()
    mask = kept_of(mask, logprobs)
    return sequence_logprobs(aligned, mask, cu_seqlens=cu_seqlens, average=True).exp()
