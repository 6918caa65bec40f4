"""The update rules in plain PyTorch: the readable specification, and what runs where no kernel does.

Each takes the parameter, the gradient (scaled and clipped by now) and the states in one floating dtype and returns the
parameter; the states are changed in place. `o` are the options of the group, `step` counts from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._orthogonal import orthogonalize_

States = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """An algorithm: the number that the kernels know it by (csrc/include/bigkernels/optimizer.h), its states in their
    order there, which of them have no sign, which a group needs, and its update."""

    name: str
    number: int
    states: tuple[str, ...]
    unsigned: frozenset[str]
    needs: Callable[[dict], tuple[bool, ...]]
    update: Callable[[Tensor, Tensor, States, dict, int], Tensor]


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


def _always(*which: bool) -> Callable[[dict], tuple[bool, ...]]:
    return lambda o: which


_LIST = (
    Rule("adam", 0, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), frozenset({"exp_avg_sq", "max_exp_avg_sq"}),
         lambda o: (True, True, bool(o.get("amsgrad"))), adam),
    Rule("sgd", 1, ("momentum_buffer",), frozenset(), lambda o: (o["momentum"] != 0,), sgd),
    Rule("rmsprop", 2, ("square_avg", "momentum_buffer", "grad_avg"), frozenset({"square_avg"}),
         lambda o: (True, o["momentum"] > 0, bool(o["centered"])), rmsprop),
    Rule("adagrad", 3, ("sum",), frozenset({"sum"}), _always(True), adagrad),
    Rule("lion", 4, ("exp_avg",), frozenset(), _always(True), lion),
    Rule("lamb", 5, ("exp_avg", "exp_avg_sq"), frozenset({"exp_avg_sq"}), _always(True, True), lamb),
    Rule("muon", 6, ("momentum_buffer",), frozenset(), _always(True), muon),
    # What is left of SGD without momentum: a step along what it is given.
    Rule("descent", 1, (), frozenset(), _always(), sgd),
)  # fmt: skip
RULES = {rule.name: rule for rule in _LIST}
