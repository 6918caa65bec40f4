"""A linear layer and the activation behind it: MLPs without a gate, in training and inference.

`act(self.linear(x))`, or both as statements one after the other. The second layer of the MLP is wherever the result
arrives: a patched linear layer sees that `linear_activation` made its input, and does not keep it for backward. What
lies between (dropout in training, hooks, a cast) gives another tensor, and then it is kept as ever.
"""

# mypy: ignore-errors

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.linear import may_pay
from ...ops.activations import ACTIVATIONS
from ...ops.arguments import autocast_dtype
from ...ops.mlp import linear_activation, linear_of_activation, made_by_linear_activation
from ...ops.registry import has_values
from .._device import probe_device
from .._isolated import sandbox
from .._own import Known, in_both_modes
from .._rule import Fit, Plan, Site, Skip, SourceRule, Write
from .._source import Source, call, resolve
from .._verify import compare, doubled, gradients, outputs_only, plain
from .add_norm import unobserved
from .linear import WRITTEN as LINEAR
from .linear import replaced

# Module-level functions and the activation that they were found to compute.
_functions: dict[tuple[Callable, str | None], str] = {}
_KEY = "_bigkernels_mlp"  # of an activation module: what it computes


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is the linear layer of GPT-2, whose weight is (K, N)."""
    cls = type(module)
    own = cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
    return own and cls.forward.__module__ == cls.__module__  # which nobody has replaced


def activated(act: Any, linear: Any, x: Any, approximate: str | None = None) -> Any:
    """act(linear(x))."""
    if isinstance(act, nn.Module):
        known = act.__dict__.get(_KEY) if unobserved(act) else None
        name = None if known is None else known.name_of(act)
    else:
        name = _functions.get((act, approximate))
    if name is not None and _computes_its_weight(linear):
        weight, bias = _parameters(linear)
        if fits(x, weight, bias):
            return linear_activation(x, weight, bias, activation=name)
    y = linear(x)
    return act(y) if approximate is None else act(y, approximate=approximate)


def _computes_its_weight(linear: Any) -> bool:
    """Whether a layer is a plain linear one, which nobody wraps or observes."""
    if not isinstance(linear, nn.Module) or not (type(linear) is nn.Linear or is_transposed(linear)):
        return False
    if replaced():
        return False
    own = linear.__dict__.get("forward")
    if own is not None and not (type(own) is functools.partial and own.func in (*LINEAR, transposed)):
        return False
    return unobserved(linear)


def _parameters(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    return (linear.weight.t() if is_transposed(linear) else linear.weight), linear.bias


def fits(x: Any, weight: Tensor, bias: Tensor | None) -> bool:
    if not isinstance(x, Tensor) or not plain(x) or not has_values(x) or not x.is_cpu or x.dim() == 0:
        return False
    # The transposed weight of a parameter is no parameter.
    if not (plain(weight) and weight.is_cpu) or (bias is not None and not (plain(bias) and bias.is_cpu)):
        return False
    if x.shape[-1] != weight.shape[-1] or x.dtype == torch.float64:
        return False
    if autocast_dtype(x.device) is None:
        return x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    return weight.dtype in (torch.float32, autocast_dtype(x.device))


def transposed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of the forward of GPT-2's linear layer, for what `linear_activation` made."""
    if len(args) == 1 and not kwargs and is_transposed(module):
        x, (weight, bias) = args[0], _parameters(module)
        if isinstance(x, Tensor) and fits(x, weight, bias) and made_by_linear_activation(x):
            return linear_of_activation(x, weight, bias)
    return type(module).forward(module, *args, **kwargs)


def _sites(source: Source) -> Iterator[Site]:
    factors = [
        side
        for node in source.body()
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
        for side in (node.left, node.right)
    ]
    gates = {side.id for side in factors if isinstance(side, ast.Name)}
    assigned = {
        id(n.value): n.targets[0].id
        for n in source.body()
        if isinstance(n, ast.Assign) and len(n.targets) == 1 and isinstance(n.targets[0], ast.Name)
    }
    for node in source.body():
        # A gated unit has a rule of its own.
        if any(node is side for side in factors) or assigned.get(id(node)) in gates:
            continue
        activation = _activation(source, node)
        if activation is None:
            continue
        target, approximate, inner = activation
        match inner:
            case ast.Call(linear, [x], []) if source.attribute(linear) and not isinstance(x, ast.Starred):
                yield _site(source, target, approximate, node, linear, x, {})
    for owner in (source.tree, *source.body()):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(owner, field, None)
            if isinstance(block, list):
                yield from _statements(source, block, gates)


def _statements(source: Source, block: list[ast.stmt], gates: set[str]) -> Iterator[Site]:
    """`h = self.linear(x)` and `h = act(h)`, one after the other."""
    for first, second in zip(block, block[1:], strict=False):
        match first, second:
            case ast.Assign([ast.Name(name)], ast.Call(linear, [x], [])), ast.Assign([ast.Name(again)], value):
                if name != again or again in gates or not source.attribute(linear) or isinstance(x, ast.Starred):
                    continue
                activation = _activation(source, value)
                if activation and isinstance(activation[2], ast.Name) and activation[2].id == name:
                    # The first statement keeps its place for those who count lines.
                    yield _site(source, activation[0], activation[1], value, linear, x, {first: ast.Pass()})


def _site(source, target, approximate, node, linear, x, more) -> Site:
    extra = {} if approximate is None else {"approximate": ast.Constant(approximate)}
    new = call("_bigkernels_activated", node.func, linear, x, **extra)
    return Site(
        _check(target, approximate, source.attribute(linear)), {node: new, **more}, {"_bigkernels_activated": activated}
    )


def _activation(source: Source, node: ast.AST) -> tuple[Any, str | None, ast.expr] | None:
    """(path from self or a function, the value of `approximate`, the argument) of a call that may be an activation."""
    match node:
        case ast.Call(function, [argument], []) if not isinstance(argument, ast.Starred):
            approximate = None
        case ast.Call(function, [argument], [ast.keyword("approximate", ast.Constant(str(approximate)))]):
            pass
        case _:
            return None
    path = source.attribute(function)
    if path:
        return path, approximate, argument
    target = source.constant(function)
    return (target, approximate, argument) if _is_known(target) else None


def _is_known(function: Any) -> bool:
    """Whether calling a function to see what it computes is safe: other functions might do anything."""
    owner = str(getattr(function, "__module__", None) or "torch").split(".")[0]
    names = ("silu", "gelu", "relu", "sigmoid", "tanh")
    return callable(function) and owner == "torch" and getattr(function, "__name__", "") in names


def _check(target: Any, approximate: str | None, path: list[str]):
    def check(module: nn.Module, plan: Plan) -> Fit | None:
        linear = resolve(module, path)
        # Of GPT-2's layer, whose weight is (K, N), the kernel would make a transposed copy in each call.
        if not isinstance(linear, nn.Module) or type(linear) is not nn.Linear:
            return None
        if not plain(linear.weight) or not linear.weight.is_cpu or not may_pay():
            return None
        act = resolve(module, target) if isinstance(target, list) else target
        if isinstance(act, nn.Module):
            if approximate is not None or not is_pointwise(act):
                return None
        elif not _is_known(act):
            return None
        key = "mlp", _key(act), approximate
        if key not in plan.memory:
            plan.memory[key] = _name(act, approximate, plan.verify)
        name, error = plan.memory[key]
        # The second layer of GPT-2's MLP, which no other rule writes to.
        writes = [
            Write(other, "forward", functools.partial(transposed, other))
            for other in module.children()
            if is_transposed(other) and other is not linear and _writable(other)
        ]
        if isinstance(act, nn.Module):
            writes.append(Write(act, _KEY, Known(act, name)))
        else:
            _functions[act, approximate] = name
        return Fit(f"linear + {name}", error, tuple(writes))

    return check


def _writable(module: nn.Module) -> bool:
    own = module.__dict__.get("forward")
    return plain(module.weight) and (own is None or (type(own) is functools.partial and own.func is transposed))


def is_pointwise(act: nn.Module) -> bool:
    """Whether a module is a function of one number: no state, no randomness, no look at the neighbours. It may write to
    its input.
    """
    if next(act.parameters(), None) is not None or next(act.buffers(), None) is not None:
        return False
    if next(act.children(), None) is not None and not all(is_pointwise(child) for child in act.children()):
        return False
    x = torch.linspace(-3, 3, 24, dtype=torch.float32, device=probe_device()).view(4, 6)
    try:
        twin = sandbox(act)
        y = type(twin).forward(twin, x.clone())
        part = type(twin).forward(twin, x[1:3, ::2].clone())
        if not in_both_modes(act, twin, x):
            return False
        return torch.allclose(y[1:3, ::2], part, rtol=1e-5, atol=1e-6) and not torch.equal(y, x)
    except Exception:  # noqa: BLE001  whatever it needs, it is no activation
        return False


def _key(act: Any) -> Any:
    """Equal for activations that compute the same: what a module of its class is made of."""
    if not isinstance(act, nn.Module):
        return act
    hidden = {*vars(nn.Module()), "forward", "_bigkernels_patch", "_bigkernels_activation", _KEY}
    return type(act), tuple((k, id(v)) for k, v in sorted(vars(act).items()) if k not in hidden)


def _name(act: Any, approximate: str | None, verify: bool) -> tuple[str, float]:
    """Which of the operator's activations `act` computes, and the error."""
    if isinstance(act, nn.Module):
        act = sandbox(act)

    def function(x):
        if isinstance(act, nn.Module):
            return type(act).forward(act, x.clone())  # it may write to it
        return act(x) if approximate is None else act(x, approximate=approximate)

    device = probe_device()
    for name in (name for name in ACTIVATIONS if name != "identity"):
        worst = 0.0
        try:
            # Each by itself: beside 10,000, what lies between two activations is no more than a rounding.
            ranges = ((-30, 30, 304), (-4, 4, 96), (-1e-3, 1e-3, 16), (-1e4, 1e4, 8))
            dtypes = (torch.float32, torch.bfloat16) if verify else (torch.float32,)
            for dtype, r in itertools.product(dtypes, ranges):
                values = torch.linspace(*r, dtype=torch.float32, device=device)
                leaves = [values.to(dtype).view(-1, 8).requires_grad_()]

                def ours(x, name=name):
                    # The product with the identity is exact.
                    return linear_activation(x, torch.eye(8, dtype=x.dtype, device=device), None, activation=name)

                observe = gradients if verify else outputs_only
                tried = ((ours, leaves), (function, leaves), (ours, doubled(leaves)))
                worst = max(worst, compare(*(observe(f, t) for f, t in tried), name))
            return name, worst
        except Skip:
            continue
    described = type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__name__", str(act))
    raise Skip(f"the activation {described} is none of {', '.join(n for n in ACTIVATIONS if n != 'identity')}")


RULE = SourceRule("mlp", "mlp", _sites)
