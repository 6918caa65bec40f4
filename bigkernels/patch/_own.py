"""Whether a module's class still computes what a kernel was compared with.

A forward that is written into an instance hides its class's. Where somebody replaces a method of the class later, as
libraries that patch classes do, that method is what the model's owner wants to run.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ._source import methods


class Own:
    """The methods of a class that a kernel stands for, as they were when they were compared with it.

    A copy knows the same functions. A pickle holds the class alone: whoever reads it trusts the class that is there.
    """

    __slots__ = ("cls", "forward", "others")

    def __init__(self, cls: type) -> None:
        self.cls, self.forward = cls, cls.forward
        names = (source.function.__name__ for source in methods(cls, "forward"))
        self.others = tuple((name, getattr(cls, name)) for name in names if name != "forward" and hasattr(cls, name))

    def holds(self, module: Any) -> bool:
        """Whether the module's class has these methods now."""
        cls = type(module)
        if cls.forward is not self.forward:
            return False
        for name, function in self.others:  # noqa: SIM110  a loop costs half of what `all` does
            if getattr(cls, name, None) is not function:
                return False
        return True

    def __copy__(self) -> Own:
        return self

    def __deepcopy__(self, memo: dict) -> Own:
        return self

    def __reduce__(self) -> tuple:
        return Own, (self.cls,)


def followed(new: Callable, cls: type) -> Callable:
    """`new` as long as the class has the forward that it was made from; after that, what took its place."""
    original = cls.forward

    @functools.wraps(new)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = type(self).forward
        return new(self, *args, **kwargs) if now is original else now(self, *args, **kwargs)

    return forward
