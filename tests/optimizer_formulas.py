"""The update rules once more, from the papers and in float64, for tests: no line is shared with the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Formula:
    """One parameter under one rule: `step(gradient)` moves `p`."""

    def __init__(self, p: Tensor, **options):
        self.p, self.o, self.t = p.detach().double().clone(), options, 0
        self.zero = torch.zeros_like(self.p)
        self.state: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        return self.state.get(name, self.zero)

    def decay(self, update: Tensor) -> Tensor:
        """What decoupled weight decay takes away."""
        shrink = self.o["lr"] * self.o.get("weight_decay", 0.0) * self.p
        return torch.where(update * self.p >= 0, shrink, self.zero) if self.o.get("cautious") else shrink

    def step(self, g: Tensor) -> None:
        self.t += 1
        g = g.double() * (-1 if self.o.get("maximize") else 1)
        if not self.o.get("decoupled_weight_decay"):
            g = g + self.o.get("weight_decay", 0.0) * self.p
            update = self.update(g)
            self.p = self.p - update
        else:
            update = self.update(g)
            self.p = self.p - self.decay(update) - update


class Adam(Formula):
    def update(self, g: Tensor) -> Tensor:
        b1, b2 = self.o.get("betas", (0.9, 0.999))
        m = self.state["m"] = b1 * self.get("m") + (1 - b1) * g
        v = self.state["v"] = b2 * self.get("v") + (1 - b2) * g * g
        if self.o.get("amsgrad"):
            v = self.state["most"] = torch.maximum(self.get("most"), v)
        m, v = m / (1 - b1**self.t), v / (1 - b2**self.t)
        return self.o["lr"] * m / (v.sqrt() + self.o.get("eps", 1e-8))


class SGD(Formula):
    def update(self, g: Tensor) -> Tensor:
        if momentum := self.o.get("momentum", 0.0):
            damped = g if self.t == 1 else (1 - self.o.get("dampening", 0.0)) * g
            buffer = self.state["buffer"] = momentum * self.get("buffer") + damped
            g = g + momentum * buffer if self.o.get("nesterov") else buffer
        return self.o["lr"] * g


class RMSprop(Formula):
    def update(self, g: Tensor) -> Tensor:
        a = self.o.get("alpha", 0.99)
        square = self.state["square"] = a * self.get("square") + (1 - a) * g * g
        if self.o.get("centered"):
            mean = self.state["mean"] = a * self.get("mean") + (1 - a) * g
            square = square - mean * mean
        u = g / (square.sqrt() + self.o.get("eps", 1e-8))
        if momentum := self.o.get("momentum", 0.0):
            u = self.state["buffer"] = momentum * self.get("buffer") + u
        return self.o["lr"] * u


class Adagrad(Formula):
    def update(self, g: Tensor) -> Tensor:
        total = self.get("sum") if self.t > 1 else self.zero + self.o.get("initial_accumulator_value", 0.0)
        total = self.state["sum"] = total + g * g
        lr = self.o["lr"] / (1 + (self.t - 1) * self.o.get("lr_decay", 0.0))
        return lr * g / (total.sqrt() + self.o.get("eps", 1e-10))


class Adamax(Formula):
    def update(self, g: Tensor) -> Tensor:
        b1, b2 = self.o.get("betas", (0.9, 0.999))
        m = self.state["m"] = b1 * self.get("m") + (1 - b1) * g
        most = self.state["most"] = torch.maximum(b2 * self.get("most"), g.abs() + self.o.get("eps", 1e-8))
        return self.o["lr"] / (1 - b1**self.t) * m / most


class Lion(Formula):
    def update(self, g: Tensor) -> Tensor:
        b1, b2 = self.o.get("betas", (0.9, 0.99))
        direction = torch.sign(b1 * self.get("m") + (1 - b1) * g)
        self.state["m"] = b2 * self.get("m") + (1 - b2) * g
        return self.o["lr"] * direction


class LAMB(Formula):
    def step(self, g: Tensor) -> None:
        self.t += 1
        g = g.double() * (-1 if self.o.get("maximize") else 1)
        b1, b2 = self.o.get("betas", (0.9, 0.999))
        m = self.state["m"] = b1 * self.get("m") + (1 - b1) * g
        v = self.state["v"] = b2 * self.get("v") + (1 - b2) * g * g
        u = (m / (1 - b1**self.t)) / ((v / (1 - b2**self.t)).sqrt() + self.o.get("eps", 1e-6))
        decay = self.o.get("weight_decay", 0.01) * self.p
        u = u + (torch.where(u * self.p >= 0, decay, self.zero) if self.o.get("cautious") else decay)
        norms = self.p.norm(), u.norm()
        trust = norms[0] / norms[1] if min(norms) > 0 else 1.0
        self.p = self.p - self.o["lr"] * trust * u


class Muon(Formula):
    def update(self, g: Tensor) -> Tensor:
        momentum = self.o.get("momentum", 0.95)
        buffer = self.state["buffer"] = momentum * self.get("buffer") + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * buffer if self.o.get("nesterov", True) else buffer
        u = torch.stack([self.orthogonal(x) for x in u.reshape(-1, *u.shape[-2:])]).view_as(u)
        rows, columns = u.shape[-2:]
        match = self.o.get("adjust_lr_fn") == "match_rms_adamw"
        return self.o["lr"] * (0.2 * math.sqrt(max(rows, columns)) if match else math.sqrt(max(1, rows / columns))) * u

    def orthogonal(self, x: Tensor) -> Tensor:
        a, b, c = self.o.get("ns_coefficients", (3.4445, -4.7750, 2.0315))
        x = x / max(x.norm().item(), 1e-7)
        for _ in range(self.o.get("ns_steps", 5)):
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        return x


FORMULAS = {
    "Adam": Adam,
    "AdamW": Adam,
    "SGD": SGD,
    "RMSprop": RMSprop,
    "Adagrad": Adagrad,
    "Adamax": Adamax,
    "Lion": Lion,
    "LAMB": LAMB,
    "Muon": Muon,
}
DECOUPLED = ("AdamW", "Lion", "Muon")  # by default
# What each is tested with: options of the constructor.
CASES = {
    "AdamW": [
        {},
        {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
        {"amsgrad": True, "maximize": True},
        {"weight_decay": 0.3, "cautious": True},
        {"weight_decay": 0.0, "eps": 1e-4},
    ],
    "Adam": [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "amsgrad": True},
             {"weight_decay": 0.2, "decoupled_weight_decay": True}],
    "SGD": [{}, {"lr": 0.1, "momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
            {"momentum": 0.8, "nesterov": True, "maximize": True},
            {"momentum": 0.9, "weight_decay": 0.5, "decoupled_weight_decay": True, "cautious": True}],
    "RMSprop": [{}, {"alpha": 0.9, "momentum": 0.9}, {"centered": True}, {"centered": True, "momentum": 0.5},
                {"weight_decay": 0.1, "maximize": True}],
    "Adagrad": [{}, {"lr_decay": 0.1}, {"initial_accumulator_value": 0.5, "eps": 1e-6}, {"weight_decay": 0.1}],
    "Adamax": [{}, {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}, {"maximize": True},
               {"weight_decay": 0.3, "decoupled_weight_decay": True, "cautious": True}],
    "Lion": [{}, {"weight_decay": 0.5, "cautious": True}, {"betas": (0.95, 0.98), "maximize": True},
             {"weight_decay": 0.1, "decoupled_weight_decay": False}],
    "LAMB": [{}, {"weight_decay": 0.0, "maximize": True}, {"weight_decay": 0.3, "cautious": True}],
    "Muon": [{"lr": 0.02}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "lr": 0.02},
             {"momentum": 0.8, "maximize": True, "cautious": True, "weight_decay": 0.5, "lr": 0.02}],
}  # fmt: skip
