"""What an optimizer keeps and moves in a step, by running it, or its parts, on fake tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import optim
from ..optim._muon import _BATCH
from ..optim._orthogonal import compute_in, orthogonalize_
from ..optim._reference import RULES
from ._trace import Phase, Recorder, Work

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": "int8"}
Factory = Callable[[Iterable[Any]], torch.optim.Optimizer]


def resolve(optimizer: Any, state_dtype: torch.dtype | str | None) -> tuple[str | None, Factory | None]:
    """The name of an optimizer, and what makes it from parameters; (None, None) for None.

    Args:
        optimizer: the name of a class of `bigkernels.optim`, in any case, or "torch." and that of one of `torch.optim`;
            a class or a function of parameters; an instance, whose defaults count; or None.
        state_dtype: of the classes of `bigkernels.optim`: torch.float32, torch.bfloat16, "int8", or None for theirs.

    Raises:
        TypeError, ValueError: there is no such optimizer, or it has no choice of `state_dtype`.
    """
    if optimizer is None:
        return None, None
    if isinstance(optimizer, str):
        home = torch.optim if optimizer.lower().startswith("torch.") else optim
        wanted = optimizer.lower().removeprefix("torch.").removeprefix("optim.")
        classes = {
            n.lower(): c
            for n, c in vars(home).items()
            if isinstance(c, type)
            and issubclass(c, torch.optim.Optimizer)
            and c not in (torch.optim.Optimizer, optim.Optimizer)
        }
        if wanted not in classes:
            raise ValueError(
                f"bigkernels.plan: optimizer is {optimizer!r}; accepted are "
                f"{', '.join(sorted(classes))}, the same after 'torch.', classes and None"
            )
        optimizer = classes[wanted]
        name = ("torch." if home is torch.optim else "") + optimizer.__name__
    else:
        name = None
    if isinstance(optimizer, torch.optim.Optimizer):
        cls = type(optimizer)
        known = inspect.signature(cls).parameters
        options = {k: v for k, v in optimizer.defaults.items() if k in known}
        if isinstance(optimizer, optim.Optimizer):
            options["max_grad_norm"] = optimizer.max_grad_norm
        name, optimizer = name or _name(cls), functools.partial(cls, **options)
    if not callable(optimizer):
        raise TypeError(
            f"bigkernels.plan: optimizer is a {type(optimizer).__name__}; accepted are names, classes, "
            "functions of parameters, instances and None"
        )
    if state_dtype is not None:
        if not _is_ours(optimizer):
            raise ValueError(
                "bigkernels.plan: state_dtype is for the classes of bigkernels.optim, and the optimizer "
                f"is {name or _name(optimizer)}"
            )
        optimizer = functools.partial(optimizer, state_dtype=STATE_DTYPES.get(str(state_dtype), state_dtype))
    return name or _name(optimizer), optimizer


def _is_ours(made: Any) -> bool:
    made = made.func if isinstance(made, functools.partial) else made
    return isinstance(made, type) and issubclass(made, optim.Optimizer)


def _name(made: Any) -> str:
    made = made.func if isinstance(made, functools.partial) else made
    home = "torch." if getattr(made, "__module__", "").startswith("torch.") else ""
    return home + getattr(made, "__name__", type(made).__name__)


def step(factory: Factory, parameters: Sequence[Tensor], recorder: Recorder) -> tuple[int, Phase]:
    """The bytes of the states, and the step of an optimizer that has them; the parameters have their gradients.

    The classes of `torch.optim` run. Steps of `bigkernels.optim` work from addresses, which fakes have not: their
    states are made by the code that makes real ones, and a step moves every parameter, gradient and state once.
    """
    # With a seed: one is drawn as a number, which fakes are not.
    optimizer = factory([{"params": parameters, "seed": 0}] if _is_ours(factory) else parameters)
    if isinstance(optimizer, optim.Optimizer):
        return _ours(optimizer, recorder)
    for group in optimizer.param_groups:
        # What torch chooses by itself for plain CUDA tensors, and not for fakes of them.
        if parameters[0].is_cuda and "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
    optimizer.step()
    kept = recorder.hold(dict(optimizer.state), "optimizer state")
    with recorder.phase("optimizer") as phase:
        optimizer.step()
    return kept, phase


def _ours(optimizer: optim.Optimizer, recorder: Recorder) -> tuple[int, Phase]:
    work: list[Any] = []
    matrices: dict[Any, Any] = {}
    for p, number in optimizer._all():
        if p.grad is None:
            continue
        o = optimizer.param_groups[number]
        optimizer._complete(p, number)
        moved = 2 * _bytes(p) + _bytes(p.grad) + 2 * sum(map(_bytes, optimizer.state[p].values()))
        if optimizer.max_grad_norm is not None:
            moved += _bytes(p.grad)
        work.append(Work("bigkernels::optimizer_step", "other", 0, moved))
        if optimizer._rule_of(p, o) is RULES["muon"]:
            key = tuple(p.shape), tuple(o["ns_coefficients"]), o["ns_steps"], o["eps"]
            matrices[key] = matrices.get(key, 0) + 1
    with recorder.phase("optimizer") as phase:
        workspace = _orthogonalised(matrices, phase, optimizer)
    kept = recorder.hold(dict(optimizer.state), "optimizer state") + recorder.hold(workspace, "optimizer state")
    phase.work += work
    return kept, phase


def _orthogonalised(matrices: dict[tuple, int], phase: Phase, optimizer: optim.Optimizer) -> Tensor | None:
    """Muon's products, once for each shape; returns the workspace that it keeps."""
    if not matrices:
        return None
    device = optimizer.param_groups[0]["params"][0].device

    def batch(key: tuple, count: int) -> int:
        return min(count, -(-_BATCH // max(torch.Size(key[0]).numel(), 1)))

    most = max(batch(key, count) * torch.Size(key[0]).numel() for key, count in matrices.items())
    workspace = torch.empty(most, dtype=compute_in(device), device=device)
    for key, count in matrices.items():
        shape, coefficients, steps, eps = key
        together = batch(key, count)
        x = workspace[: together * torch.Size(shape).numel()].view(-1, *shape[-2:])
        begin = len(phase.work)
        orthogonalize_(x, coefficients, steps, eps)
        phase.work += phase.work[begin:] * (-(-count // together) - 1)
    return workspace


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
