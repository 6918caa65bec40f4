"""Losses of pairs with a reference: DPO and its relatives. A loss is one row of `LOSSES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


class _Pairs(NamedTuple):
    """What a row computes its losses (P,) from."""

    chosen: Tensor  # log probabilities
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    of_chosen: Tensor  # log ratios to the reference
    of_rejected: Tensor
    scores: tuple[Tensor, Tensor]  # the log ratios as the divergence has them
    tokens: tuple[Tensor, Tensor]
    beta: float
    label_smoothing: float
    discopop_tau: float
    bco_shift: float | Tensor

    @property
    def x(self) -> Tensor:
        return self.beta * (self.scores[0] - self.scores[1])

    @property
    def x_of_means(self) -> Tensor:
        chosen, rejected = (s / n.clamp_min(1) for s, n in zip(self.scores, self.tokens, strict=True))
        return chosen - rejected


def _exo(p: _Pairs) -> Tensor:
    x = p.x
    of_chosen = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-p.label_smoothing))
    return of_chosen + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(p.label_smoothing))


def _nca(p: _Pairs) -> Tensor:
    chosen, rejected = p.beta * p.of_chosen, p.beta * p.of_rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _robust(p: _Pairs) -> Tensor:
    clean, flipped = (1 - p.label_smoothing) * logsigmoid(p.x), p.label_smoothing * logsigmoid(-p.x)
    return (flipped - clean) / (1 - 2 * p.label_smoothing)


def _bco(p: _Pairs) -> Tensor:
    return -logsigmoid(p.beta * p.of_chosen - p.bco_shift) - logsigmoid(p.bco_shift - p.beta * p.of_rejected)


def _sppo(p: _Pairs) -> Tensor:
    half = 0.5 / p.beta
    return (p.of_chosen - half).square() + (p.of_rejected + half).square()


def _aot(p: _Pairs) -> Tensor:
    difference = (p.chosen - p.rejected).sort(0).values - (p.ref_chosen - p.ref_rejected).sort(0).values
    return smoothed_logistic(p.beta * difference, p.label_smoothing)


def _aot_unpaired(p: _Pairs) -> Tensor:
    difference = p.of_chosen.sort(0).values - p.of_rejected.sort(0).values
    return smoothed_logistic(p.beta * difference, p.label_smoothing)


def _discopop(p: _Pairs) -> Tensor:
    x = p.x
    # Of two factors of which one may be infinite and the other zero, the product's logarithm is taken.
    exponential = bounded(logsigmoid(x / p.discopop_tau) - x).exp()
    return exponential - logsigmoid(x) * torch.sigmoid(-x / p.discopop_tau)


def _sft(p: _Pairs) -> Tensor:
    return (-p.chosen.sum() / p.tokens[0].sum().clamp_min(1)).expand_as(p.chosen)


class _Row(NamedTuple):
    losses: Callable[[_Pairs], Tensor]
    smooths: bool = False  # whether label_smoothing means something
    tokens: bool = False  # whether lengths are needed
    diverges: bool = True  # whether it is a function of the difference of scores, and so has a form for f-divergences


LOSSES = {
    "sigmoid": _Row(lambda p: smoothed_logistic(p.x, p.label_smoothing), smooths=True),
    "hinge": _Row(lambda p: torch.relu(1 - p.x)),
    "ipo": _Row(lambda p: (p.x_of_means - 1 / (2 * p.beta)).square(), tokens=True),
    "exo_pair": _Row(_exo, smooths=True),
    "nca_pair": _Row(_nca, diverges=False),
    "robust": _Row(_robust, smooths=True),
    "bco_pair": _Row(_bco, diverges=False),
    "sppo_hard": _Row(_sppo, diverges=False),
    "aot": _Row(_aot, smooths=True, diverges=False),
    "aot_unpaired": _Row(_aot_unpaired, smooths=True, diverges=False),
    "apo_zero": _Row(
        lambda p: torch.sigmoid(-p.beta * p.of_chosen) + torch.sigmoid(p.beta * p.of_rejected), diverges=False
    ),
    "apo_down": _Row(
        lambda p: torch.sigmoid(p.beta * p.of_chosen) + torch.sigmoid(-p.beta * (p.of_chosen - p.of_rejected)),
        diverges=False,
    ),
    "discopop": _Row(_discopop),
    "sft": _Row(_sft, tokens=True),
    "sigmoid_norm": _Row(
        lambda p: smoothed_logistic(p.beta * p.x_of_means, p.label_smoothing), smooths=True, tokens=True
    ),
}

# f'(u) of f-divergences, from log u.
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda r, alpha: r,
    "forward_kl": lambda r, alpha: -torch.expm1(bounded(-r)),
    "js_divergence": lambda r, alpha: math.log(2) + logsigmoid(r),
    "alpha_divergence": lambda r, alpha: r if alpha == 1 else torch.expm1(bounded((alpha - 1) * r)) / (alpha - 1),
}


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    bco_shift: float | Tensor = 0.0,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
    weights: Tensor | None = None,
) -> PreferenceLoss:
    """Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7), and the
    losses that go by a `loss_type` in TRL, under its names. With e the label smoothing and ::

        c, r = chosen - ref_chosen, rejected - ref_rejected
        x    = beta * (c - r)

    a pair's loss is::

        sigmoid       -(1 - e) * log sigmoid(x) - e * log sigmoid(-x)       e: Mitchell 2023, ericmitchell.ai/cdpo.pdf
        hinge         max(0, 1 - x)                                         SLiC, arXiv 2305.10425; RSO, 2309.06657
        ipo           (c / chosen_tokens - r / rejected_tokens - 1 / (2 * beta))^2             arXiv 2310.12036, eq. 17
        exo_pair      sigmoid(x) * log(sigmoid(x) / (1 - e)) + sigmoid(-x) * log(sigmoid(-x) / e)      2402.00856, 16
        nca_pair      -log sigmoid(beta * c) - (log sigmoid(-beta * c) + log sigmoid(-beta * r)) / 2   2402.05369
        robust        (-(1 - e) * log sigmoid(x) + e * log sigmoid(-x)) / (1 - 2 * e)          arXiv 2403.00409
        bco_pair      -log sigmoid(beta * c - bco_shift) - log sigmoid(bco_shift - beta * r)   arXiv 2404.04656
        sppo_hard     (c - 1 / (2 * beta))^2 + (r + 1 / (2 * beta))^2       arXiv 2405.00675, eq. 4.7 with P of 1 and 0
        aot           sigmoid of the sorted chosen - rejected less the sorted ref_chosen - ref_rejected    2406.05882
        aot_unpaired  sigmoid of the sorted c less the sorted r                                            2406.05882
        apo_zero      1 - sigmoid(beta * c) + sigmoid(beta * r)             arXiv 2408.06266, eq. 7
        apo_down      sigmoid(beta * c) + 1 - sigmoid(x)                    arXiv 2408.06266, eq. 8
        discopop      -(1 - m) * log sigmoid(x) + m * exp(-x), m = sigmoid(x / discopop_tau)   arXiv 2406.08414, eq. 5
        sft           -sum(chosen) / sum(chosen_tokens), which is the same for all pairs
        sigmoid_norm  sigmoid with beta * (c / chosen_tokens - r / rejected_tokens)            arXiv 2411.15124

    Several at once are added up, as in MPO (arXiv 2411.10442): ``loss_type=("sigmoid", "sft"), loss_weights=(1, 0.2)``
    is DPO with the negative log likelihood beside it (RPO, arXiv 2404.19733). `ipo_loss` has the paper's sums instead
    of the means that "ipo" takes, as its authors told TRL they had done. Rewards are ``beta * c`` and ``beta * r``.

    Args:
        chosen, rejected: (P,), summed log probabilities of completions by the model.
        ref_chosen, ref_rejected: (P,), by the reference. None, for both, takes all completions for equally likely, so
            that c and r are the model's own (what TRL has called `reference_free`).
        loss_type: a name, or several.
        loss_weights: a number a name; None is 1 each.
        beta: positive.
        label_smoothing: in [0, 0.5), the part of the labels that is taken to be wrong. For "exo_pair" it is positive
            (the paper recommends 1e-3); where no loss has e in its formula, it is 0.
        discopop_tau: positive.
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence" (f-DPO, arXiv 2309.16240):
            takes f'(exp(c)) and f'(exp(r)) for c and r in x, up to what all have in common. Others than "reverse_kl"
            are for losses of x alone. Ratios are bounded at exp(80) in float32, and have no gradient there.
        f_alpha_divergence_coef: alpha of "alpha_divergence".
        bco_shift: for "bco_pair", the reward between good and bad completions: a number or a scalar, a constant, as
            `RewardShift` follows it. `bco_loss` is for completions without pairs.
        chosen_tokens, rejected_tokens: (P,), how many tokens the completions have, which "ipo" and "sigmoid_norm" need,
            and "sft" of the chosen ones. Completions of no token count as having one.
        weights: (P,), constants that multiply the losses, as WPO's do (`wpo_weights`).

    Raises:
        ValueError: shapes or values do not fit, or an option is given that would mean nothing.
    """
    op = "dpo_loss"
    names, factors = check_options(op, loss_type, loss_weights, beta, label_smoothing, discopop_tau, f_divergence_type)
    check_shapes(
        op,
        "chosen",
        chosen,
        rejected=rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        weights=weights,
    )
    check_range(
        op,
        "ref_rejected",
        "None" if ref_rejected is None else "given",
        "as ref_chosen is",
        (ref_chosen is None) == (ref_rejected is None),
    )
    unshifted = isinstance(bco_shift, (int, float)) and bco_shift == 0
    check_range(op, "bco_shift", bco_shift, f"0, as loss_type is {loss_type!r}", unshifted or "bco_pair" in names)
    for name in names:
        for of, tokens in (("chosen_tokens", chosen_tokens), ("rejected_tokens", rejected_tokens)):
            needed = LOSSES[name].tokens and (name != "sft" or of == "chosen_tokens")
            check_range(op, of, None, f"given, as loss_type is {name!r}", tokens is not None or not needed)
    chosen, rejected = wide(chosen), wide(rejected)
    ref_chosen, ref_rejected = (torch.zeros_like(chosen) if t is None else wide(t) for t in (ref_chosen, ref_rejected))
    of_chosen, of_rejected = chosen - ref_chosen, rejected - ref_rejected
    diverge = DIVERGENCES[f_divergence_type]
    scores = diverge(of_chosen, f_alpha_divergence_coef), diverge(of_rejected, f_alpha_divergence_coef)
    # Rows that need no numbers of tokens do not look at them.
    numbers: Any = tuple(None if n is None else n.to(chosen.dtype) for n in (chosen_tokens, rejected_tokens))
    pairs = _Pairs(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        of_chosen,
        of_rejected,
        scores,
        numbers,
        beta,
        label_smoothing,
        discopop_tau,
        _constant(bco_shift),
    )
    losses: Any = None
    for name, factor in zip(names, factors, strict=True):
        values = LOSSES[name].losses(pairs)
        values = values if factor == 1 else factor * values
        losses = values if losses is None else losses + values
    if weights is not None:
        losses = losses * weights.detach().to(losses.dtype)
    return of_pairs(losses, beta * of_chosen, beta * of_rejected)


def _constant(shift: float | Tensor) -> float | Tensor:
    return shift.detach() if isinstance(shift, Tensor) else shift


def check_options(op, loss_type, loss_weights, beta, label_smoothing, discopop_tau, f_divergence_type):
    """(names, weights)"""
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    check_range(op, "loss_type", repr(loss_type), "at least one name", len(names) > 0)
    for name in names:
        check_name(op, "loss_type", name, LOSSES)
    weights = (1.0,) * len(names) if loss_weights is None else tuple(loss_weights)
    check_range(
        op, "loss_weights", repr(loss_weights), f"{len(names)} numbers, one a loss_type", len(weights) == len(names)
    )
    check_smoothing(op, label_smoothing)
    check_range(
        op,
        "label_smoothing",
        label_smoothing,
        f"0, as loss_type is {loss_type!r}",
        not label_smoothing or any(LOSSES[name].smooths for name in names),
    )
    check_range(
        op,
        "label_smoothing",
        label_smoothing,
        "positive for exo_pair (the paper recommends 1e-3)",
        label_smoothing > 0 or "exo_pair" not in names,
    )
    check_range(op, "beta", beta, "positive", beta > 0)
    check_range(op, "discopop_tau", discopop_tau, "positive", discopop_tau > 0)
    check_name(op, "f_divergence_type", f_divergence_type, DIVERGENCES)
    others = [name for name in names if not LOSSES[name].diverges]
    check_range(
        op,
        "f_divergence_type",
        repr(f_divergence_type),
        f"'reverse_kl', as loss_type is {others}",
        f_divergence_type == "reverse_kl" or not others,
    )
    return names, weights


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> PreferenceLoss:
    """Identity preference optimization (Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17)::

        loss = ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta))^2

    beta is the paper's tau. The paper sums log probabilities over tokens; others have averaged them, which is for the
    caller of `sequence_logprobs` to decide. Rewards are ``beta * (logprobs - ref_logprobs)``.

    Arguments as those of `dpo_loss`.
    """
    check_shapes("ipo_loss", "chosen", chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    check_range("ipo_loss", "beta", beta, "positive", beta > 0)
    of_chosen, of_rejected = wide(chosen) - wide(ref_chosen), wide(rejected) - wide(ref_rejected)
    return of_pairs((of_chosen - of_rejected - 1 / (2 * beta)).square(), beta * of_chosen, beta * of_rejected)
