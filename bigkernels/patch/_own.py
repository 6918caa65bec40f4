"""Whether a module's class still computes what a kernel was compared with.

A forward that is written into an instance hides its class's. Where somebody replaces a method of the class later, as
libraries that patch classes do, that method is what the model's owner wants to run. The same goes for functions of
PyTorch that the methods call by their names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._source import methods


class Own:
    """The methods of a class that a kernel stands for, as they were when they were compared with it.

    A copy knows the same functions. A pickle holds the class alone: whoever reads it trusts the class that is there.
    """

    __slots__ = ("cls", "forward", "others", "called")

    def __init__(self, cls: type) -> None:
        self.cls, self.forward = cls, cast(Any, cls).forward
        functions = [source.function for source in methods(cls, "forward")]
        names = (function.__name__ for function in functions)
        self.others = tuple((name, getattr(cls, name)) for name in names if name != "forward" and hasattr(cls, name))
        self.called = _called([self.forward, *functions])

    def holds(self, module: Any) -> bool:
        """Whether the module's class has these methods now."""
        cls = type(module)
        if cls.forward is not self.forward:
            return False
        for name, function in self.others:  # noqa: SIM110  a loop costs half of what `all` does
            if getattr(cls, name, None) is not function:
                return False
        if torch.compiler.is_compiling():
            return True
        for names, name, function in self.called:  # noqa: SIM110
            if names[name] is not function:
                return False
        return True

    def __copy__(self) -> Own:
        return self

    def __deepcopy__(self, memo: dict) -> Own:
        return self

    def __reduce__(self) -> tuple:
        return Own, (self.cls,)


def _called(functions: Iterable[Callable]) -> tuple[tuple[dict[str, Any], str, Any], ...]:
    """Those of PyTorch's functions whose names the code of `functions` has, and what these call in turn."""
    spaces = vars(F), vars(torch)
    found = {}
    for function in functions:
        for name in _names(function):
            for i, space in enumerate(spaces):
                if callable(space.get(name)):
                    found[i, name] = space[name]
                    for inner in _names(space[name]) if i == 0 else ():
                        if callable(vars(torch).get(inner)):
                            found[1, inner] = vars(torch)[inner]
    return tuple((spaces[i], name, function) for (i, name), function in found.items())


def _names(function: Any) -> tuple[str, ...]:
    return getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())


def followed(new: Callable, cls: type) -> Callable:
    """`new` as long as the class has the forward that it was made from; after that, what took its place."""
    original = cast(Any, cls).forward

    @functools.wraps(new)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = type(self).forward
        return new(self, *args, **kwargs) if now is original else now(self, *args, **kwargs)

    return forward


class Known(Own):
    """What an activation computes, for as long as its class, its attributes and its forward are what they were."""

    __slots__ = ("attributes", "name")

    def __init__(self, module: Any, name: str) -> None:
        super().__init__(type(module))
        self.name, self.attributes = name, _attributes(module)

    def name_of(self, module: Any) -> str | None:
        same = self.holds(module) and "forward" not in module.__dict__ and _attributes(module) == self.attributes
        return self.name if same else None

    def __reduce__(self) -> tuple:
        return _known, (self.cls, self.name, self.attributes)


def _known(cls: type, name: str, attributes: tuple) -> Known:
    known = Known.__new__(Known)
    Own.__init__(known, cls)
    known.name, known.attributes = name, attributes
    return known


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _attributes(module: Any) -> tuple:
    return tuple(
        (key, value if isinstance(value, (bool, int, float, str, type(None))) else None)
        for key, value in vars(module).items()
        if key not in _OF_EVERY_MODULE and not key.startswith("_bigkernels")
    )


def in_both_modes(act: Any, twin: Any, x: Tensor) -> bool:
    """Whether `twin`, a sandbox of an activation, gives the same in training and in evaluation."""
    if twin is act:  # of torch or transformers
        return True
    results = []
    for training in (True, False):
        twin.__dict__["training"] = training
        results.append(type(twin).forward(twin, x.clone()))
    twin.__dict__["training"] = act.training
    return torch.equal(*results)
