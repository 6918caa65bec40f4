"""Losses of preference and reinforcement learning, on log probabilities of tokens and of sequences.

They take log probabilities from anywhere; from `bigkernels.functional.linear_logprobs` they come without the logits::

    import bigkernels.functional as B
    from bigkernels import losses

    # DPO: prompts and completions (2P, S), the chosen ones first; labels are -100 in prompts and padding
    logps = losses.sequence_logprobs(B.linear_logprobs(hidden[:, :-1], head.weight, labels[:, 1:]))
    with torch.no_grad():
        before = losses.sequence_logprobs(B.linear_logprobs(ref_hidden[:, :-1], ref_head.weight, labels[:, 1:]))
    found = losses.dpo_loss(*logps.chunk(2), *before.chunk(2), beta=0.1)
    found.loss.backward()
    print(found.accuracy, found.margins.mean())

    # GRPO: completions (B, S) with their advantages (B,)
    logps = B.linear_logprobs(hidden[:, :-1], head.weight, tokens[:, 1:], temperature=temperature)
    losses.grpo_loss(logps, old_logps, advantages, mask, ref_logprobs=ref_logps, beta=0.04).loss.backward()

Sequences lie in rows (B, S), or packed one after the other (T,) with `cu_seqlens` (B + 1,), where each begins and the
last ends. Everything is computed in float32, or in float64 where that is given. Metrics carry no gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "GRPOLoss",
    "KTOLoss",
    "PreferenceLoss",
    "dpo_loss",
    "grpo_loss",
    "ipo_loss",
    "kto_loss",
    "orpo_loss",
    "sequence_logprobs",
    "simpo_loss",
]


class PreferenceLoss(NamedTuple):
    """Of P pairs.

    Attributes:
        loss: the mean of `losses`.
        losses: (P,), a loss a pair, differentiable.
        chosen_rewards: (P,), the implicit reward of the chosen completions.
        rejected_rewards: (P,), that of the rejected ones.
    """

    loss: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """(P,), the reward of the chosen completions beyond that of the rejected ones."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def accuracy(self) -> Tensor:
        """The part of the pairs whose chosen completion has the larger reward."""
        return (self.margins > 0).to(self.losses.dtype).mean()


class KTOLoss(NamedTuple):
    """Of B completions.

    Attributes:
        loss: the mean of `losses`.
        losses: (B,), differentiable.
        rewards: (B,), ``beta * (logps - ref_logps)``.
        kl: the reference point z0, not yet times beta.
    """

    loss: Tensor
    losses: Tensor
    rewards: Tensor
    kl: Tensor


class GRPOLoss(NamedTuple):
    """Of the tokens of completions.

    Attributes:
        loss: a scalar.
        kl: the mean over tokens of the estimated divergence from the reference; None without one.
        clipped: the part of the tokens whose gradient is cut off by the clip.
    """

    loss: Tensor
    kl: Tensor | None
    clipped: Tensor


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
    _check_layout("sequence_logprobs", "logprobs", logprobs, mask, cu_seqlens)
    _check_range("sequence_logprobs", "mask", mask, "given, as average is", mask is not None or not average)
    logprobs = _wide(logprobs)
    if mask is None:
        return _sums(logprobs, cu_seqlens)
    kept = mask.bool()
    total = _sums(torch.where(kept, logprobs, 0), cu_seqlens)
    return total / _sums(kept.to(total.dtype), cu_seqlens).clamp_min(1) if average else total


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7)::

        x    = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = -(1 - label_smoothing) * log sigmoid(x) - label_smoothing * log sigmoid(-x)

    With `label_smoothing` it is conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf): that part of the
    labels is taken to be wrong. Rewards are ``beta * (logps - ref_logps)``.

    Args:
        chosen, rejected: (P,), summed log probabilities of completions by the model.
        ref_chosen, ref_rejected: (P,), by the reference.
        beta: positive.
        label_smoothing: in [0, 0.5).

    Raises:
        ValueError: shapes or values do not fit.
    """
    _check("dpo_loss", "chosen", chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    _check_range("dpo_loss", "label_smoothing", label_smoothing, "in [0, 0.5)", 0 <= label_smoothing < 0.5)
    _check_range("dpo_loss", "beta", beta, "positive", beta > 0)
    of_chosen, of_rejected = _wide(chosen) - _wide(ref_chosen), _wide(rejected) - _wide(ref_rejected)
    x = beta * (of_chosen - of_rejected)
    losses = -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)
    return _of_pairs(losses, beta * of_chosen, beta * of_rejected)


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> PreferenceLoss:
    """Identity preference optimization (Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17)::

        loss = ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta))^2

    beta is the paper's tau. The paper sums log probabilities over tokens; others have averaged them, which is for the
    caller of `sequence_logprobs` to decide. Rewards are ``beta * (logps - ref_logps)``.

    Arguments as those of `dpo_loss`.
    """
    _check("ipo_loss", "chosen", chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    _check_range("ipo_loss", "beta", beta, "positive", beta > 0)
    of_chosen, of_rejected = _wide(chosen) - _wide(ref_chosen), _wide(rejected) - _wide(ref_rejected)
    return _of_pairs((of_chosen - of_rejected - 1 / (2 * beta)).square(), beta * of_chosen, beta * of_rejected)


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, nll: Tensor | None = None) -> PreferenceLoss:
    """Odds ratio preference optimization (Hong et al. 2024, https://arxiv.org/abs/2403.07691, equations 6 and 7)::

        odds(c) = exp(c) / (1 - exp(c))
        loss    = nll - beta * log sigmoid(log(odds(chosen) / odds(rejected)))

    beta is the paper's lambda. Rewards are ``beta * logps``.

    Args:
        chosen, rejected: (P,), log probabilities *averaged* over tokens, by ``sequence_logprobs(average=True)``.
        beta: not negative.
        nll: the loss of the chosen completions, (P,) or a scalar; None takes ``-chosen``, as the paper does.

    Raises:
        ValueError: shapes or values do not fit.
    """
    _check("orpo_loss", "chosen", chosen, rejected=rejected)
    _check_range("orpo_loss", "beta", beta, "not negative", beta >= 0)
    if nll is not None and nll.dim():
        _check("orpo_loss", "chosen", chosen, nll=nll)
    chosen, rejected = _wide(chosen), _wide(rejected)
    ratio = (chosen - _log_of_rest(chosen)) - (rejected - _log_of_rest(rejected))
    losses = (-chosen if nll is None else _wide(nll)) - beta * logsigmoid(ratio)
    return _of_pairs(losses, beta * chosen, beta * rejected)


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> PreferenceLoss:
    """Simple preference optimization (Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6)::

        loss = -log sigmoid(beta * chosen - beta * rejected - gamma)

    Rewards are ``beta * logps``; there is no reference.

    Args:
        chosen, rejected: (P,), log probabilities *averaged* over tokens, by ``sequence_logprobs(average=True)``.
        beta: positive.
        gamma: the margin that the rewards are to have.

    Raises:
        ValueError: shapes or values do not fit.
    """
    _check("simpo_loss", "chosen", chosen, rejected=rejected)
    _check_range("simpo_loss", "beta", beta, "positive", beta > 0)
    chosen, rejected = beta * _wide(chosen), beta * _wide(rejected)
    return _of_pairs(-logsigmoid(chosen - rejected - gamma), chosen, rejected)


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl_logratios: Tensor | None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 8)::

        r    = logps - ref_logps
        z0   = max(0, mean(kl_logratios)), without gradient
        loss = desirable_weight   * (1 - sigmoid(beta * (r - z0)))     where desirable
               undesirable_weight * (1 - sigmoid(beta * (z0 - r)))     elsewhere

    Args:
        logps, ref_logps: (B,), summed log probabilities of completions by the model and by the reference.
        desirable: (B,), boolean.
        kl_logratios: (M,), ``logps - ref_logps`` of prompts with completions of other prompts, from which the paper
            estimates the divergence of the model from its reference (over all processes: gather them before). None
            takes z0 = 0.
        beta: positive.
        desirable_weight, undesirable_weight: not negative; the paper's lambdas.

    Raises:
        ValueError: shapes or values do not fit.
    """
    _check("kto_loss", "logps", logps, ref_logps=ref_logps, desirable=desirable)
    _check_range("kto_loss", "beta", beta, "positive", beta > 0)
    for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        _check_range("kto_loss", name, value, "not negative", value >= 0)
    ratio = _wide(logps) - _wide(ref_logps)
    z0 = ratio.new_zeros(()) if kl_logratios is None else _wide(kl_logratios.detach()).mean().clamp_min(0)
    good = desirable.bool()
    gain = torch.where(good, ratio - z0, z0 - ratio)
    short = torch.sigmoid(-beta * gain)  # 1 - sigmoid(x), without its cancellation
    losses = torch.where(good, desirable_weight * short, undesirable_weight * short)
    return KTOLoss(losses.mean(), losses, (beta * ratio).detach(), z0)


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
    importance: str = "token",
    loss_type: str = "grpo",
    max_length: int | None = None,
    num_tokens: Tensor | float | None = None,
) -> GRPOLoss:
    """Group relative policy optimization (Shao et al. 2024, https://arxiv.org/abs/2402.03300, equation 3). A token's
    loss is::

        w    = exp(logprobs - old_logprobs)                       importance="token"
        w    = exp(mean over the sequence of the difference)      importance="sequence" (GSPO, arXiv 2507.18071)
        k3   = exp(ref - logprobs) - (ref - logprobs) - 1         (http://joschu.net/blog/kl-approx.html)
        loss = -min(w * A, clip(w, 1 - clip_low, 1 + clip_high) * A) + beta * k3

    and `loss_type` says how tokens are added up, over B sequences::

        grpo      the mean over sequences of the mean over their tokens
        bnpo      the mean over the tokens of this call
        dr_grpo   the sum over B * max_length                     (Liu et al. 2025, arXiv 2503.20783)
        dapo      the sum over num_tokens: all tokens of the step, on all processes and in all accumulated batches,
                  over the number of processes where their gradients are averaged  (Yu et al. 2025, arXiv 2503.14476)

    Sequences without tokens count as sequences, with a loss of 0.

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
        importance: "token" or "sequence".
        loss_type: "grpo", "bnpo", "dr_grpo" or "dapo".
        max_length: for "dr_grpo", the largest number of tokens of a completion.
        num_tokens: for "dapo"; None takes the tokens of this call.

    Raises:
        ValueError: shapes or values do not fit, or an option is given that would mean nothing.
    """
    op = "grpo_loss"
    _check_layout(op, "logprobs", logprobs, mask, cu_seqlens)
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check(op, "logprobs", logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    if advantages.shape not in (logprobs.shape, (sequences,)):
        raise ValueError(f"bigkernels.losses.{op}: advantages has shape {tuple(advantages.shape)}, expected "
                         f"({sequences},) or {tuple(logprobs.shape)}")  # fmt: skip
    clip_high = clip_low if clip_high is None else clip_high
    for name, value in (("beta", beta), ("clip_low", clip_low), ("clip_high", clip_high)):
        _check_range(op, name, value, "not negative", value >= 0)
    for name, value, accepted in (("importance", importance, ("token", "sequence")),
                                  ("loss_type", loss_type, ("grpo", "bnpo", "dr_grpo", "dapo"))):  # fmt: skip
        _check_range(op, name, repr(value), "one of " + ", ".join(accepted), value in accepted)
    for name, value, owner in (("max_length", max_length, "dr_grpo"), ("num_tokens", num_tokens, "dapo")):
        _check_range(op, name, value, f"None, as loss_type is {loss_type!r}", value is None or loss_type == owner)
    _check_range(op, "max_length", max_length, "positive for dr_grpo", loss_type != "dr_grpo" or (max_length or 0) > 0)
    _check_range(op, "ref_logprobs", None, "given, as beta is not 0", beta == 0 or ref_logprobs is not None)

    logprobs = _wide(logprobs)
    kept = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask.bool()
    lengths = _sums(kept.to(logprobs.dtype), cu_seqlens)
    advantages = advantages.detach().to(logprobs.dtype)
    if advantages.shape != logprobs.shape:
        advantages = _spread(advantages, logprobs, cu_seqlens)
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    difference = torch.where(kept, logprobs - old, 0)
    if importance == "sequence":
        difference = _spread(_sums(difference, cu_seqlens) / lengths.clamp_min(1), logprobs, cu_seqlens)
    ratio = difference.exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    losses, kl = -gain, None
    if ref_logprobs is not None:
        difference = torch.where(kept, ref_logprobs.detach() - logprobs, 0)
        kl = torch.expm1(difference) - difference
        losses = losses + beta * kl if beta else losses
    losses = torch.where(kept, losses, 0)

    if loss_type == "grpo":
        loss = (_sums(losses, cu_seqlens) / lengths.clamp_min(1)).mean()
    elif loss_type == "dr_grpo":
        loss = losses.sum() / (sequences * max_length)
    else:
        loss = losses.sum() / (lengths.sum().clamp_min(1) if num_tokens is None else num_tokens)
    cut = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
    tokens = lengths.sum().clamp_min(1)
    kl = None if kl is None else torch.where(kept, kl, 0).sum().detach() / tokens
    return GRPOLoss(loss, kl, (cut & kept).sum() / tokens)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _of_pairs(losses: Tensor, chosen: Tensor, rejected: Tensor) -> PreferenceLoss:
    return PreferenceLoss(losses.mean(), losses, chosen.detach(), rejected.detach())


def _log_of_rest(log_p: Tensor) -> Tensor:
    """log(1 - p), with all its digits at both ends; finite at p = 1."""
    log_p = log_p.clamp_max(-torch.finfo(log_p.dtype).tiny)
    near = log_p > -math.log(2)
    # Each branch sees a value that is inside its range, so that no gradient is inf * 0.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, log_p, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, log_p))),
    )


def _sums(t: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of sequences, (B,)."""
    if cu_seqlens is None:
        return t.sum(-1)
    return torch.segment_reduce(t, "sum", offsets=cu_seqlens, initial=0, unsafe=True)


def _spread(t: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A number a sequence (B,) to its tokens."""
    if cu_seqlens is None:
        return t.unsqueeze(-1).expand_as(like)
    position = torch.arange(like.shape[0], device=like.device, dtype=cu_seqlens.dtype)
    return t[torch.searchsorted(cu_seqlens, position, right=True) - 1]


def _check(op: str, first: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.shape != reference.shape:
            raise ValueError(f"bigkernels.losses.{op}: {name} has shape {tuple(t.shape)} and {first} "
                             f"{tuple(reference.shape)}; they must have one shape")  # fmt: skip


def _check_layout(op: str, name: str, t: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    expected, dim = ("(B, S)", 2) if cu_seqlens is None else ("(T,), as cu_seqlens is given", 1)
    if t.dim() != dim:
        raise ValueError(f"bigkernels.losses.{op}: {name} has shape {tuple(t.shape)}, expected {expected}")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0):
        raise ValueError(f"bigkernels.losses.{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (B + 1,)")
    _check(op, name, t, mask=mask)


def _check_range(op: str, name: str, value: object, accepted: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"bigkernels.losses.{op}: {name} is {value}, expected {accepted}")
