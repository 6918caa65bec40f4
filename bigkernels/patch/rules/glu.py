"""The product of an activation with another tensor: gated MLPs of every layout, decided by the activation's numbers.

`act(gate) * up`, or `h = act(gate)` and then `h * up`, where nothing else reads h.
"""

# mypy: ignore-errors

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ... import functional
from ...ops.activations import ACTIVATIONS
from .._device import probe_device
from .._isolated import sandbox
from .._own import Known, in_both_modes
from .._rule import Fit, Plan, Site, Skip, SourceRule, Write
from .._source import Source, call, resolve
from .._verify import Probes, compare, doubled, gradients, plain
from .add_norm import unobserved

# Module-level functions and the activation that they were found to compute.
_functions: dict[tuple[Callable, str | None], str] = {}


class Pending(NamedTuple):
    """A gate whose activation is left to the kernel."""

    act: Any
    gate: Any
    approximate: str | None
    name: str
    version: int | None  # of the gate; None where nothing counts it


def activate(act: Any, gate: Any, approximate: str | None = None) -> Any:
    """act(gate), or a Pending where `gated` may compute it: an activation that a kernel knows and nobody observes.

    Two steps, so that whatever the original would have called is called in the original's order.
    """
    if isinstance(act, nn.Module):
        known = act.__dict__.get("_bigkernels_activation") if unobserved(act) else None
        name = None if known is None else known.name_of(act)
    else:
        name = _functions.get((act, approximate))
    if name is not None and plain(gate) and gate.is_floating_point():
        counted = not torch.compiler.is_compiling() and not gate.is_inference()
        return Pending(act, gate, approximate, name, gate._version if counted else None)
    return _call(act, gate, approximate)


def gated(gate: Any, up: Any) -> Any:
    """The product with what `activate` gave."""
    if type(gate) is not Pending:
        return gate * up
    act, gate, approximate, name, version = gate
    if version is not None and gate._version != version:
        raise RuntimeError(
            "bigkernels.patch: a gate was written to between its activation and the product; patch(model, mlp=False)"
        )
    if plain(up) and gate.shape == up.shape and gate.dtype == up.dtype and gate.device == up.device:
        return functional.glu(gate, up, activation=name)
    return _call(act, gate, approximate) * up


def _call(act: Any, gate: Any, approximate: str | None) -> Any:
    return act(gate) if approximate is None else act(gate, approximate=approximate)


def _sites(source: Source) -> Iterator[Site]:
    later: list[tuple[ast.BinOp, ast.Name, Callable | None]] = []
    for node in source.body():
        match node:
            case ast.BinOp(left, ast.Mult(), right):
                pass
            case _:
                continue
        earlier = None
        for product, sides in ((left, ("gate", "up")), (right, ("up", "gate"))):
            activation = _activation(source, product)
            if activation:
                target, approximate, gate = activation
                extra = {} if approximate is None else {"approximate": ast.Constant(approximate)}
                # Keywords are evaluated in the order in which they are written: the order of the original.
                new = call("_bigkernels_gated", **dict(zip(sides, (left, right), strict=True)))
                replacements = {node: new, product: call("_bigkernels_activate", product.func, gate, **extra)}
                helpers = {"_bigkernels_gated": gated, "_bigkernels_activate": activate}
                check = _check(target, approximate)
                yield Site(_unless(earlier, check), replacements, helpers)
                earlier = check

        later += [(node, side, earlier) for side in (left, right) if isinstance(side, ast.Name)]
    yield from _kept_sites(source, later)


def _kept_sites(source: Source, products: list[tuple[ast.BinOp, ast.Name, Callable | None]]) -> Iterator[Site]:
    """`h = act(gate)`, and later in its block a product with h, which is not read elsewhere."""
    if not products:
        return
    checks: dict[ast.BinOp, Callable] = {}
    for assign, following in _assigned(source):
        name, value = assign.targets[0].id, assign.value
        for node, side, earlier in products:
            between = next((i for i, s in enumerate(following) if any(n is node for n in ast.walk(s))), None)
            if side.id != name or between is None or not _once(source, name):
                continue
            activation = _activation(source, value)
            if not activation or _mentioned(source, activation[2], following[:between]):
                continue
            target, approximate, gate = activation
            extra = {} if approximate is None else {"approximate": ast.Constant(approximate)}
            sides = ("gate", "up") if side is node.left else ("up", "gate")
            new = call("_bigkernels_gated", **dict(zip(sides, (node.left, node.right), strict=True)))
            replacements = {node: new, value: call("_bigkernels_activate", value.func, gate, **extra)}
            check = _check(target, approximate)
            yield Site(
                _unless(checks.get(node, earlier), check),
                replacements,
                {"_bigkernels_gated": gated, "_bigkernels_activate": activate},
            )
            checks[node] = check


def _assigned(source: Source) -> Iterator[tuple[ast.Assign, list[ast.stmt]]]:
    """Assignments of one call to one name, with the statements that follow in their block."""
    for owner in (source.tree, *source.body()):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(owner, field, None)
            for i, statement in enumerate(block if isinstance(block, list) else ()):
                match statement:
                    case ast.Assign([ast.Name()], ast.Call()):
                        yield statement, block[i + 1 :]


def _once(source: Source, name: str) -> bool:
    """Whether a local name is written once and read once, and by nobody who would see what it holds until then."""
    code = source.function.__code__
    if name not in code.co_varnames[code.co_argcount + code.co_kwonlyargcount :] or "locals" in code.co_names:
        return False
    uses = [type(n.ctx) for n in ast.walk(source.tree) if isinstance(n, ast.Name) and n.id == name]
    return sorted(uses, key=str) == [ast.Load, ast.Store]


def _mentioned(source: Source, gate: ast.expr, statements: list[ast.stmt]) -> bool:
    """Whether statements may write to a gate that has a name, or is a view of what has one."""
    if isinstance(gate, ast.Call):  # of a layer; or of a tensor's method, whose result may be the tensor
        gate = gate.func
    names = {n.id for n in ast.walk(gate) if isinstance(n, ast.Name)} - {source.self_name}
    return any(isinstance(n, ast.Name) and n.id in names for s in statements for n in ast.walk(s))


def _unless(earlier: Callable | None, check: Callable) -> Callable:
    """Of two activations in one product the first that fits is the gate."""

    def second(module: nn.Module, plan: Plan) -> Fit | None:
        try:
            if earlier(module, plan) is not None:
                return None
        except Skip:
            pass  # it has a row in the report
        return check(module, plan)

    return check if earlier is None else second


def _activation(source: Source, node: ast.AST) -> tuple[Any, str | None, ast.expr] | None:
    """(path from self or a function, the value of `approximate`, the argument) of a call that may be an activation."""
    match node:
        case ast.Call(function, [gate], []) if not isinstance(gate, ast.Starred):
            approximate = None
        case ast.Call(function, [gate], [ast.keyword("approximate", ast.Constant(str(approximate)))]):
            pass
        case _:
            return None
    path = source.attribute(function)
    if path:
        return path, approximate, gate
    target = source.constant(function)
    if callable(target) and not isinstance(target, type) and _is_known(target):
        if (target, approximate) not in _functions:
            try:
                _functions[target, approximate] = _name(target, approximate)[0]
            except Exception:  # noqa: BLE001  any function may be called like an activation; most are none
                return None
        return target, approximate, gate
    return None


def _is_known(function: Callable) -> bool:
    """Whether calling a function to see what it computes is safe: other functions might do anything."""
    owner = str(getattr(function, "__module__", None) or "torch").split(".")[0]
    return owner == "torch" and getattr(function, "__name__", "") in ("silu", "gelu", "relu", "sigmoid")


def _check(target: Any, approximate: str | None):
    def check(module: nn.Module, plan: Plan) -> Fit | None:
        if not isinstance(target, list):
            name, error = _name(target, approximate)
            return Fit(f"glu ({name})", error)
        act = resolve(module, target)
        if isinstance(act, nn.Module):
            if approximate is not None or not _is_pointwise(act):
                return None
            name, error = (
                plan.memory[act] if act in plan.memory else plan.memory.setdefault(act, _name(act, approximate))
            )
            return Fit(f"glu ({name})", error, (Write(act, "_bigkernels_activation", Known(act, name)),))
        elif callable(act) and _is_known(act):
            name, error = _name(act, approximate)
            _functions[act, approximate] = name
        elif isinstance(act, types.FunctionType):
            raise Skip(f"the activation {act.__name__} is not known to be free of side effects")
        else:
            return None
        return Fit(f"glu ({name})", error)

    return check


def _is_pointwise(act: nn.Module) -> bool:
    """Whether a module is a function of one number: no state, no randomness, no look at the neighbours."""
    if next(act.parameters(), None) is not None or next(act.buffers(), None) is not None:
        return False
    x = torch.linspace(-3, 3, 24, dtype=torch.float32, device=probe_device()).view(4, 6)
    try:
        twin = sandbox(act)
        y = type(twin).forward(twin, x)
        part = type(twin).forward(twin, x[1:3, ::2])
        if not in_both_modes(act, twin, x):
            return False
        return torch.allclose(y[1:3, ::2], part, rtol=1e-5, atol=1e-6) and not torch.equal(y, x)
    except Exception:  # noqa: BLE001  whatever it needs, it is no activation
        return False


def _name(act: Callable, approximate: str | None) -> tuple[str, float]:
    """Which of the operator's activations `act` computes, and the error of the product; Skip if none."""

    if isinstance(act, nn.Module):
        act = sandbox(act)

    def function(x):
        # A module's class has the code without the hooks.
        return type(act).forward(act, x) if isinstance(act, nn.Module) else _call(act, x, approximate)

    for name in (n for n in ACTIVATIONS if n != "identity"):
        worst = 0.0
        try:
            for dtype in (torch.float32, torch.bfloat16):
                probe = Probes(dtype=dtype)
                ranges = ((-30, 30, 301), (-1e-3, 1e-3, 11), (-1e4, 1e4, 2))
                values = torch.cat([torch.linspace(*r, dtype=torch.float32, device=probe_device()) for r in ranges])
                leaves = [values.to(dtype).requires_grad_(), probe(len(values))]
                ours = gradients(lambda g, u, name=name: functional.glu(g, u, activation=name), leaves)
                theirs = gradients(lambda g, u: function(g) * u, leaves)
                exact = gradients(lambda g, u, name=name: functional.glu(g, u, activation=name), doubled(leaves))
                worst = max(worst, compare(ours, theirs, exact, name))
            with torch.autocast(probe_device().type, torch.bfloat16):
                if function(leaves[0].detach()).dtype != torch.bfloat16:
                    raise Skip(f"{name}: autocast changes its dtype")
            return name, worst
        except Skip:
            continue
    described = type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__name__", str(act))
    raise Skip(f"the activation {described} is none of {', '.join(n for n in ACTIVATIONS if n != 'identity')}")


RULE = SourceRule("mlp", "glu", _sites)
