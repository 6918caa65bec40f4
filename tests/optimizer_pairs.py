"""Pairs of equal optimizers, of which one runs on kernels that are compared with the CPU's."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bigkernels import optim
from bigkernels.optim import _formats

# Blocks and chunks that are whole and that are not; fewer elements than a warp has lanes.
SIZES = (1, 7, 31, 130, 255, 256, 257, 5001, 8192, 32768 + 257)
CASES = [
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1, "amsgrad": True, "cautious": True, "maximize": True}),
    ("Adam", {"weight_decay": 0.1, "lr": 1e-2}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    ("Adamax", {"weight_decay": 0.1}),
    ("Lion", {"weight_decay": 0.1}),
    ("LAMB", {"weight_decay": 0.1}),
    ("LAMB", {"weight_decay": 0.1, "cautious": True}),
]
# (parameters, gradients, rounding)
TYPES = [
    (torch.float32, torch.float32, "nearest"),
    (torch.float32, torch.bfloat16, "nearest"),
    (torch.bfloat16, torch.bfloat16, "nearest"),
    (torch.bfloat16, torch.float32, "stochastic"),
    (torch.bfloat16, torch.bfloat16, "kahan"),
    (torch.float16, torch.float16, "nearest"),
    (torch.float16, torch.float16, "stochastic"),
]
# (case, how states are stored, types): every format of states with the others, if not with all of them.
ALL = [
    *itertools.product(CASES, (torch.float32,), TYPES),
    *itertools.product(CASES, (torch.bfloat16,), (TYPES[0], TYPES[2], TYPES[3])),
    *itertools.product(CASES, ("int8",), (TYPES[0], TYPES[2], TYPES[4], TYPES[6])),
]


def short(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(map(short, value))
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return str(value).removeprefix("torch.")


def pair(
    name: str, options: dict, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES, device: str = "cpu"
) -> list[optim.Optimizer]:
    """One on the CPU, and the same one on `device`. Every second parameter starts where no vector does."""
    values = [torch.randn(n).to(dtype) for n in sizes]
    made = []
    for place in ("cpu", device):
        params = []
        for number, value in enumerate(values):
            whole = torch.zeros(value.numel() + 1, dtype=dtype, device=place)
            params.append(torch.nn.Parameter(whole[number % 2 :][: value.numel()].copy_(value)))
        made.append(getattr(optim, name)(params, **options))
    for group, first in zip(made[1].param_groups, made[0].param_groups, strict=True):
        group["seed"] = first["seed"]
    return made


def params_of(optimizer: optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizers: list[optim.Optimizer], dtype: torch.dtype, scale: float = 1.0) -> None:
    for params in zip(*map(params_of, optimizers), strict=True):
        g = torch.randn(params[0].shape) * 10.0 ** torch.randint(-3, 1, params[0].shape) * scale
        for p in params:
            p.grad_dtype = dtype
            p.grad = g.to(p.device, dtype)


def memory_of(optimizer: optim.Optimizer) -> list[dict[str, Tensor]]:
    """Of each parameter what a step changes."""
    return [{"param": p.detach(), **optimizer.state.get(p, {})} for p in params_of(optimizer)]


def equalise(optimizer: optim.Optimizer, like: optim.Optimizer) -> None:
    for mine, theirs in zip(memory_of(optimizer), memory_of(like), strict=True):
        for key, value in mine.items():
            value.copy_(theirs[key])


def as_numbers(memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, with what parameter and remainder hold together in the parameter's place."""
    memory = {k: v.detach().cpu() for k, v in memory.items()}
    if "remainder" in memory:
        memory["param"] = _formats.join(memory["param"], memory.pop("remainder"))
    return memory
