"""Modules whose input a model's own code writes to after the call, as in ``h += mlp(norm(h))``.

A norm of 16-bit rows, as models write it, keeps a float32 copy of them for backward, so that such a write does it no
harm; ours keeps the rows themselves. Where a write may follow it has to keep a copy.
"""

# mypy: ignore-errors

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from ._source import Source, called, methods, resolve


def written_after(model: nn.Module) -> set[nn.Module]:
    """The modules, with all inside of them, that some function of the model gives a tensor to which it then writes."""
    written: set[nn.Module] = set()
    for module in model.modules():
        for path in _calls(type(module), type(module).forward):
            target = None if path is None else resolve(module, list(path))
            if isinstance(target, types.MethodType) and not _hands_on(type(module), path[0]):
                continue
            # A list of modules or a local variable may stand for any of them.
            written.update((target if isinstance(target, nn.Module) else module).modules())
    return written


@functools.lru_cache(maxsize=1024)
def _calls(cls: type, forward: Any) -> frozenset[tuple[str, ...] | None]:
    """Paths from self of what is called with a tensor that is written to later; None for an unknown one.

    In forward and in the methods that it calls. The class's forward, which may be replaced, is part of the key.
    """
    return frozenset().union(*(_calls_in(source) for source in methods(cls, "forward")))


def _hands_on(cls: type, method: str) -> bool:
    """Whether a method calls something of self that is no method, such as a layer."""
    return any(not callable(getattr(cls, name, None)) for source in methods(cls, method) for name in called(source))


def _calls_in(source: Source) -> set[tuple[str, ...] | None]:
    nodes = list(source.body())
    writes = [(name, node) for node in nodes for name in _written(node)]
    if not writes:
        return set()
    alias = _aliases(source, nodes)
    loops = [n for n in nodes if isinstance(n, (ast.For, ast.While))]
    names = set()
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        given = {
            alias.get(a.id, a.id) for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Name)
        }
        if any(alias.get(n, n) in given and _follows(write, node, loops) for n, write in writes):
            path = source.attribute(node.func)
            if path is not None:
                names.add(tuple(path))
            elif _is_local(source, node.func):
                names.add(None)
    return names


def _follows(write: ast.AST, call: ast.Call, loops: list[ast.AST]) -> bool:
    """Whether a write may run after a call: it ends later, or a loop comes back to it."""
    if (write.end_lineno, write.end_col_offset) >= (call.end_lineno, call.end_col_offset):
        return True
    return any(loop.lineno <= write.lineno and call.end_lineno <= loop.end_lineno for loop in loops)


def _written(node: ast.AST) -> Iterator[str]:
    """Names of what a node writes to in place."""
    match node:
        case ast.AugAssign(target, _, value) if not isinstance(value, ast.Tuple):
            targets = [target]
        case ast.Assign(assigned, _):
            targets = [t for t in assigned if isinstance(t, ast.Subscript)]
        case ast.Call(ast.Attribute(target, method)) if method.endswith("_") and not method.startswith("_"):
            targets = [target]
        case ast.keyword("out", target):
            targets = [target]
        case _:
            return
    for target in targets:
        name = _base(target)
        if name is not None:
            yield name


def _base(node: ast.AST) -> str | None:
    """x of `x`, `x[0]`, `x.data` and `x.view(-1)`."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _aliases(source: Source, nodes: list[ast.AST]) -> dict[str, str]:
    """One name for those that may share memory: `a = b`, and views of b."""
    groups: dict[str, str] = {}
    for node in nodes:
        match node:
            case ast.Assign([ast.Name(name)], value):
                base = _base(value)
                if base is not None and base not in (source.self_name, name):
                    one, other = groups.get(name, name), groups.get(base, base)
                    groups |= {n: other for n, g in groups.items() if g == one} | {name: other, one: other}
    return groups


def _is_local(source: Source, function: ast.AST) -> bool:
    """Whether what is called is found in a local variable, such as a layer of a loop, and is no method of a tensor."""
    return isinstance(function, ast.Name) and function.id in source.function.__code__.co_varnames
