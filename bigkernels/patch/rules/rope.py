"""Calls of a function that applies rotary embeddings, decided by what the function computes."""

# mypy: ignore-errors

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional
from .._device import CPU, once_a_device, probe_device, probing_on
from .._isolated import isolated
from .._rule import Fit, Plan, Site, Skip, SourceRule
from .._source import Source, call
from .._verify import Probes, compare, doubled, gradients, outputs_only, plain, undisturbed


class Rope(NamedTuple):
    """What a rotary function computes. Its arguments are (x, cos, sin) or (q, k, cos, sin), then `unsqueeze_dim`."""

    single: bool  # one tensor, not a pair
    named: bool  # whether it takes unsqueeze_dim
    dim: int  # the axis of the heads: 1 in (B, H, S, D), 2 in (B, S, H, D)
    interleaved: bool
    halves: bool  # interleaved, but cos and sin repeat their first half and not each value
    partial: bool = False  # whether cos may be narrower than the heads
    mixed: bool = False  # whether a 16-bit q with float32 cos gives a 16-bit result
    autocast: bool = True  # whether autocast leaves the dtype alone

    @property
    def kernel(self) -> str:
        return "rope (interleaved)" if self.interleaved else "rope"

    def fits(self, q: Any, k: Any, cos: Any, sin: Any, dim: Any) -> bool:
        """Whether the kernel gives what the function gives for these arguments, dtype included."""
        if self.single and k is None:
            k = q
        if dim not in (1, 2) or not plain(q, k, cos, sin) or not q.dim() == k.dim() == 4 or cos.dim() != 3:
            return False
        batch, length, size = q.shape[0], q.shape[3 - dim], q.shape[3]
        rotary = cos.shape[2]
        return (
            (k.shape[0], k.shape[3 - dim], k.shape[3]) == (batch, length, size)
            and cos.shape[0] in (1, batch)
            and cos.shape[1] == length
            and sin.shape == cos.shape
            and rotary % 2 == 0
            and (rotary == size or (self.partial and rotary < size))
            and q.dtype == k.dtype
            and cos.dtype == sin.dtype
            and q.is_floating_point()
            and (cos.dtype == q.dtype or (self.mixed and cos.dtype == torch.float32 and q.dtype == torch.bfloat16))
            and q.device == k.device == cos.device == sin.device
            and (self.autocast or not torch.is_autocast_enabled(q.device.type))
        )

    def compute(self, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, dim: int) -> Any:
        if dim == 2:
            q, k = q.transpose(1, 2), None if k is None else k.transpose(1, 2)
        if self.halves:
            half = cos.shape[-1] // 2
            cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
        out = functional.rope(q, q[:, :0] if k is None else k, cos, sin, interleaved=self.interleaved)
        if dim == 2:
            out = tuple(t.transpose(1, 2) for t in out)
        return out[0] if self.single else out


def _helper(verified: Callable, rope: Rope) -> Callable:
    """Calls `function` as the model does, or the kernel where that is the verified function and the call fits."""

    def apply(function: Any, q: Any, cos: Any, sin: Any, k: Any = None, unsqueeze_dim: Any = rope.dim) -> Any:
        if function is verified and rope.fits(q, k, cos, sin, unsqueeze_dim):
            return rope.compute(q, k, cos, sin, unsqueeze_dim)
        tensors = (q, cos, sin) if rope.single else (q, k, cos, sin)
        return function(*tensors, unsqueeze_dim=unsqueeze_dim) if rope.named else function(*tensors)

    return apply


def _sites(source: Source) -> Iterator[Site]:
    number = 0
    for node in source.body():
        if not isinstance(node, ast.Call):
            continue
        function = source.constant(node.func)
        if not isinstance(function, types.FunctionType):
            continue
        names = list(inspect.signature(function).parameters)
        if "cos" not in names or "sin" not in names:
            continue
        number += 1
        name = f"_bigkernels_rope_{number}"
        options = _identify(function)
        arguments = _bind(node, names, options) if isinstance(options, Rope) else None
        if arguments is None:
            reason = options if isinstance(options, Skip) else Skip(f"{function.__name__} is called in another way")
            yield Site(_refuse(reason), {}, {})
        else:
            new = call(name, node.func, **arguments)
            yield Site(_accept(options, function), {node: new}, {name: _helper(function, options)})


def _accept(rope: Rope, function: Callable):
    return lambda module, plan: Fit(rope.kernel, _error(function, rope))


def _refuse(reason: Skip):
    def check(module: nn.Module, plan: Plan) -> Fit | None:
        raise reason

    return check


def _bind(node: ast.Call, names: list[str], rope: Rope) -> dict[str, ast.expr] | None:
    """The call's arguments under the helper's names, in the order written; None if it passes anything else."""
    given = dict(zip(names, node.args, strict=False)) | {k.arg: k.value for k in node.keywords}
    if len(given) != len(node.args) + len(node.keywords) or None in given:
        return None
    if any(isinstance(a, ast.Starred) for a in node.args):
        return None
    known = dict(zip(names, ("q", "cos", "sin") if rope.single else ("q", "k", "cos", "sin"), strict=False))
    known["unsqueeze_dim"] = "unsqueeze_dim"
    if not set(given) <= set(known) or not set(list(known)[:-1]) <= set(given):
        return None
    return {known[name]: value for name, value in given.items()}


_errors: dict[Callable, float] = {}


@functools.cache
def _identify(function: Callable) -> Rope | Skip:
    """What `function` computes, or why the kernel cannot take its place."""
    with probing_on(CPU), undisturbed():  # sites are made once, whatever the device of the model that is first
        try:
            return _decide(function)
        except Skip as skip:
            return skip
        except Exception as error:  # noqa: BLE001  it was called with shapes that it may not be made for
            return Skip(f"{function.__name__} cannot be checked: {type(error).__name__}")


@once_a_device
def _error(function: Callable, rope: Rope) -> float:
    """The kernel of a device, of which `_identify` has found which options it needs."""
    if probe_device().type == "cpu":
        return _errors[function]
    probe = isolated(function)
    float32 = (_check(probe, rope, torch.float32), _check(probe, rope, torch.float32, batch=1))
    return max(*float32, _check(probe, rope, torch.bfloat16))


def _decide(function: Callable) -> Rope:
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    place = names.index("cos")
    if place not in (1, 2) or names.index("sin") != place + 1:
        raise Skip(f"{function.__name__} has arguments of another kind: {', '.join(names)}")
    if any(parameters[n].default is inspect.Parameter.empty for n in names[place + 2 :]):
        raise Skip(f"{function.__name__} has arguments of another kind: {', '.join(names)}")
    named = "unsqueeze_dim" in names
    default = parameters["unsqueeze_dim"].default if named else None
    failure = Skip(f"{function.__name__} computes something else")
    probe = isolated(function)
    for dim in [default] if default in (1, 2) else [1, 2]:
        for interleaved, halves in ((False, False), (True, False), (True, True)):
            rope = Rope(place == 1, named, dim, interleaved, halves)
            try:
                error = max(_check(probe, rope, torch.float32), _check(probe, rope, torch.float32, batch=1))
                error = max(error, _check(probe, rope, torch.bfloat16))
            except Exception as reason:  # noqa: BLE001  the function may refuse a layout that is not its own
                if isinstance(reason, Skip) and "kernel" in str(reason):
                    failure = reason
                continue
            if named:
                error = max(error, _check(probe, rope._replace(dim=3 - dim), torch.float32))
            _errors[function] = error
            return rope._replace(
                partial=_holds(probe, rope, torch.float32, rotary=8),
                mixed=_holds(probe, rope, torch.bfloat16, angles=torch.float32),
                autocast=_autocast_keeps_dtype(probe, rope),
            )
    raise failure


def _holds(function, rope, *args, **options) -> bool:
    try:
        _check(function, rope, *args, **options)
        return True
    except Exception:  # noqa: BLE001  a narrower cos, or two dtypes, may be refused in any way
        return False


def _tensors(rope: Rope, dtype, angles=None, batch=2, rotary=16):
    probe, other = Probes(dtype=dtype), Probes(dtype=angles or dtype, seed=1)
    shape = (2, 4, 5, 16) if rope.dim == 1 else (2, 5, 4, 16)
    q = probe(*shape)
    k = None if rope.single else probe(*[3 if i == rope.dim else n for i, n in enumerate(shape)])
    # The halves differ, so that nothing but the right formula agrees.
    return [q, k, *(other(batch, 5, rotary).detach() for _ in range(2))]


def _original(function, rope: Rope):
    extra = {"unsqueeze_dim": rope.dim} if rope.named else {}

    def theirs(q, k, cos, sin):
        return function(q, cos, sin, **extra) if rope.single else function(q, k, cos, sin, **extra)

    return theirs


def _check(function, rope: Rope, dtype, **options) -> float:
    leaves = _tensors(rope, dtype, **options)
    before = [None if t is None else t.detach().clone() for t in leaves]

    def ours(q, k, cos, sin):
        return rope.compute(q, k, cos, sin, rope.dim)

    outputs_only(_original(function, rope), leaves)
    if not all(t is None or torch.equal(t, b) for t, b in zip(leaves, before, strict=True)):
        raise Skip(f"{function.__name__} changes its arguments")
    results = [
        gradients(f, t) for f, t in ((ours, leaves), (_original(function, rope), leaves), (ours, doubled(leaves)))
    ]
    return compare(*results, function.__name__)


def _autocast_keeps_dtype(function, rope: Rope) -> bool:
    with torch.autocast(probe_device().type, torch.bfloat16):
        dtypes = {o.dtype for o in outputs_only(_original(function, rope), _tensors(rope, torch.float32))}
        dtypes16 = {o.dtype for o in outputs_only(_original(function, rope), _tensors(rope, torch.bfloat16))}
    return dtypes == {torch.float32} and dtypes16 == {torch.bfloat16}


RULE = SourceRule("rope", "rope", _sites)
