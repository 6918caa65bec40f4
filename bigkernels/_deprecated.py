"""Names that were given up. They work as before and warn with the new one; `CONTRIBUTING.md` has the rules of names."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)


def warn(path: str, old: str, new: str, stacklevel: int = 3) -> None:
    """A DeprecationWarning for the caller of who calls this: `old` of `path` is called `new`."""
    warnings.warn(f"{path}: {old} is deprecated, use {new}", DeprecationWarning, stacklevel=stacklevel)


def renamed_arguments(path: str, **names: str) -> Callable[[Function], Function]:
    """For a function that is imported as `path`: keyword arguments by their old names, ``old="new"``."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def with_old_names(*args: Any, **kwargs: Any) -> Any:
            for old in names:
                if old in kwargs:
                    new = names[old]
                    if new in kwargs:
                        raise TypeError(f"{path}: {old} and {new} are given, which are one argument")
                    warn(path, f"the argument {old}", new)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return with_old_names  # type: ignore[return-value]

    return decorate


def renamed_members(path: str, **names: str) -> Callable[[Class], Class]:
    """For a class that is imported as `path`: attributes, and the arguments that make them, by their old names,
    ``old="new"``. Pickles and state dicts that were saved with the old names can be loaded."""

    def decorate(cls: Class) -> Class:
        for old, new in names.items():
            setattr(cls, old, _alias(path, old, new))
        set_state: Any = getattr(cls, "__setstate__", None)
        load: Any = getattr(cls, "_load_from_state_dict", None)

        def __setstate__(self: Any, state: dict[str, Any]) -> None:
            state = _renamed(state, names)
            if "_buffers" in state:
                state["_buffers"] = _renamed(state["_buffers"], names)
            if set_state is not None:
                set_state(self, state)
            else:
                self.__dict__.update(state)

        def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            for old, new in names.items():
                if prefix + old in state_dict:
                    state_dict[prefix + new] = state_dict.pop(prefix + old)
            load(self, state_dict, prefix, *rest)

        cls.__init__ = renamed_arguments(path, **names)(cls.__init__)  # type: ignore[misc]
        cls.__setstate__ = __setstate__  # type: ignore[attr-defined]
        if load is not None:
            cls._load_from_state_dict = _load_from_state_dict  # type: ignore[attr-defined]
        return cls

    return decorate


def renamed_functions(path: str, values: dict[str, Any], **names: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that is imported as `path` and has `values`: ``old="new"``."""

    def __getattr__(name: str) -> Any:
        if name in names:
            warn(path, name, names[name])
            return values[names[name]]
        raise AttributeError(f"module {path!r} has no attribute {name!r}")

    return __getattr__


def _renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}


def _alias(path: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn(path, f"the attribute {old}", new)
        return getattr(self, new)

    def write(self: Any, value: Any) -> None:
        warn(path, f"the attribute {old}", new)
        setattr(self, new, value)

    return property(read, write, doc=f"Deprecated name of `{new}`.")
