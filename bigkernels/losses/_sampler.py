"""Corrections for completions whose sampler is not quite the policy: another engine, other kernels, older weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ._shared import bounded, check_layout, check_name, check_range, check_shapes, kept_of, sums, wide

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def sampler_ratios(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    mode: str = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Tensor:
    """Importance ratios of a policy's probabilities to those that its sampler reported, for `grpo_loss`::

        r = exp(logprobs - sampler_logprobs)         "token_...": a number a token
        r = exp(sum over the sequence of it)         "sequence_...": a number a sequence

        "..._truncate"   r clamped to [clip_min, clip_max]     (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl)
        "..._mask"       r, and 0 where it is outside of them  (Liu et al. 2025, https://yingru.notion.site, on the
                         mismatch of training and inference; a token at a time: IcePop, arXiv 2510.18855)

    Modes and defaults are those of TRL's correction for vLLM.

    Args:
        logprobs: (B, S), or (T,) with `cu_seqlens`: by the policy that is trained, as it was when the completions were
            made (`old_logprobs` of `grpo_loss`).
        sampler_logprobs: of that shape, by the sampler. NaN where it reported none: there the ratio is 1.
        mask: of that shape, boolean or 0 and 1: which tokens count. The others' ratio is 1.
        cu_seqlens: (B + 1,), int32 or int64: the begin of each sequence in (T,), and the end of the last.
        mode: "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask".
        clip_max, clip_min: positive, `clip_min` the smaller one; None is no limit.

    Returns:
        A constant, of the shape of `logprobs` for tokens and (B,) for sequences.

    Raises:
        ValueError: shapes or values do not fit, or a "..._truncate" mode has no limit.
    """
    op = "sampler_ratios"
    check_layout(op, "logprobs", logprobs, mask, cu_seqlens)
    check_shapes(op, "logprobs", logprobs, sampler_logprobs=sampler_logprobs)
    check_name(op, "mode", mode, MODES)
    for name, value in (("clip_max", clip_max), ("clip_min", clip_min)):
        check_range(op, name, value, "positive or None", value is None or value > 0)
    limits = [v for v in (clip_min, clip_max) if v is not None]
    below = clip_min is None or clip_max is None or clip_min < clip_max
    check_range(op, "clip_min", clip_min, f"below clip_max, which is {clip_max}", below)
    check_range(op, "clip_max", None, f"a number, as mode is {mode!r}", bool(limits) or mode.endswith("mask"))
    difference = _difference(logprobs, sampler_logprobs, mask)
    if mode.startswith("sequence"):
        difference = sums(difference, cu_seqlens)
    ratio = bounded(difference).exp()
    if not limits:
        return ratio
    if mode.endswith("truncate"):
        return ratio.clamp(clip_min, clip_max)
    inside = ratio.new_ones((), dtype=torch.bool)
    inside = inside if clip_min is None else inside & (ratio >= clip_min)
    inside = inside if clip_max is None else inside & (ratio <= clip_max)
    return torch.where(inside, ratio, 0)


def off_policy_mask(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    threshold: float,
) -> Tensor:
    """1 for sequences to learn from, and 0 for bad ones that the policy has moved away from (DeepSeek-V3.2,
    https://arxiv.org/abs/2512.02556, equation 9): those with a negative advantage, and ::

        mean over the sequence of (sampler_logprobs - logprobs) > threshold

    Multiply it with `sampler_ratios`, or give it to `grpo_loss` in their place: ``sampler_ratio=``.

    Args:
        logprobs: (B, S), or (T,) with `cu_seqlens`: by the present policy.
        sampler_logprobs: of that shape, by the sampler, or by the policy that made the completions. NaN says nothing.
        advantages: (B,).
        mask: of the shape of `logprobs`, boolean or 0 and 1: which tokens count; None for all.
        cu_seqlens: (B + 1,), int32 or int64: the begin of each sequence in (T,), and the end of the last.
        threshold: positive.

    Returns:
        (B,), a constant in float32 (float64 for float64).

    Raises:
        ValueError: shapes or values do not fit.
    """
    op = "off_policy_mask"
    check_layout(op, "logprobs", logprobs, mask, cu_seqlens)
    check_shapes(op, "logprobs", logprobs, sampler_logprobs=sampler_logprobs)
    check_range(op, "threshold", threshold, "positive", threshold > 0)
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_range(
        op, "advantages", f"of shape {tuple(advantages.shape)}", f"({sequences},)", advantages.shape == (sequences,)
    )
    difference = _difference(logprobs, sampler_logprobs, mask)
    lengths = sums(kept_of(mask, difference).to(difference.dtype), cu_seqlens)
    distance = -sums(difference, cu_seqlens) / lengths.clamp_min(1)
    return ((advantages >= 0) | (distance <= threshold)).to(distance.dtype)


def _difference(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor | None) -> Tensor:
    difference = wide(logprobs.detach()) - sampler_logprobs.detach()
    known = ~sampler_logprobs.isnan() & kept_of(mask, logprobs)
    return torch.where(known, difference, 0)
