"""Functions in the place of methods of one instance."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable


class Bound(functools.partial):
    """Like a bound method, but pickled with its function, where a method would be looked up in the class again."""

    @property
    def __func__(self) -> Callable:  # accelerate takes wrapped forwards apart by it
        return self.func


class Stepping(Bound):
    """`forward(module, below, ...)`, with the signature that the model's own forward has: `generate` looks at it."""

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        return inspect.signature(types.MethodType(type(module).forward, module))
