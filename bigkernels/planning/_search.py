"""Which combinations of policies fit a memory limit, and how fast each may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from . import _optimizers
from ._report import Choice, _size
from ._run import PATCHES, Result, Setting, run, seconds_of

if TYPE_CHECKING:
    from ..bench.limits import Limits

_POLICIES = (None, "selective", "selective+int8", "int8", "recompute", "recompute+int8")
_POLICIES_OF_GPUS = ("offload", "recompute+offload")
_STATES = ("float32", "bfloat16", "int8")


def search(
    made: nn.Module,
    setting: Setting,
    optimizer: Any,
    state_dtype: Any,
    limit: int,
    machine: Limits,
    label: str,
    planned: Result,
    progress: Callable | None,
) -> tuple[tuple[Choice, ...], str | None]:
    """All combinations, those that fit first, by time; and the reason where none fits.

    Checkpointing and `patch` each take a run; the state dtypes of an optimizer only change what lies beside it.
    """
    training = setting.mode == "train"
    policies = [setting.checkpointing, *_POLICIES, *(_POLICIES_OF_GPUS if setting.device.type == "cuda" else ())]
    policies = list(dict.fromkeys(policies)) if training else [None]
    patches = {label: setting.patch, **PATCHES}
    if not training:
        del patches["loss"]
    states: list[str | None] = _states(optimizer, state_dtype) if training else [None]
    choices = []
    for name, flags in patches.items():
        for policy in policies:
            if progress is not None:
                progress(f"checkpointing {policy or 'none'}, patched: {name}")
            wanted = replace(setting, patch=flags, checkpointing=policy)
            choices += _plan_states(made, wanted, optimizer, states, limit, machine, name)
    fitting = sorted((c for c in choices if c.fits), key=lambda c: (c.seconds, c.peak))
    rest = sorted((c for c in choices if not c.fits), key=lambda c: (c.problem is not None, c.peak))
    reason = None
    if not fitting:
        reason = _why(planned, rest, limit)
    return (*fitting, *rest), reason


def _states(optimizer: Any, state_dtype: Any) -> list[str | None]:
    """The dtypes of states to choose from; [None] where the optimizer has no choice."""
    given = None if state_dtype is None else str(state_dtype).removeprefix("torch.")
    try:
        _optimizers.resolve(optimizer, "int8")
    except ValueError:
        return [None]
    return list(dict.fromkeys([given or "float32", *_STATES])) if optimizer is not None else [None]


def _plan_states(
    made: nn.Module, setting: Setting, optimizer: Any, states: list[str | None], limit: int, machine: Limits, patch: str
) -> list[Choice]:
    policy = setting.checkpointing and str(setting.checkpointing)
    factories = [_optimizers.resolve(optimizer, dtype)[1] for dtype in states]
    try:
        results = run(made, setting, factories)
    except Exception as error:  # noqa: BLE001  a policy that a model does not bear is an answer, and no failure
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        return [Choice(policy, None, patch, 0, 0.0, False, problem)]
    return [
        Choice(
            policy, dtype, patch, result.peak, sum(seconds_of(p, machine) for p in result.phases), result.peak <= limit
        )
        for dtype, result in zip(states, results, strict=True)
    ]


def _why(planned: Result, rest: list[Choice], limit: int) -> str:
    possible = [c for c in rest if c.problem is None]
    if not possible:
        return "No combination could be planned."
    least = possible[0]
    fixed = planned.held.get("parameters", 0) + planned.held.get("gradients", 0)
    why = f"Nothing fits: the smallest needs {_size(least.peak)}, {_size(least.peak - limit)} too much ({least})."
    if fixed > limit:
        why += f" Parameters and gradients alone are {_size(fixed)}."
    return why
