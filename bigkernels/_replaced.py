"""Functions of torch that kernels stand for without calling them: where one is replaced, the modules run."""

from __future__ import annotations

from typing import Any


class Watched:
    """Attributes of modules and classes, as they were when this was made.

    Dictionaries are read, since `torch.compile` would make a guard of each attribute.
    """

    def __init__(self, *places: tuple[Any, tuple[str, ...]]):
        self._held = [
            (vars(owner), f"{owner.__name__}.{name}", name, vars(owner)[name])
            for owner, names in places
            for name in names
        ]

    def replaced(self) -> str | None:
        """Which one has been replaced since, in words."""
        for space, label, name, function in self._held:
            if space.get(name) is not function:
                return f"{label} is another function than torch's"
        return None
