"""The update rules in plain PyTorch: the readable specification, and what runs where no kernel does.

Each takes the parameter, the gradient (scaled and clipped by now) and the states in one floating dtype and returns the
parameter; the states are changed in place. `o` are the options of the group, `step` counts from 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ._orthogonal import orthogonalize_

States = dict[str, Tensor]


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be: from `least` on, up to `limit` and without it."""

    words: str
    least: float
    limit: float = math.inf

    def has(self, value: float) -> bool:
        return self.least <= value < self.limit


NOT_NEGATIVE = Range("finite numbers from 0 on", 0.0)
FRACTION = Range("numbers in [0, 1)", 0.0, 1.0)
FINITE = Range("finite numbers", -sys.float_info.max)


@dataclass(frozen=True)
class State:
    """A tensor of the parameter's shape that an algorithm keeps.

    Attributes:
        signed: whether its 8-bit codes have a sign.
        when: whether the options of a group ask for it.
        start: the option whose value it is filled with before the first step; None: zero.
    """

    name: str
    signed: bool = True
    when: Callable[[dict], bool] = lambda o: True
    start: str | None = None


@dataclass(frozen=True)
class Rule:
    """An algorithm, and all that the rest of this package has to know of it.

    Attributes:
        number: what the kernels know it by (csrc/include/bigkernels/optimizer.h).
        update: what it does, in plain PyTorch.
        kept: its states, in the kernels' order.
        options: numbers of its own in a group, beside lr and weight_decay.
        counts: whether torch's class of this name saves how many steps it took; if not, a state means one.
        starts_with_state: whether the count begins again with the first state.
        whole: whether it needs all of a distributed parameter (a norm, a product), and no rank can make its part alone.
        measured: whether a first pass leaves the states and measures the direction, and `update` reads the states as
            they are stored by then.
    """

    name: str
    number: int
    update: Callable[[Tensor, Tensor, States, dict, int], Tensor]
    kept: tuple[State, ...] = ()
    options: Mapping[str, Range] = field(default_factory=dict)
    counts: bool = True
    starts_with_state: bool = False
    whole: bool = False
    measured: bool = False

    @cached_property
    def states(self) -> tuple[str, ...]:
        return tuple(state.name for state in self.kept)

    def needs(self, o: dict) -> tuple[State, ...]:
        """The states that a group of these options has."""
        return tuple(state for state in self.kept if state.when(o))


def decayed(p: Tensor, u: Tensor, o: dict) -> Tensor:
    """The parameter after decoupled decay; cautious: only where the decay has the direction of the update `u`."""
    if not o["decoupled_weight_decay"] or o["weight_decay"] == 0:
        return p
    shrink = o["lr"] * o["weight_decay"]
    return torch.where(u * p >= 0, p - p * shrink, p) if o["cautious"] else p * (1 - shrink)


def with_l2(p: Tensor, g: Tensor, o: dict) -> Tensor:
    return g if o["decoupled_weight_decay"] or o["weight_decay"] == 0 else g + p * o["weight_decay"]


def _moments(g: Tensor, s: States, o: dict, step: int) -> tuple[Tensor, Tensor]:
    """Both moments without the bias of their start from zero."""
    beta1, beta2 = o["betas"]
    s["exp_avg"].lerp_(g, 1 - beta1)
    s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    second = s["exp_avg_sq"]
    if o.get("amsgrad"):
        second = s["max_exp_avg_sq"].copy_(torch.maximum(s["max_exp_avg_sq"], second))
    return s["exp_avg"] / (1 - beta1**step), second / (1 - beta2**step)


def adam(p: Tensor, g: Tensor, s: States, o: dict, step: int) -> Tensor:
    """Kingma and Ba 2015 (https://arxiv.org/abs/1412.6980); with decoupled decay Loshchilov and Hutter 2019
    (https://arxiv.org/abs/1711.05101); amsgrad Reddi et al. 2018."""
    first, second = _moments(with_l2(p, g, o), s, o, step)
    u = first / (second.sqrt() + o["eps"]) * o["lr"]
    return decayed(p, u, o) - u


def sgd(p: Tensor, g: Tensor, s: States, o: dict, step: int) -> Tensor:
    """Sutskever et al. 2013, as torch.optim.SGD has it: the first momentum is the gradient itself."""
    g = with_l2(p, g, o)
    if o["momentum"]:
        buffer = s["momentum_buffer"]
        buffer.mul_(o["momentum"]).add_(g, alpha=1.0 if step == 1 else 1 - o["dampening"])
        g = g + buffer * o["momentum"] if o["nesterov"] else buffer
    u = g * o["lr"]
    return decayed(p, u, o) - u


def rmsprop(p: Tensor, g: Tensor, s: States, o: dict, step: int) -> Tensor:
    """Hinton's lecture 6e (2012), centered: Graves 2013 (https://arxiv.org/abs/1308.0850)."""
    g = with_l2(p, g, o)
    variance = s["square_avg"].mul_(o["alpha"]).addcmul_(g, g, value=1 - o["alpha"])
    if o["centered"]:
        mean = s["grad_avg"].lerp_(g, 1 - o["alpha"])
        variance = (variance - mean * mean).clamp(min=0)  # rounding may take it below zero
    u = g / (variance.sqrt() + o["eps"])
    if o["momentum"]:
        u = s["momentum_buffer"].mul_(o["momentum"]).add_(u)
    u = u * o["lr"]
    return decayed(p, u, o) - u


def adagrad(p: Tensor, g: Tensor, s: States, o: dict, step: int) -> Tensor:
    """Duchi, Hazan and Singer 2011."""
    g = with_l2(p, g, o)
    s["sum"].addcmul_(g, g)
    u = g / (s["sum"].sqrt() + o["eps"]) * (o["lr"] / (1 + (step - 1) * o["lr_decay"]))
    return decayed(p, u, o) - u


def lion(p: Tensor, g: Tensor, s: States, o: dict, step: int) -> Tensor:
    """Chen et al. 2023 (https://arxiv.org/abs/2302.06675)."""
    g = with_l2(p, g, o)
    beta1, beta2 = o["betas"]
    u = (s["exp_avg"] * beta1 + g * (1 - beta1)).sign() * o["lr"]
    s["exp_avg"].mul_(beta2).add_(g, alpha=1 - beta2)
    return decayed(p, u, o) - u


def adamax(p: Tensor, g: Tensor, s: States, o: dict, step: int) -> Tensor:
    """Kingma and Ba 2015 (https://arxiv.org/abs/1412.6980), section 7.1; eps is beside the gradient, as in torch."""
    g = with_l2(p, g, o)
    beta1, beta2 = o["betas"]
    s["exp_avg"].lerp_(g, 1 - beta1)
    s["exp_inf"].copy_(torch.maximum(s["exp_inf"] * beta2, g.abs() + o["eps"]))
    u = s["exp_avg"] / s["exp_inf"] * (o["lr"] / (1 - beta1**step))
    return decayed(p, u, o) - u


def lamb_direction(p: Tensor, s: States, o: dict, step: int) -> Tensor:
    beta1, beta2 = o["betas"]
    first, second = s["exp_avg"] / (1 - beta1**step), s["exp_avg_sq"] / (1 - beta2**step)
    u = first / (second.sqrt() + o["eps"])
    decay = p * o["weight_decay"]
    return u + (torch.where(u * p >= 0, decay, 0) if o["cautious"] else decay)


def trust_ratio(param_squares: Tensor, direction_squares: Tensor) -> Tensor:
    """|p| / |direction|, and 1 where either is zero."""
    ratio = (param_squares / direction_squares).sqrt()
    return torch.where((param_squares > 0) & (direction_squares > 0), ratio, 1.0)


def lamb(p: Tensor, g: Tensor, s: States, o: dict, step: int) -> Tensor:
    """You et al. 2020 (https://arxiv.org/abs/1904.00962), with the bias of the moments taken out and the decay as a
    part of the direction whose length the trust ratio sets."""
    _moments(g, s, o, step)
    trust = trust_ratio(p.square().sum(), lamb_direction(p, s, o, step).square().sum())
    # The kernels' second pass reads the states as they are stored by then.
    return p - lamb_direction(p, o.get("stored", dict)(s), o, step) * trust * o["lr"]


def muon_direction(g: Tensor, s: States, o: dict) -> Tensor:
    """What Muon orthogonalises."""
    buffer = s["momentum_buffer"].lerp_(g, 1 - o["momentum"])
    return g.lerp(buffer, o["momentum"]) if o["nesterov"] else buffer.clone()


def muon_factor(shape: torch.Size, adjust: str | None) -> float:
    """What lr is multiplied with for a matrix of this shape, as torch.optim.Muon has it."""
    rows, columns = shape[-2:]
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjust == "spectral_unclamped":
        return math.sqrt(rows / max(columns, 1))
    return math.sqrt(max(1.0, rows / max(columns, 1)))


def muon(p: Tensor, g: Tensor, s: States, o: dict, step: int) -> Tensor:
    """Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), of each matrix of a stack."""
    u = muon_direction(g, s, o)
    x = u.reshape(-1, *u.shape[-2:]).contiguous()
    factor = muon_factor(p.shape, o["adjust_lr_fn"])
    u = orthogonalize_(x, o["ns_coefficients"], o["ns_steps"], o["eps"], factor).view_as(u) * o["lr"]
    return decayed(p, u, o) - u


def _has_momentum(o: dict) -> bool:
    return o["momentum"] != 0


_BETAS = {"betas": FRACTION, "eps": NOT_NEGATIVE}
_LIST = (
    Rule(
        "adam",
        0,
        adam,
        kept=(
            State("exp_avg"),
            State("exp_avg_sq", signed=False),
            State("max_exp_avg_sq", signed=False, when=lambda o: bool(o.get("amsgrad"))),
        ),
        options=_BETAS,
    ),
    Rule(
        "sgd",
        1,
        sgd,
        kept=(State("momentum_buffer", when=_has_momentum),),
        options={"momentum": NOT_NEGATIVE, "dampening": FINITE},
        counts=False,
        starts_with_state=True,  # the first momentum is the gradient itself
    ),
    Rule(
        "rmsprop",
        2,
        rmsprop,
        kept=(
            State("square_avg", signed=False),
            State("momentum_buffer", when=_has_momentum),
            State("grad_avg", when=lambda o: bool(o["centered"])),
        ),
        options={"eps": NOT_NEGATIVE, "momentum": NOT_NEGATIVE, "alpha": FRACTION},
    ),
    Rule(
        "adagrad",
        3,
        adagrad,
        kept=(State("sum", signed=False, start="initial_accumulator_value"),),
        options={"eps": NOT_NEGATIVE, "lr_decay": NOT_NEGATIVE, "initial_accumulator_value": NOT_NEGATIVE},
    ),
    Rule("lion", 4, lion, kept=(State("exp_avg"),), options={"betas": FRACTION}),
    Rule(
        "lamb",
        5,
        lamb,
        kept=(State("exp_avg"), State("exp_avg_sq", signed=False)),
        options=_BETAS,
        whole=True,
        measured=True,
    ),
    Rule(
        "muon",
        6,
        muon,
        kept=(State("momentum_buffer"),),
        options={"eps": NOT_NEGATIVE, "momentum": NOT_NEGATIVE},
        counts=False,
        whole=True,
    ),
    Rule("adamax", 7, adamax, kept=(State("exp_avg"), State("exp_inf", signed=False)), options=_BETAS),
    # What is left of SGD without momentum: a step along what it is given.
    Rule("descent", 1, sgd),
)
RULES = {rule.name: rule for rule in _LIST}
