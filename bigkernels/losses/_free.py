"""Losses of pairs that need no reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._shared import (
    PreferenceLoss,
    bounded,
    check_name,
    check_range,
    check_shapes,
    check_smoothing,
    of_pairs,
    smoothed_logistic,
    wide,
)

# From the difference of rewards, beta, the margin and the label smoothing.
CPO: dict[str, Callable[[Tensor, float, float, float], Tensor]] = {
    "sigmoid": lambda d, beta, gamma, e: smoothed_logistic(beta * d, e),
    "hinge": lambda d, beta, gamma, e: torch.relu(1 - beta * d),
    "ipo": lambda d, beta, gamma, e: (d - 1 / (2 * beta)).square(),
    "simpo": lambda d, beta, gamma, e: smoothed_logistic(beta * d - gamma, e),
    "alphapo": lambda d, beta, gamma, e: smoothed_logistic(beta * d - gamma, e),
}
AVERAGED = ("ipo", "simpo", "alphapo")  # whose log probabilities are means over tokens


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, nll: Tensor | None = None) -> PreferenceLoss:
    """Odds ratio preference optimization (Hong et al. 2024, https://arxiv.org/abs/2403.07691, equations 6 and 7)::

        odds(c) = exp(c) / (1 - exp(c))
        loss    = nll - beta * log sigmoid(log(odds(chosen) / odds(rejected)))

    beta is the paper's lambda. Rewards are ``beta * logprobs``.

    Args:
        chosen, rejected: (P,), log probabilities *averaged* over tokens, by ``sequence_logprobs(average=True)``.
        beta: not negative.
        nll: the loss of the chosen completions, (P,) or a scalar; None takes ``-chosen``, as the paper does.

    Raises:
        ValueError: shapes or values do not fit.
    """
    check_shapes("orpo_loss", "chosen", chosen, rejected=rejected)
    check_range("orpo_loss", "beta", beta, "not negative", beta >= 0)
    chosen, rejected = wide(chosen), wide(rejected)
    ratio = (chosen - _log_of_rest(chosen)) - (rejected - _log_of_rest(rejected))
    losses = _nll("orpo_loss", chosen, nll) - beta * logsigmoid(ratio)
    return of_pairs(losses, beta * chosen, beta * rejected)


def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> PreferenceLoss:
    """Simple preference optimization (Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6)::

        x    = beta * chosen - beta * rejected - gamma
        loss = -(1 - label_smoothing) * log sigmoid(x) - label_smoothing * log sigmoid(-x)

    Rewards are ``beta * logprobs``; there is no reference.

    Args:
        chosen, rejected: (P,), log probabilities *averaged* over tokens, by ``sequence_logprobs(average=True)``.
        beta: positive.
        gamma: the margin that the rewards are to have.
        label_smoothing: in [0, 0.5), the part of the labels that is taken to be wrong; the paper has 0.

    Raises:
        ValueError: shapes or values do not fit.
    """
    check_shapes("simpo_loss", "chosen", chosen, rejected=rejected)
    check_range("simpo_loss", "beta", beta, "positive", beta > 0)
    check_smoothing("simpo_loss", label_smoothing)
    chosen, rejected = beta * wide(chosen), beta * wide(rejected)
    return of_pairs(smoothed_logistic(chosen - rejected - gamma, label_smoothing), chosen, rejected)


def cpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
    nll: Tensor | None = None,
    cpo_alpha: float = 1.0,
) -> PreferenceLoss:
    """Contrastive preference optimization (Xu et al. 2024, https://arxiv.org/abs/2401.08417, equation 5), and the
    losses that go by a `loss_type` in TRL's CPO. With e the label smoothing::

        r(c)      = c, or (1 - exp(-alpha * c)) / alpha where alpha is not 0
        x         = beta * (r(chosen) - r(rejected))
        loss      = preference + cpo_alpha * nll

        sigmoid   -(1 - e) * log sigmoid(x) - e * log sigmoid(-x)
        hinge     max(0, 1 - x)                                         arXiv 2305.10425
        ipo       ((x - 1 / 2) / beta)^2                                arXiv 2310.12036, of averaged log probabilities
        simpo     sigmoid of x - simpo_gamma                            `simpo_loss`, of averaged log probabilities
        alphapo   simpo without nll, for an alpha that is not 0         AlphaPO, arXiv 2501.03884

    Rewards are ``beta * r(logprobs)``.

    Args:
        chosen, rejected: (P,), log probabilities of completions, summed or averaged over tokens.
        loss_type: "sigmoid", "hinge", "ipo", "simpo" or "alphapo".
        beta: positive.
        label_smoothing: in [0, 0.5); 0 for "hinge" and "ipo".
        simpo_gamma: for "simpo" and "alphapo", the margin that the rewards are to have.
        alpha: the shape of rewards. Exponentials are bounded at exp(80) in float32, and have no gradient there.
        nll: the loss of the chosen completions, (P,) or a scalar; None takes ``-chosen``, as the paper does.
        cpo_alpha: not negative; 0 leaves the nll out, as "alphapo" does.

    Raises:
        ValueError: shapes or values do not fit, or `label_smoothing` or `nll` is given where it means nothing.
    """
    op = "cpo_loss"
    check_shapes(op, "chosen", chosen, rejected=rejected)
    check_name(op, "loss_type", loss_type, CPO)
    check_range(op, "beta", beta, "positive", beta > 0)
    check_smoothing(op, label_smoothing)
    check_range(
        op,
        "label_smoothing",
        label_smoothing,
        f"0, as loss_type is {loss_type!r}",
        not label_smoothing or loss_type not in ("hinge", "ipo"),
    )
    check_range(op, "cpo_alpha", cpo_alpha, "not negative", cpo_alpha >= 0)
    check_range(op, "nll", "given", "None, as loss_type is 'alphapo'", nll is None or loss_type != "alphapo")
    check_range(op, "alpha", alpha, "a finite number", -math.inf < alpha < math.inf)
    chosen, rejected = wide(chosen), wide(rejected)
    rewards = [r if alpha == 0 else -torch.expm1(bounded(-alpha * r)) / alpha for r in (chosen, rejected)]
    losses = CPO[loss_type](rewards[0] - rewards[1], beta, simpo_gamma, label_smoothing)
    if cpo_alpha and loss_type != "alphapo":
        losses = losses + cpo_alpha * _nll(op, chosen, nll)
    return of_pairs(losses, beta * rewards[0], beta * rewards[1])


def _nll(op: str, chosen: Tensor, nll: Tensor | None) -> Tensor:
    if nll is None:
        return -chosen
    if nll.dim():
        check_shapes(op, "chosen", chosen, nll=nll)
    return wide(nll)


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
