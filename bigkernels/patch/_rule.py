"""What a rule is made of. Rules live in `rules/`, one file each."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ._device import probe_device


class Skip(Exception):
    """Raised by a rule's check: the place was recognised and has to be left alone; the message is the reason."""


class Write(NamedTuple):
    """One key of a module's `__dict__` and the value that it gets."""

    module: nn.Module
    key: str
    value: Any


class Fit(NamedTuple):
    """A check that succeeded: the kernel's name for the report, the largest error seen, what else to write, and whether
    it is for calls without gradients alone.
    """

    kernel: str
    error: float | None = None
    writes: tuple[Write, ...] = ()
    inference: bool = False


@dataclass
class Plan:
    """What the rules share while one model is planned; nothing is written until the plan is complete."""

    verify: bool
    linear: bool | None = None  # linear layers: in every call, in none, or in inference where that pays
    written: set[nn.Module] = field(
        default_factory=set
    )  # modules whose inputs may be written to after they were called
    norms: dict[nn.Module, Any] = field(default_factory=dict)  # planned norms and their specifications
    memories: dict[str, dict[Any, Any]] = field(default_factory=dict)  # of each type of device

    @property
    def memory(self) -> dict[Any, Any]:
        """Results of checks, which equal modules on one type of device share."""
        return self.memories.setdefault(probe_device().type, {})


@dataclass
class Site:
    """A place in the source of a forward that a rule knows how to rewrite.

    `check(module, plan)` decides for one instance: it returns a Fit, None (not a candidate after all) or raises Skip.
    `replacements` maps nodes of the tree to what takes their place (a statement's may be a list of statements), and
    `helpers` names the functions that the new nodes call. A helper has to behave as the original code whenever its
    kernel does not apply at run time.
    """

    check: Callable[[nn.Module, Plan], Fit | None]
    replacements: dict[ast.AST, ast.AST | list[ast.stmt]]
    helpers: dict[str, Callable]


class ModuleRule(NamedTuple):
    """`plan(module, plan)` returns (Write, Fit), None for a module that is no candidate, or raises Skip. `flag` is the
    argument of `patch` that switches the rule off."""

    flag: str
    plan: Callable[[nn.Module, Plan], tuple[Write, Fit] | None]


class SourceRule(NamedTuple):
    """`sites(source)` yields the sites of a forward, always in the same order."""

    flag: str
    name: str
    sites: Callable[[Any], Iterator[Site]]
