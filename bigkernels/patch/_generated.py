"""Where rewritten forwards are found by name, so that a patched model can be pickled and read in another process.

The name says how the function is made: `package/module:Class:site,site`. An attribute that is not there is made.
"""

# mypy: ignore-errors

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

from ._own import followed
from ._source import all_sites, find_source, rewrite

_functions: dict[tuple[type, Any, str], Any] = {}


def rewritten(cls: type, sites: tuple[str, ...]) -> types.FunctionType:
    """The forward of `cls` with the named sites replaced; one function object for equal arguments."""
    key = (cls, cls.forward, ",".join(sites))
    function = _functions.get(key)
    if function is None:
        from .rules import SOURCE_RULES

        source = find_source(cls).fresh()
        found = all_sites(source, SOURCE_RULES)
        function = followed(rewrite(source, [found[name][1] for name in sites]), cls)
        function.__module__ = __name__
        function.__qualname__ = f"{cls.__module__}:{cls.__qualname__}:{key[2]}".replace(".", "/")
        _functions[key] = function
    return function


def __getattr__(name: str) -> types.FunctionType:
    try:
        module, qualname, sites = name.split(":")
        value = sys.modules.get(module.replace("/", ".")) or importlib.import_module(module.replace("/", "."))
        for part in qualname.split("/"):
            value = getattr(value, part)
        return rewritten(value, tuple(sites.split(",")))
    except (ValueError, ImportError, AttributeError, KeyError) as error:
        raise AttributeError(f"{__name__} cannot make {name!r}: {error}") from None
