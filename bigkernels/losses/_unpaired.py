"""Losses of completions that are good or bad by themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .._deprecated import renamed_arguments
from ._shared import check_name, check_range, check_shapes, wide


class KTOLoss(NamedTuple):
    """Of B completions.

    Attributes:
        loss: the mean of `losses`.
        losses: (B,), differentiable.
        rewards: (B,), ``beta * (logprobs - ref_logprobs)``.
        kl: the reference point z0, not yet times beta.
    """

    loss: Tensor
    losses: Tensor
    rewards: Tensor
    kl: Tensor


@renamed_arguments("bigkernels.losses.kto_loss", logps="logprobs", ref_logps="ref_logprobs")
def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    kl_logratios: Tensor | None,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 8)::

        r    = logprobs - ref_logprobs
        z0   = max(0, mean(kl_logratios)), without gradient
        loss = desirable_weight   * (1 - sigmoid(beta * (r - z0)))     where desirable
               undesirable_weight * (1 - sigmoid(beta * (z0 - r)))     elsewhere

    `loss_type` "apo_zero_unpaired" (D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, equation 7, a
    completion at a time) is that with z0 = 0.

    Args:
        logprobs, ref_logprobs: (B,), summed log probabilities of completions by the model and by the reference.
        desirable: (B,), boolean.
        kl_logratios: (M,), ``logprobs - ref_logprobs`` of prompts with completions of other prompts, from which the
            paper estimates the divergence of the model from its reference (over all processes: gather them before).
            None takes z0 = 0.
        loss_type: "kto" or "apo_zero_unpaired".
        beta: positive.
        desirable_weight, undesirable_weight: not negative; the paper's lambdas.

    Raises:
        ValueError: shapes or values do not fit, or `kl_logratios` is given where it means nothing.
    """
    op = "kto_loss"
    check_shapes(op, "logprobs", logprobs, ref_logprobs=ref_logprobs, desirable=desirable)
    check_name(op, "loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    check_range(
        op,
        "kl_logratios",
        "given",
        "None, as loss_type is 'apo_zero_unpaired'",
        kl_logratios is None or loss_type == "kto",
    )
    check_range(op, "beta", beta, "positive", beta > 0)
    for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        check_range(op, name, value, "not negative", value >= 0)
    ratio = wide(logprobs) - wide(ref_logprobs)
    z0 = ratio.new_zeros(()) if kl_logratios is None else wide(kl_logratios.detach()).mean().clamp_min(0)
    good = desirable.bool()
    gain = torch.where(good, ratio - z0, z0 - ratio)
    short = torch.sigmoid(-beta * gain)  # 1 - sigmoid(x), without its cancellation
    losses = torch.where(good, desirable_weight * short, undesirable_weight * short)
    return KTOLoss(losses.mean(), losses, (beta * ratio).detach(), z0)


class BCOLoss(NamedTuple):
    """Of B completions.

    Attributes:
        loss: the mean of `losses`.
        losses: (B,), differentiable.
        rewards: (B,), ``beta * (logprobs - ref_logprobs)``.
    """

    loss: Tensor
    losses: Tensor
    rewards: Tensor


def bco_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    *,
    shift: float | Tensor | RewardShift = 0.0,
    beta: float = 0.1,
    weights: Tensor | None = None,
) -> BCOLoss:
    """Binary classifier optimization (Jung et al. 2024, https://arxiv.org/abs/2404.04656)::

        reward = beta * (logprobs - ref_logprobs)
        loss   = -log sigmoid(reward - shift)     where desirable
                 -log sigmoid(shift - reward)     elsewhere

    Args:
        logprobs, ref_logprobs: (B,), summed log probabilities of completions by the model and by the reference.
        desirable: (B,), boolean.
        shift: the paper's delta, a number or a scalar, a constant; or a `RewardShift`, which is updated with these
            rewards first, where gradients are computed.
        beta: positive.
        weights: (B,), constants: the ratios by which the paper matches the distributions of prompts; None is 1.

    Raises:
        ValueError: shapes or values do not fit.
    """
    op = "bco_loss"
    check_shapes(op, "logprobs", logprobs, ref_logprobs=ref_logprobs, desirable=desirable, weights=weights)
    check_range(op, "beta", beta, "positive", beta > 0)
    rewards, good = beta * (wide(logprobs) - wide(ref_logprobs)), desirable.bool()
    if isinstance(shift, RewardShift):
        shift = shift.update(rewards[good], rewards[~good]) if torch.is_grad_enabled() else shift.value
    shift = shift.detach() if isinstance(shift, Tensor) else shift
    losses = -logsigmoid(torch.where(good, rewards - shift, shift - rewards))
    if weights is not None:
        losses = losses * weights.detach().to(losses.dtype)
    return BCOLoss(losses.mean(), losses, rewards.detach())


class RewardShift(nn.Module):
    """The reward between good and bad completions, as training goes on: half the sum of the means of both.

    Each mean is of all rewards seen so far, or with `decay` one that forgets, ``decay * mean + (1 - decay) * new``.
    A module, so that it moves and is saved with a model.

    Args:
        decay: in [0, 1), or None.

    Attributes:
        means: (2,) in float32, of good and of bad ones.
        counts: (2,) in float32, how many there were.
    """

    means: Tensor
    counts: Tensor

    def __init__(self, decay: float | None = None) -> None:
        super().__init__()
        check_range("RewardShift", "decay", decay, "in [0, 1) or None", decay is None or 0 <= decay < 1)
        self.decay = decay
        for name in ("means", "counts"):
            self.register_buffer(name, torch.zeros(2, dtype=torch.float32, device=torch.get_default_device()))

    @property
    def value(self) -> Tensor:
        """A scalar: 0 before anything was seen, and the one mean where only one kind was."""
        seen = (self.counts > 0).to(self.means.dtype)
        return (self.means * seen).sum() / seen.sum().clamp_min(1)

    @torch.no_grad()
    def update(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """`value` after rewards (M,) of good and (N,) of bad completions were seen; of all processes: gather before."""
        for kind, rewards in enumerate((chosen, rejected)):
            count = rewards.numel()
            if not count:
                continue
            new, before = rewards.detach().to(self.means).mean(), self.counts[kind].clone()
            share = count / (before + count) if self.decay is None else torch.where(before > 0, 1 - self.decay, 1.0)
            self.means[kind].lerp_(new, share)
            self.counts[kind] += count
        return self.value.clone()
