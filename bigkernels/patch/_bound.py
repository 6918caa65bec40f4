"""Functions in the place of methods of one instance."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast


class Bound(functools.partial):
    """Like a bound method, but pickled with its function, where a method would be looked up in the class again."""

    @property
    def __func__(self) -> Callable:  # accelerate takes wrapped forwards apart by it
        return self.func


class Stepping(Bound):
    """`forward(module, below, ...)`, with the signature that the model's own forward has: `generate` looks at it."""

    @property
    def __func__(self) -> Callable:
        return Unbound(self.func, self.args[1:], type(self.args[0]))

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        return inspect.signature(types.MethodType(type(module).forward, module))


@dataclass(frozen=True)
class Unbound:
    """A `Stepping` without its module, of which it is the first argument again."""

    func: Callable
    rest: tuple
    kind: type

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.func(module, *self.rest, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(cast(Any, self.kind).forward)
