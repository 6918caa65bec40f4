"""Losses of completions that are good or bad by themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._shared import check_name, check_range, check_shapes, wide


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


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl_logratios: Tensor | None,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 8)::

        r    = logps - ref_logps
        z0   = max(0, mean(kl_logratios)), without gradient
        loss = desirable_weight   * (1 - sigmoid(beta * (r - z0)))     where desirable
               undesirable_weight * (1 - sigmoid(beta * (z0 - r)))     elsewhere

    `loss_type` "apo_zero_unpaired" (D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, equation 7, a
    completion at a time) is that with z0 = 0.

    Args:
        logps, ref_logps: (B,), summed log probabilities of completions by the model and by the reference.
        desirable: (B,), boolean.
        kl_logratios: (M,), ``logps - ref_logps`` of prompts with completions of other prompts, from which the paper
            estimates the divergence of the model from its reference (over all processes: gather them before). None
            takes z0 = 0.
        loss_type: "kto" or "apo_zero_unpaired".
        beta: positive.
        desirable_weight, undesirable_weight: not negative; the paper's lambdas.

    Raises:
        ValueError: shapes or values do not fit, or `kl_logratios` is given where it means nothing.
    """
    op = "kto_loss"
    check_shapes(op, "logps", logps, ref_logps=ref_logps, desirable=desirable)
    check_name(op, "loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    check_range(op, "kl_logratios", "given", "None, as loss_type is 'apo_zero_unpaired'",
                kl_logratios is None or loss_type == "kto")  # fmt: skip
    check_range(op, "beta", beta, "positive", beta > 0)
    for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        check_range(op, name, value, "not negative", value >= 0)
    ratio = wide(logps) - wide(ref_logps)
    z0 = ratio.new_zeros(()) if kl_logratios is None else wide(kl_logratios.detach()).mean().clamp_min(0)
    good = desirable.bool()
    gain = torch.where(good, ratio - z0, z0 - ratio)
    short = torch.sigmoid(-beta * gain)  # 1 - sigmoid(x), without its cancellation
    losses = torch.where(good, desirable_weight * short, undesirable_weight * short)
    return KTOLoss(losses.mean(), losses, (beta * ratio).detach(), z0)
