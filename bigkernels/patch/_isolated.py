"""A model's own functions, to be called with probes: with copies of what they could write to."""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from ._rule import Skip
from ._source import Source, content, find_node, methods

_LARGEST = 2**20  # elements of what is copied
_TRUSTED = ("torch", "transformers", "builtins", "math", "bigkernels")
_IMMUTABLE = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.MethodType,
)


def is_trusted(value: Any) -> bool:
    """Whether a function or a class belongs to a library whose functions keep nothing of a call."""
    return (getattr(value, "__module__", None) or "").split(".")[0] in _TRUSTED


def isolated(function: Any) -> Any:
    """The function with copies of the containers and objects that its globals, its closure and its defaults lead to.

    Raises:
        Skip: it calls something for its effect.
    """
    return _function(function, {})


def _function(function: Any, known: dict[int, Any]) -> Any:
    if type(function) is functools.partial:
        return functools.partial(_function(function.func, known), *function.args, **function.keywords)
    if not isinstance(function, types.FunctionType) or is_trusted(function):
        return function
    if id(function) in known:
        return known[id(function)]
    node = find_node(function)
    if node is not None:
        check_effects(Source(function, [], node, []))
    space = dict(function.__globals__)
    cells = tuple(types.CellType(copied(content(cell), known)) for cell in function.__closure__ or ())
    new = types.FunctionType(
        function.__code__.replace(), space, function.__name__, copied(function.__defaults__, known), cells
    )
    known[id(function)] = new
    new.__kwdefaults__ = copied(function.__kwdefaults__, known)
    new.__dict__.update(function.__dict__)
    space.update((name, copied(space[name], known)) for name in _names(function.__code__) if name in space)
    return new


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in inner))


def copied(value: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy of what a call could write to; the value where it is none, or too large."""
    known = {} if known is None else known
    if isinstance(value, _IMMUTABLE) or type(value).__module__.split(".")[0] == "transformers":
        return value
    if isinstance(value, (types.FunctionType, functools.partial)):
        return _function(value, known)
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, nn.Module) and sum(t.numel() for t in (*value.parameters(), *value.buffers())) > _LARGEST:
        return value
    if isinstance(value, Tensor) and value.numel() > _LARGEST:
        return value
    try:
        # Tensors with a history cannot be copied as such; what is too large is shared.
        memo = {id(t): t.detach() if t.numel() > _LARGEST else t.detach().clone() for t in _tensors(value, set())}
        duplicate = copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001  locks and files: calls of their methods are looked for instead
        return value
    if isinstance(duplicate, nn.Module):
        for module in duplicate.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                hooks.clear()
    known[id(value)] = duplicate
    return duplicate


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Those with a history in containers and objects."""
    if id(value) in seen or isinstance(value, (*_IMMUTABLE, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
        return
    inner: Any = value if isinstance(value, (list, tuple, set, deque)) else getattr(value, "__dict__", {}).values()
    if isinstance(value, dict):
        inner = value.values()
    for part in list(inner):
        yield from _tensors(part, seen)


def sandbox(module: nn.Module) -> nn.Module:
    """A module with copies of this one's attributes, parameters excepted, and with its class's own functions isolated.

    Raises:
        Skip: its forward calls something for its effect.
    """
    cls = type(module)
    if is_trusted(cls):
        return module
    known: dict[int, Any] = {}
    functions = {source.function.__name__: _function(source.function, known) for source in methods(cls, "forward")}
    twin: Any = object.__new__(type(cls.__name__, (cls,), {"__module__": cls.__module__, **functions}))
    own = vars(nn.Module())
    twin.__dict__.update((name, value if name in own else copied(value, known)) for name, value in vars(module).items())
    return twin


class Stand:
    """A module of which some attributes are others. It is in training, and nothing is written to the module."""

    def __init__(self, module: nn.Module, **others: Any):
        self.__dict__.update(others, training=True, _module=module, _known={})

    def __getattr__(self, name: str) -> Any:
        found, module = getattr(self._module, name), self._module
        if isinstance(found, types.MethodType) and found.__self__ is module:
            return types.MethodType(_function(found.__func__, self._known), self)
        self.__dict__[name] = found = copied(found, self._known)
        return found


def check_effects(source: Source) -> None:
    """Raise Skip where a function calls something for its effect, and not on what it has made or what is copied.

    Such a call's result is not used; its owner is no local variable, no attribute of self and no object that copies.
    """
    local = source.function.__code__.co_varnames
    for node in source.body():
        match node:
            case ast.Expr(ast.Call(function)):
                owner = function
                while isinstance(owner, (ast.Attribute, ast.Subscript)):
                    owner = owner.value
                name = owner.id if isinstance(owner, ast.Name) else None
                if isinstance(function, ast.Attribute) and (name in local or _copies(source, name)):
                    continue
                if is_trusted(source.constant(function)):
                    continue
                raise Skip(f"its {source.function.__name__} calls {ast.unparse(function)} for its effect")
            case ast.Global() | ast.Nonlocal():
                raise Skip(f"its {source.function.__name__} writes to a variable outside of it")


def _copies(source: Source, name: str | None) -> bool:
    function = source.function
    held = dict(zip(function.__code__.co_freevars, map(content, function.__closure__ or ()), strict=True))
    value = held.get(cast(str, name), function.__globals__.get(cast(str, name)))
    return not isinstance(value, types.FunctionType) and copied(value) is not value
