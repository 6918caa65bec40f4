"""Convolutions with the BatchNorm behind them, in inference, once `bigkernels.pack` has declared that the weights of
the convolution are not written.

Of `self.norm(self.conv(x))`, and of both as statements one after the other, the convolution gives what the norm would
make of its result, and says so; the norm then hands it on. Whatever is done with the norm's result (an activation, a
residual) is found as ever.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...nn._conv import folded_conv2d, packs
from ...nn.linear import packed_copies
from .._rule import Fit, Plan, Site, SourceRule
from .._source import Source, call, resolve
from .._verify import Probes, compare, outputs_only, plain
from .add_norm import unobserved
from .conv import is_patched as conv_is_patched
from .image_norm import NORMED, Normed, is_patched, name_of


def before_norm(conv: Any, norm: Any, x: Any, act: Any = None) -> Any:
    """conv(x), or where the norm behind it is called by this package and nobody looks at what lies between:
    norm(conv(x)), which the norm hands on. `act` is what the norm's result goes into and nothing else does.
    """
    # What was not declared by `pack`, and what a compiler traces, is told first: it needs no look at the rest.
    copies = packed_copies(conv.weight) if isinstance(x, Tensor) and conv_is_patched(conv) else None
    if copies is not None and packs(conv) and _hands_on(norm) and unobserved(conv):
        tensors = (x, *conv._parameters.values(), *norm._parameters.values(), *norm._buffers.values())
        if plain(*(t for t in tensors if t is not None)):
            relu = act is not None and name_of(act) == "relu"
            y = folded_conv2d(conv, norm, x, copies, relu)
            if y is not None:
                setattr(y, NORMED, Normed(norm, relu))
                return y
    return conv(x)


def _hands_on(norm: Any) -> bool:
    """Whether a module is a BatchNorm that asks `already_normed` first, and that nobody observes."""
    return type(norm) is nn.BatchNorm2d and is_patched(norm, written=True)


def folds(conv: Any, norm: Any, plan: Plan) -> Fit | None:
    """What the report says of a convolution and the norm behind it, if that is what they are."""
    if not isinstance(conv, nn.Module) or type(norm) is not nn.BatchNorm2d or not packs(conv):
        return None
    if norm.running_mean is None or not plain(cast(Tensor, conv.weight), norm.running_mean) or not conv.weight.is_cpu:
        return None
    if conv.out_channels != norm.num_features:
        return None
    if "fold" not in plan.memory:
        plan.memory["fold"] = _error()
    return Fit("conv2d + batch_norm (packed)", plan.memory["fold"], inference=True)


def _error() -> float:
    """Where small modules stand for all others."""
    conv = nn.Conv2d(4, 6, 3, device="cpu", dtype=torch.float32)
    norm = nn.BatchNorm2d(6, device="cpu", dtype=torch.float32).eval()
    probe = Probes("cpu")
    with torch.no_grad():
        for t in (*conv.parameters(), *norm.parameters()):
            t.copy_(probe(*t.shape, scale=0.3, shift=0.5))
        cast(Tensor, norm.running_mean).copy_(probe(6))
        cast(Tensor, norm.running_var).copy_(probe(6).abs() + 0.5)
    x = probe(2, 4, 9, 7).detach()
    ours = [folded_conv2d(conv.requires_grad_(False), norm.requires_grad_(False), x, {})]
    theirs = outputs_only(lambda x: norm(conv(x)), [x])
    exact = outputs_only(lambda x: norm.double()(conv.double()(x)), [x.double()])
    return compare(cast(list[Tensor], ours), theirs, exact, "conv2d + batch_norm")


def _sites(source: Source) -> Iterator[Site]:
    behind = {}  # of calls: what is called with their result
    for node in source.body():
        match node:
            case ast.Call(outer, [ast.Call() as inner], []):
                behind[inner] = outer
    for node in source.body():
        match node:
            case ast.Call(norm, [ast.Call(conv, [x], []) as inner], []) if not isinstance(x, ast.Starred):
                yield from _site(source, inner, conv, norm, x, behind.get(node))
    for owner in (source.tree, *source.body()):
        for field in ("body", "orelse", "finalbody"):
            block: Any = getattr(owner, field, None)
            for at in range(len(block) if isinstance(block, list) else 0):
                yield from _of_statements(source, block[at : at + 3])


def _of_statements(source: Source, block: list[ast.stmt]) -> Iterator[Site]:
    """`h = conv(x)`, `h = norm(h)` and, or with it in one, `h = act(h)`."""
    match block[0]:
        case ast.Assign([ast.Name(name)], ast.Call(conv, [x], []) as inner) if not isinstance(x, ast.Starred):
            pass
        case _:
            return
    calls = [_of_name(statement, name) for statement in block[1:]]
    if not calls or not calls[0]:
        return
    functions = [*calls[0], *(calls[1] if len(calls) == 2 and len(calls[0]) == 1 else ())]
    yield from _site(source, inner, conv, functions[0], x, functions[1] if len(functions) > 1 else None)


def _of_name(statement: ast.stmt, name: str) -> list[ast.expr]:
    """[f] of `name = f(name)`, [f, g] of `name = g(f(name))`, and nothing of anything else."""
    match statement:
        case ast.Assign([ast.Name(target)], value) if target == name:
            pass
        case _:
            return []
    functions: list[ast.expr] = []
    while isinstance(value, ast.Call) and len(value.args) == 1 and not value.keywords:
        functions.insert(0, value.func)
        value = value.args[0]
    known = not any(isinstance(n, ast.Name) and n.id == name for f in functions for n in ast.walk(f))
    return functions if known and isinstance(value, ast.Name) and value.id == name else []


def _site(source: Source, node: ast.Call, conv: ast.expr, norm: ast.expr, x: ast.expr, act) -> Iterator[Site]:
    """`act`: what the norm's result goes into, where it goes nowhere else."""
    paths = source.attribute(conv), source.attribute(norm)
    if None in paths:
        return
    # What a global name stands for is read where it is called, as ever: a function of torch by that name is meant.
    known = act is not None and (source.attribute(act) or _is_of_torch(source, act))
    new = call("_bigkernels_before_norm", conv, norm, x, *([act] if known else []))

    def check(module: nn.Module, plan: Plan) -> Fit | None:
        before, behind = (resolve(module, path or []) for path in paths)
        return folds(before, behind, plan)

    yield Site(check, {node: new}, {"_bigkernels_before_norm": before_norm})


def _is_of_torch(source: Source, act: ast.expr) -> bool:
    return str(getattr(source.constant(act), "__module__", None)).partition(".")[0] == "torch"


RULE = SourceRule("norm", "conv_norm", _sites)
