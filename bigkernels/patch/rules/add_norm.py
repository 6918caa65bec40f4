"""A residual addition followed by a norm: one pass over the sum instead of two.

Two forms are recognised: `h = a + b`, copies of h to other names, then `self.norm(h)` as the next statement's value;
and `self.norm(a + b)`.
"""

# mypy: ignore-errors

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from .._rule import Fit, Plan, Site, SourceRule
from .._source import Source, call, resolve
from .._verify import Probes, compare, doubled, gradients, outputs_only
from .norm import Norm, current, default_eps

_GLOBAL_HOOKS = (
    hooks._global_forward_hooks,
    hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks,
    hooks._global_backward_pre_hooks,
)


def unobserved(module: nn.Module) -> bool:
    """Whether no hook and no compiled call would notice that the module is not called."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or any(_GLOBAL_HOOKS)
    )


def add_norm(a: Any, b: Any, norm: Any) -> tuple[Any, Any]:
    """(norm(a + b), a + b)."""
    what = current(norm)
    if (
        what is not None
        and not what.copies
        and unobserved(norm)
        and isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and what.fits(norm, a)
        and what.fits(norm, b)
    ):
        return what.compute(norm, a, b)
    total = a + b
    return norm(total), total


def norm_of_sum(a: Any, b: Any, norm: Any) -> Any:
    """norm(a + b)."""
    return add_norm(a, b, norm)[0]


def _sites(source: Source) -> Iterator[Site]:
    for node in source.body():
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield from _statements(source, block)
        match node:
            case ast.Call(args=[ast.BinOp(left, ast.Add(), right)], keywords=[]) if source.attribute(node.func):
                new = call("_bigkernels_norm_of_sum", left, right, node.func)
                yield Site(_check(source.attribute(node.func)), {node: new}, {"_bigkernels_norm_of_sum": norm_of_sum})
    yield from _statements(source, source.tree.body)


def _statements(source: Source, block: list[ast.stmt]) -> Iterator[Site]:
    for first, statement in enumerate(block):
        match statement:
            case ast.Assign([ast.Name(name)], ast.BinOp(left, ast.Add(), right)):
                pass
            case _:
                continue
        names = {name}  # of the sum
        for follower in block[first + 1 :]:
            match follower:
                case ast.Assign([ast.Name(copy)], ast.Name(copied)) if copied in names and copy != name:
                    names.add(copy)
                    continue
                case ast.Assign([ast.Name()], ast.Call(function, [ast.Name(argument)], [])) if argument in names:
                    path = source.attribute(function)
                    if path:
                        normed = f"_bigkernels_normed_{statement.lineno}"
                        pair = ast.Tuple([ast.Name(normed, ast.Store()), ast.Name(name, ast.Store())], ast.Store())
                        new = ast.Assign([pair], call("_bigkernels_add_norm", left, right, function))
                        # Deleted, so that the tensor lives no longer than in the original.
                        take = ast.Assign(follower.targets, ast.Name(normed, ast.Load()))
                        drop = ast.Delete([ast.Name(normed, ast.Del())])
                        yield Site(
                            _check(path), {statement: new, follower: [take, drop]}, {"_bigkernels_add_norm": add_norm}
                        )
            break


def _check(path: list[str]):
    def check(module: nn.Module, plan: Plan) -> Fit | None:
        target = resolve(module, path)
        norm = plan.norms.get(target) if isinstance(target, nn.Module) else None
        if norm is None:  # not a norm, or a norm that the report already speaks of
            return None
        key = ("add_norm", norm, target.weight.shape if norm.weight else None)
        if key not in plan.memory:
            plan.memory[key] = _error(target, norm, plan.verify)
        return Fit(f"add + {norm.kernel}", plan.memory[key])

    return check


def _error(module: nn.Module, norm: Norm, verify: bool) -> float:
    """The fused operator against the addition and the norm, one after the other."""
    size = module.weight.shape[0] if norm.weight else norm.size or 64
    eps = getattr(module, norm.eps) if isinstance(norm.eps, str) else norm.eps
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16) if verify else (torch.float32,):
        probe = Probes(dtype=dtype)
        value = default_eps(dtype) if eps is None else eps
        leaves = [probe(2, 5, size), probe(2, 5, size, shift=0.3)]
        leaves += [probe(size, shift=1.0) if present else None for present in (norm.weight, norm.bias)]

        def fused(a, b, weight, bias, value=value):
            return norm.apply(a, weight, bias, value, b)

        def separate(a, b, weight, bias, value=value):
            return norm.apply(a + b, weight, bias, value), a + b

        observe = gradients if verify else outputs_only
        results = [observe(f, t) for f, t in ((fused, leaves), (separate, leaves), (separate, doubled(leaves)))]
        worst = max(worst, compare(*results, f"in {str(dtype).removeprefix('torch.')}"))
    return worst


RULE = SourceRule("norm", "add_norm", _sites)
