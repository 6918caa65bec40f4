"""Group relative policy optimization and its relatives. A loss is one row of `LOSSES`: what a token's loss is, and how
tokens are added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._shared import bounded, check_layout, check_name, check_range, check_shapes, kept_of, spread, sums, wide


class GRPOLoss(NamedTuple):
    """Of the tokens of completions.

    Attributes:
        loss: a scalar.
        kl: the mean over tokens of the estimated divergence from the reference; None without one.
        clipped: the part of the tokens whose gradient is cut off by the clip, or for "cispo" whose weight is bounded.
    """

    loss: Tensor
    kl: Tensor | None
    clipped: Tensor


class _Tokens(NamedTuple):
    """Tensors have the shape of `logprobs`; tokens that are masked have log ratios of 0."""

    logprobs: Tensor
    ratio: Tensor
    log_ratio: Tensor  # of tokens, whatever `importance` is
    advantages: Tensor
    kept: Tensor
    cu_seqlens: Tensor | None
    sampler_ratio: Tensor | None  # (B,) or as `logprobs`
    options: dict


def _clip(t: _Tokens) -> tuple[Tensor, Tensor]:
    low, high, delta = 1 - t.options["clip_low"], 1 + t.options["clip_high"], t.options["delta"]
    ratio = t.ratio if delta is None else t.ratio.clamp_max(delta)
    gain = torch.minimum(ratio * t.advantages, t.ratio.clamp(low, high) * t.advantages)
    cut = ((t.ratio < low) & (t.advantages < 0)) | ((t.ratio > high) & (t.advantages > 0))
    if delta is not None:
        cut = cut | ((t.ratio > delta) & (t.advantages < 0))
    return -gain, cut


def _cispo(t: _Tokens) -> tuple[Tensor, Tensor]:
    most = t.options["cispo_max"]
    return -t.ratio.detach().clamp_max(most) * t.advantages * t.logprobs, t.ratio > most


def _sapo(t: _Tokens) -> tuple[Tensor, Tensor]:
    positive, negative = (t.options[f"sapo_temperature_{sign}"] for sign in ("pos", "neg"))
    temperature = _by_sign(t.advantages > 0, positive, negative, t.ratio)
    gate = torch.sigmoid(temperature * (t.ratio - 1)) * (4 / temperature)
    return -gate * t.advantages, torch.zeros_like(t.kept)


def _vespo(t: _Tokens) -> tuple[Tensor, Tensor]:
    log_w = sums(t.log_ratio.detach(), t.cu_seqlens)
    if t.sampler_ratio is not None:
        of_sampler = t.sampler_ratio.log()
        of_tokens = of_sampler.shape == t.logprobs.shape
        log_w = log_w + (sums(torch.where(t.kept, of_sampler, 0), t.cu_seqlens) if of_tokens else of_sampler)
    log_w, good = spread(log_w, t.logprobs, t.cu_seqlens), t.advantages >= 0
    k, rate = (
        _by_sign(good, t.options[f"vespo_{name}_pos"], t.options[f"vespo_{name}_neg"], log_w)
        for name in ("k", "lambda")
    )
    weight = torch.exp(rate + k * log_w - rate * bounded(log_w).exp())
    return -weight * t.advantages * t.logprobs, torch.zeros_like(t.kept)


def _by_sign(positive: Tensor, of_positive: float, of_negative: float, like: Tensor) -> Tensor:
    """In the dtype of `like`, which `where` does not give two numbers."""
    return torch.where(positive, like.new_full((), of_positive), like.new_full((), of_negative))


class _Sums(NamedTuple):
    """Of losses that are 0 where tokens are masked."""

    losses: Tensor
    of_sequences: Tensor
    lengths: Tensor
    max_length: int | None
    num_tokens: Tensor | float | None


def _means_of_sequences(s: _Sums) -> Tensor:
    return (s.of_sequences / s.lengths.clamp_min(1)).mean()


def _of_step(s: _Sums) -> Tensor:
    return s.losses.sum() / (s.lengths.sum().clamp_min(1) if s.num_tokens is None else s.num_tokens)


class _Row(NamedTuple):
    losses: Callable[[_Tokens], tuple[Tensor, Tensor]]
    reduce: Callable[[_Sums], Tensor]
    importance: tuple[str, ...] = ("token", "sequence")


LOSSES = {
    "grpo": _Row(_clip, _means_of_sequences),
    "bnpo": _Row(_clip, lambda s: s.losses.sum() / s.lengths.sum().clamp_min(1)),
    "dr_grpo": _Row(_clip, lambda s: s.losses.sum() / (s.lengths.shape[0] * (s.max_length or 0))),
    "dapo": _Row(_clip, _of_step),
    "luspo": _Row(_clip, lambda s: s.of_sequences.mean(), importance=("sequence",)),
    "cispo": _Row(_cispo, _of_step),
    "sapo": _Row(_sapo, _means_of_sequences),
    "vespo": _Row(_vespo, _of_step, importance=("token",)),
}


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    delta: float | None = None,
    importance: str = "token",
    loss_type: str = "grpo",
    max_length: int | None = None,
    num_tokens: Tensor | float | None = None,
    sampler_ratio: Tensor | None = None,
    bias_correction_kl: bool = False,
    cispo_max: float = 5.0,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> GRPOLoss:
    """Group relative policy optimization (Shao et al. 2024, https://arxiv.org/abs/2402.03300, equation 3). A token's
    loss is::

        w    = exp(logprobs - old_logprobs)                       importance="token"
        w    = exp(mean over the sequence of the difference)      importance="sequence" (GSPO, arXiv 2507.18071)
        k3   = exp(ref - logprobs) - (ref - logprobs) - 1         (http://joschu.net/blog/kl-approx.html)
        loss = sampler_ratio * policy + beta * k3

        policy = -min(min(w, delta) * A, clip(w, 1 - clip_low, 1 + clip_high) * A)

    and `loss_type`, under TRL's names, says how tokens are added up, over B sequences::

        grpo      the mean over sequences of the mean over their tokens
        bnpo      the mean over the tokens of this call
        dr_grpo   the sum over B * max_length                     (Liu et al. 2025, arXiv 2503.20783)
        dapo      the sum over num_tokens: all tokens of the step, on all processes and in all accumulated batches,
                  over the number of processes where their gradients are averaged  (Yu et al. 2025, arXiv 2503.14476)
        luspo     the mean over sequences of the sum over their tokens, of importance="sequence"   (arXiv 2602.05261)

    or what is in the place of the clip, with sg a constant::

        cispo     -sg(min(w, cispo_max)) * A * logprobs, added up as dapo            (MiniMax-M1, arXiv 2506.13585)
        sapo      -4 / tau * sigmoid(tau * (w - 1)) * A, tau that of the sign of A, added up as grpo
                  (Gao et al. 2025, arXiv 2511.20347)
        vespo     -sg(W^k * exp(lambda * (1 - W))) * A * logprobs, W = exp(the sum over the sequence of the difference)
                  times the sampler's ratios, k and lambda those of the sign of A, added up as dapo (arXiv 2602.10693)

    Sequences without tokens count as sequences, with a loss of 0. Ratios above exp(80) (in float32) are taken as that,
    and have no gradient.

    Args:
        logprobs: (B, S), or (T,) with `cu_seqlens`.
        old_logprobs: of that shape, by the policy that made the completions; None where it is the present one, whose
            ratio is 1 and has a gradient all the same.
        advantages: (B,), a number a sequence, or of the shape of `logprobs`. Constants.
        mask: of the shape of `logprobs`, boolean or 0 and 1: which tokens count; None for all. What the others hold
            does not matter.
        cu_seqlens: (B + 1,), int32 or int64: the begin of each sequence in (T,), and the end of the last.
        ref_logprobs: of the shape of `logprobs`; needed where `beta` is not 0.
        beta: not negative.
        clip_low, clip_high: not negative; `clip_high` None takes `clip_low`. DAPO clips at 0.2 and 0.28.
        delta: positive, in general above ``1 + clip_high``: bounds w where A is negative (two-sided clip, INTELLECT-2,
            https://arxiv.org/abs/2505.07291). None does not.
        importance: "token" or "sequence".
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo" or "vespo".
        max_length: for "dr_grpo", the largest number of tokens of a completion.
        num_tokens: for "dapo", "cispo" and "vespo"; None takes the tokens of this call.
        sampler_ratio: (B,) or of the shape of `logprobs`, by `sampler_ratios`: corrects for a sampler whose
            probabilities are not those of `old_logprobs`. A constant.
        bias_correction_kl: multiply k3 by w, so that its gradient is that of the divergence (DeepSeek-V3.2,
            https://arxiv.org/abs/2512.02556). TRL does.
        cispo_max: positive: the largest weight, 5 in ScaleRL (https://arxiv.org/abs/2510.13786), which TRL calls
            epsilon_high; ``1 + epsilon_high`` of the MiniMax-M1 paper.
        sapo_temperature_pos, sapo_temperature_neg: positive; tau.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: not negative.

    Raises:
        ValueError: shapes or values do not fit, or an option is given that would mean nothing.
    """
    op = "grpo_loss"
    check_layout(op, "logprobs", logprobs, mask, cu_seqlens)
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_shapes(op, "logprobs", logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    for name, t in (("advantages", advantages), ("sampler_ratio", sampler_ratio)):
        if t is not None and t.shape not in (logprobs.shape, (sequences,)):
            raise ValueError(
                f"bigkernels.losses.{op}: {name} has shape {tuple(t.shape)}, expected "
                f"({sequences},) or {tuple(logprobs.shape)}"
            )
    options: dict[str, Any] = {"cispo_max": cispo_max}
    options |= {
        "sapo_temperature_pos": sapo_temperature_pos,
        "sapo_temperature_neg": sapo_temperature_neg,
        "vespo_k_pos": vespo_k_pos,
        "vespo_k_neg": vespo_k_neg,
        "vespo_lambda_pos": vespo_lambda_pos,
        "vespo_lambda_neg": vespo_lambda_neg,
    }
    _check_options(op, loss_type, importance, beta, clip_low, clip_high, delta, max_length, num_tokens, options)
    check_range(op, "ref_logprobs", None, "given, as beta is not 0", beta == 0 or ref_logprobs is not None)
    check_range(op, "bias_correction_kl", True, "False, as beta is 0", beta > 0 or not bias_correction_kl)
    options |= {"clip_low": clip_low, "clip_high": clip_low if clip_high is None else clip_high, "delta": delta}

    row = LOSSES[loss_type]
    logprobs = wide(logprobs)
    kept = kept_of(mask, logprobs)
    lengths = sums(kept.to(logprobs.dtype), cu_seqlens)
    advantages = advantages.detach().to(logprobs.dtype)
    sampler_ratio = None if sampler_ratio is None else sampler_ratio.detach().to(logprobs.dtype)
    if advantages.shape != logprobs.shape:
        advantages = spread(advantages, logprobs, cu_seqlens)
    advantages = torch.where(kept, advantages, 0)  # 0 times what is not a number would be none
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    log_ratio = difference = torch.where(kept, logprobs - old, 0)
    if importance == "sequence":
        difference = spread(sums(difference, cu_seqlens) / lengths.clamp_min(1), logprobs, cu_seqlens)
    ratio = bounded(difference).exp()
    losses, cut = row.losses(_Tokens(logprobs, ratio, log_ratio, advantages, kept, cu_seqlens, sampler_ratio, options))
    if sampler_ratio is not None and row.losses is not _vespo:
        if sampler_ratio.shape != logprobs.shape:
            sampler_ratio = spread(sampler_ratio, logprobs, cu_seqlens)
        losses = losses * torch.where(kept, sampler_ratio, 1)
    kl = None
    if ref_logprobs is not None:
        difference = bounded(torch.where(kept, ref_logprobs.detach() - logprobs, 0))
        kl = torch.expm1(difference) - difference
        losses = losses + beta * (kl * ratio if bias_correction_kl else kl) if beta else losses
    losses = torch.where(kept, losses, 0)
    loss = row.reduce(_Sums(losses, sums(losses, cu_seqlens), lengths, max_length, num_tokens))
    tokens = lengths.sum().clamp_min(1)
    kl = None if kl is None else torch.where(kept, kl, 0).sum().detach() / tokens
    return GRPOLoss(loss, kl, (cut & kept).sum() / tokens)


def _check_options(op, loss_type, importance, beta, clip_low, clip_high, delta, max_length, num_tokens, options):
    for name, value in (("beta", beta), ("clip_low", clip_low), ("clip_high", clip_high)):
        check_range(op, name, value, "not negative", value is None or value >= 0)
    for name, value in (("delta", delta), *options.items()):
        if name.startswith("vespo"):
            check_range(op, name, value, "not negative", value >= 0)
        else:
            check_range(op, name, value, "positive", value is None or value > 0)
    check_name(op, "importance", importance, ("token", "sequence"))
    check_name(op, "loss_type", loss_type, LOSSES)
    row, known = LOSSES[loss_type], f"as loss_type is {loss_type!r}"
    check_range(op, "importance", repr(importance), f"{row.importance[0]!r}, {known}", importance in row.importance)
    for name, value, unused, means in (
        ("clip_low", clip_low, 0.2, row.losses is _clip),
        ("clip_high", clip_high, None, row.losses is _clip),
        ("delta", delta, None, row.losses is _clip),
        ("max_length", max_length, None, loss_type == "dr_grpo"),
        ("num_tokens", num_tokens, None, row.reduce is _of_step),
    ):
        check_range(op, name, value, f"{unused}, {known}", means or value is unused or value == unused)
    check_range(op, "max_length", max_length, "positive for dr_grpo", loss_type != "dr_grpo" or (max_length or 0) > 0)
