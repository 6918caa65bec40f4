"""Norms of gradients: of plain and distributed tensors, on any device, added up so that their order does not matter."""

# mypy: ignore-errors

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_private import foreach_mul_
from ..ops import optimizer as ops
from ..ops import registry
from . import _plan
from ._plan import Plan, local


def squares(plan: Plan, grads: Tensor) -> Tensor:
    """The sum of squares of all gradients of a plan, shards of other ranks included: float64 ()."""
    sums = torch.empty(len(plan.params), dtype=torch.float64, device=plan.device)
    ops.norm(plan.tensors, grads, plan.chunks, sums, False)
    return added(plan.params, sums)


def complete(t: Tensor) -> Tensor:
    """A distributed tensor whose sum over ranks has been taken; any other as it is."""
    if any(placement.is_partial() for placement in getattr(t, "placements", ())):
        from torch.distributed.tensor import Replicate

        return t.redistribute(t.device_mesh, [Replicate() if p.is_partial() else p for p in t.placements])
    return t


def squares_of(grad: Tensor) -> Tensor:
    grad = complete(grad)
    grad = grad.coalesce() if grad.layout == torch.sparse_coo else grad
    here = grad.values() if grad.layout == torch.sparse_coo else local(grad)
    return added([grad], here.detach().abs().double().square().sum().view(1))


def total(parts: list[Tensor]) -> Tensor:
    """The sum of numbers on several devices, on the first one's."""
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _shards(t: Tensor) -> tuple | None:
    """The process groups that hold the other parts of a distributed tensor; None where this rank has all of it."""
    if not hasattr(t, "placements"):
        return None
    dims = tuple(i for i, placement in enumerate(t.placements) if not placement.is_replicate())
    return (t.device_mesh, dims) if dims else None


def over_shards(tensors: list[Tensor], values: Tensor, op=None) -> Tensor:
    """`values`, one row a tensor, reduced over the ranks that share each tensor."""
    keys: dict[tuple, list[int]] = {}
    for i, t in enumerate(tensors):
        if key := _shards(t):
            keys.setdefault(key, []).append(i)
    for (mesh, dims), rows in keys.items():
        at = torch.tensor(rows, dtype=torch.int64, device=values.device)
        part = values[at]
        for dim in dims:
            dist.all_reduce(part, op or dist.ReduceOp.SUM, group=mesh.get_group(dim))
        values = values.index_copy(0, at, part)
    return values


def added(tensors: list[Tensor], sums: Tensor) -> Tensor:
    """In the order of size, so that it does not matter in which order the tensors came."""
    return over_shards(tensors, sums).sort().values.sum()


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all tensors together, as if they were one vector, in one pass over them.

    Args:
        tensors: of any shapes, dtypes and devices, distributed ones among them: those give the norm of the whole.
        norm_type: the p of the p-norm; math.inf for the largest magnitude.
        error_if_nonfinite: raise where the norm is not finite. On a GPU this waits for the device.
        foreach: unused; torch.nn.utils.get_total_norm has it.

    Returns:
        float32 () on the device of the first tensor, or float64 where one of them is; computed in float64.

    Raises:
        RuntimeError: `error_if_nonfinite` and the norm is not finite.
        ValueError: `norm_type` is NaN.
    """
    tensors, p = _listed(tensors), float(norm_type)
    if math.isnan(p):
        raise ValueError(f"bigkernels.optim.get_total_norm: norm_type is {norm_type}")
    if not tensors:
        return torch.tensor(0.0, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        tensors = [complete(t) for t in tensors]
        parts = _parts(tensors, p)
        device = local(tensors[0]).device
        together = torch.stack([part.to(device) for part in parts])
        if p == math.inf:
            norm = together.amax()
        elif p == -math.inf:
            norm = together.amin()
        else:
            norm = together.sort().values.sum()
            norm = norm.sqrt() if p == 2.0 else norm if p in (0.0, 1.0) else norm ** (1.0 / p)
        wide = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
        norm = norm if wide else norm.float()
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"bigkernels.optim: the gradients' norm of order {norm_type} is not finite")
    return norm


def _parts(tensors: list[Tensor], p: float) -> list[Tensor]:
    """For each tensor the sum of its p-th powers, or its extreme: float64 (), shards included."""
    op = {math.inf: dist.ReduceOp.MAX, -math.inf: dist.ReduceOp.MIN}.get(p) if dist.is_available() else None
    values: list[Tensor | None] = [None] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        here = _values(t)
        if p in (2.0, math.inf) and ops.why_not(here.device.type, here.dtype, registry._forced) is None:
            by_device.setdefault(here.device, []).append(i)
        else:
            values[i] = _power(here, p)
    for device, indices in by_device.items():
        flat = [_values(tensors[i]) for i in indices]
        flat = [t if _plan.dense(t) else t.contiguous() for t in flat]
        norms = torch.empty(len(flat), dtype=torch.float64, device=device)
        ops.norm(*_plan.only_gradients(flat, device), norms, p == math.inf)
        for i, value in zip(indices, norms.unbind(), strict=True):
            values[i] = value
    reduced = []
    for t, value in zip(tensors, values, strict=True):
        key = _shards(t)
        if key:
            value = over_shards([t], value.view(1), op)[0]
        reduced.append(value)
    return reduced


def _values(t: Tensor) -> Tensor:
    """The elements of a tensor that are here."""
    return local(t if t.layout == torch.strided else t.coalesce().values())


def _power(t: Tensor, p: float) -> Tensor:
    t = t.abs().double()
    if t.numel() == 0:
        return torch.full((), math.inf if p == -math.inf else 0.0, dtype=torch.float64, device=t.device)
    if p in (math.inf, -math.inf):
        return t.amax() if p > 0 else t.amin()
    return (t != 0).double().sum() if p == 0 else t.pow(p).sum()


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients so that their norm together is at most `max_norm`; returns the norm before.

    As torch.nn.utils.clip_grad_norm_, with one pass for the norm on any mix of devices and dtypes. An optimizer of this
    package needs no call: `max_grad_norm` clips inside the step, where the second pass costs nothing.

    Args:
        parameters: whose `.grad` are clipped; those without one are left out.
        max_norm: the largest norm allowed.
        norm_type: the p of the p-norm; math.inf for the largest magnitude.
        error_if_nonfinite: raise where the norm is not finite, before anything is scaled.
        foreach: unused; torch's function has it.

    Returns:
        float32 () on the device of the first gradient, or float64 where one of them is.
    """
    grads = [p.grad for p in _listed(parameters) if p.grad is not None]
    norm = get_total_norm(grads, norm_type, error_if_nonfinite)
    # Always multiplied, as torch does: to ask whether it is needed would wait for the device.
    coefficient = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    with torch.no_grad():
        by_kind: dict[tuple, list[Tensor]] = {}
        for g in grads:
            if g.layout != torch.strided:
                g.mul_(coefficient.to(g.device))
                continue
            here = g.to_local() if hasattr(g, "to_local") else g
            by_kind.setdefault((here.device, here.dtype), []).append(here.detach())
        for (device, _), kind in by_kind.items():
            foreach_mul_(kind, coefficient.to(device))
    return norm


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Clamp each element of the gradients to [-clip_value, clip_value], as torch.nn.utils.clip_grad_value_.

    Raises:
        ValueError: `clip_value` is not positive.
    """
    clip_value = float(clip_value)
    if not clip_value > 0:
        raise ValueError(f"bigkernels.optim.clip_grad_value_: clip_value is {clip_value}; it has to be positive")
    torch.nn.utils.clip_grad_value_(parameters, clip_value, foreach)
