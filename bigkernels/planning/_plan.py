"""`plan`: what a run needs before it is started."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .._torch_private import PLANNING, require
from . import _models, _optimizers, _search
from ._report import MemoryPlan, PhasePlan
from ._run import PATCHES, Setting, run, seconds_of
from ._steps import Loss, default_loss

if TYPE_CHECKING:
    from ..bench.limits import Limits
    from ..checkpointing import Policy

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_MODES = ("train", "inference")


def plan(
    model: _models.Model,
    *,
    batch: int = 1,
    seq: int = 1024,
    dtype: torch.dtype | str | None = None,
    autocast: torch.dtype | str | None = None,
    mode: str = "train",
    new_tokens: int = 0,
    optimizer: Any = "adamw",
    state_dtype: torch.dtype | str | None = None,
    checkpointing: str | Policy | None = None,
    every: int = 1,
    patch: bool | str | Mapping[str, bool] = False,
    device: torch.device | str = "cpu",
    inputs: Any = None,
    loss: Loss | None = None,
    limit: int | str | None = None,
    limits: Limits | Mapping[str, Any] | None = None,
    progress: Any = None,
) -> MemoryPlan:
    """What a training step or a generation will hold at most, compute and take at least, without running it.

    The step runs on tensors that have shapes and no memory (`FakeTensorMode`): the model's own code, its `patch`, the
    checkpointing policy, the loss, backward, and the optimizer. What torch's allocator would hold is followed storage
    by storage. Not in it: what kernels take and free within a call, what the allocator itself wastes, other programs.
    A training step is one that follows others: the optimizer has its states, and gradients were set to None.

    Times are the sum over operators of the larger of two: operations by the fastest matrix product of their dtype, and
    bytes by the bandwidth of memory (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785). Real steps take
    longer; what matters is the order.

    Args:
        model: a module on any device, which is neither changed nor copied in memory; a configuration of transformers;
            or the path of a folder with a config.json.
        batch, seq: shape of the token numbers of a step, (batch, seq).
        dtype: of floating parameters; None: as they are.
        autocast: run inside autocast to this dtype.
        mode: "train", or "inference": a forward pass over `seq` tokens without gradients that fills a cache, and
            `new_tokens` after it.
        optimizer: the name of a class of `bigkernels.optim` in any case, or "torch." and that of one of `torch.optim`;
            a class or a function of parameters; an instance, of which class and defaults count; or None.
        state_dtype: of a `bigkernels.optim` optimizer: torch.float32, torch.bfloat16 or "int8".
        checkpointing, every: as `policy` and `every` of `bigkernels.apply_checkpointing`.
        patch: True as `bigkernels.patch(model)`, "loss" for the loss alone, or its arguments.
        device: "cpu", or "cuda" where there is one.
        inputs: a tensor, or a tuple or dictionary of them, of the shapes of one batch; by default token numbers and
            labels, or images, as a model of transformers takes them.
        loss: `loss(model, inputs)` gives the scalar; by default the `loss` that a model of transformers returns, and
            the sum of the first output of others.
        limit: bytes, or a string such as "24GB" or "16GiB": also look for combinations of checkpointing, state dtype
            and patch that fit.
        limits: of the machine; by default measured, once a process. A mapping has "copy" in bytes a second and "matrix"
            in FLOP a second by dtype.
        progress: called with a line before each combination of a search.

    Raises:
        TypeError, ValueError: an argument is not what is accepted.
        RuntimeError: the model's code depends on values, which fake tensors have not.
    """
    require(PLANNING, "plan")
    device = _device(device)
    if mode not in _MODES:
        raise ValueError(f"bigkernels.plan: mode is {mode!r}; accepted are 'train' and 'inference'")
    for name, value in {"batch": batch, "seq": seq, "new_tokens": new_tokens, "every": every}.items():
        least = 0 if name == "new_tokens" else 1
        if not isinstance(value, int) or value < least:
            raise ValueError(f"bigkernels.plan: {name} is {value!r}; accepted are integers from {least} on")
    if mode == "inference":
        optimizer = state_dtype = checkpointing = None
    allowed = parse_bytes(limit)
    given, cast = _dtype("dtype", dtype), _dtype("autocast", autocast)
    label, flags = _patch(patch)
    optimizer_name, factory = _optimizers.resolve(optimizer, state_dtype)
    structure = _models.structure(model, given)
    machine = _limits(limits, device)
    setting = Setting(
        mode, batch, seq, device, new_tokens, cast, checkpointing, every, flags, inputs, loss or default_loss, machine
    )
    (result,) = run(structure, setting, [factory])
    choices: tuple[_search.Choice, ...] = ()
    reason: str | None = None
    if allowed is not None:
        choices, reason = _search.search(
            structure, setting, optimizer, state_dtype, allowed, machine, label, result, progress
        )
    phases = tuple(
        PhasePlan(p.name, result.peaks[p.name], p.flops, p.bytes, seconds_of(p, machine)) for p in result.phases
    )
    flops, seconds = _together(phases, new_tokens)
    floating = [p.dtype for p in structure.parameters() if p.is_floating_point()]
    return MemoryPlan(
        model=_models.name_of(model),
        mode=mode,
        batch=batch,
        seq=seq,
        new_tokens=new_tokens,
        device=str(device),
        dtype=_short(max(set(floating), key=floating.count)) if floating else "none",
        autocast=_short(cast) if cast else None,
        optimizer=optimizer_name,
        state_dtype=_short(state_dtype) if state_dtype else None,
        checkpointing=str(checkpointing) if checkpointing else None,
        patch=label,
        held=result.held,
        at_peak=result.at_peak,
        peak=result.peak,
        phases=phases,
        flops=flops,
        seconds=seconds,
        limits={"copy": machine.copy, "matrix": dict(machine.matrix)},
        limit=allowed,
        choices=choices,
        reason=reason,
    )


def _together(phases: tuple[PhasePlan, ...], new_tokens: int) -> tuple[int, float]:
    """Of a whole step; tokens cost more the later they come, by equal steps."""
    first = [p for p in phases if not p.name.endswith("token")]
    tokens = [p for p in phases if p.name.endswith("token")]
    flops, seconds = sum(p.flops for p in first), sum(p.seconds for p in first)
    if tokens:
        flops += new_tokens * sum(p.flops for p in tokens) // len(tokens)
        seconds += new_tokens * sum(p.seconds for p in tokens) / len(tokens)
    return flops, seconds


def parse_bytes(limit: int | str | None) -> int | None:
    """
    Raises:
        ValueError: it is no number of bytes.
    """
    if isinstance(limit, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?i?)b?\s*", limit.lower())
        if match and re.fullmatch(r"[0-9.\s]+", limit):  # gigabytes, most likely
            number = limit.strip()
            raise ValueError(f"bigkernels.plan: limit is {limit!r}, which has no unit; write {number}GB or {number}B")
        try:
            if match is None:
                raise ValueError
            limit = int(float(match[1]) * _UNITS[match[2]])
        except (KeyError, ValueError):
            raise ValueError(
                f"bigkernels.plan: limit is {limit!r}; accepted are bytes and strings such as '24GB' and '16GiB'"
            ) from None
    if limit is not None and not (isinstance(limit, int) and limit > 0):
        raise ValueError(f"bigkernels.plan: limit is {limit!r}; accepted are positive numbers of bytes")
    return limit


def _device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"bigkernels.plan: device is {str(device)!r}; accepted are 'cpu' and 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("bigkernels.plan: device is 'cuda', and there is none here: autograd asks it for streams")
    return device


def _dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise ValueError(f"bigkernels.plan: {name} is {dtype!r}; accepted are floating dtypes and their names")
    return resolved


def _patch(patch: bool | str | Mapping[str, bool]) -> tuple[str, dict[str, Any] | None]:
    if isinstance(patch, bool):
        patch = "yes" if patch else "no"
    if isinstance(patch, str):
        if patch not in PATCHES:
            raise ValueError(f"bigkernels.plan: patch is {patch!r}; accepted are True, False, 'loss' and a dictionary")
        return patch, PATCHES[patch]
    return ", ".join(f"{k}={v}" for k, v in patch.items()) or "yes", dict(patch)


def _limits(limits: Limits | Mapping[str, Any] | None, device: torch.device) -> Limits:
    from ..bench.limits import Limits

    if limits is None:
        return _measured(device.type, torch.get_num_threads())
    if isinstance(limits, Limits):
        return limits
    if not {"copy", "matrix"} <= set(limits):
        raise ValueError(f"bigkernels.plan: limits has {sorted(limits)}; needed are 'copy' and 'matrix'")
    return Limits(device.type, float(limits["copy"]), dict(limits["matrix"]), "given", "given")


@functools.cache
def _measured(device: str, threads: int) -> Limits:
    from ..bench.limits import measure

    return measure(device, seconds=0.1, caches=False)


def _short(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
