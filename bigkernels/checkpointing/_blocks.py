"""The repeated blocks of a model as segments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._torch_private import CALL, CHECKPOINTING, calls_go_through_instances, require
from ._checkpoint import run
from ._policy import Policy, Selection, resolve_policy
from ._select import Plan

_KEY = CALL


class _Checkpointed:
    """Stands before a module's call. An object of the instance, so that it is copied and pickled with the module."""

    def __init__(self, module: nn.Module, policy: Policy, plan: Plan | None):
        self.module, self.policy, self.plan = module, policy, plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self.policy.keep not in (None, "all"):
            # A cache of keys and values would get them once more when the block runs again; training reads none.
            args = tuple(None if _is_cache(v) else v for v in args)
            kwargs = {name: None if _is_cache(v) else v for name, v in kwargs.items()}
        return run(self._call, args, kwargs, self.policy, self.plan)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.module), _KEY)(self.module, *args, **kwargs)


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def apply_checkpointing(
    model: nn.Module,
    policy: str | Policy = "recompute",
    *,
    every: int = 1,
    modules: Iterable[nn.Module | str] | type | None = None,
) -> list[str]:
    """Make segments of a model's repeated blocks, as `bigkernels.checkpoint` does of a function.

    Blocks are found by structure: the modules of the longest lists whose modules are of one class and hold equal sets
    of parameters. Only calls of the instances change: classes, parameters, hooks and state_dict stay as they are, and
    it does not matter whether `bigkernels.patch` comes before or after; a block's own `compile` comes after. Calling it
    again replaces what was applied.

    Args:
        policy: as in `bigkernels.checkpoint`. Blocks of one structure learn together what a "selective" policy keeps.
        every: 1 for all blocks, 2 for every second one, and so on: the others keep what they always did.
        modules: what to make segments of, in place of the search: modules or their names in `model`, or a class.

    Returns:
        The names of the modules that are now segments.

    Raises:
        TypeError, ValueError: there is no such policy; `every` is not positive; no repeated blocks are found; or a
            module of `modules` is not in the model.
        RuntimeError: this torch does not call modules as segments need it to.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"bigkernels.apply_checkpointing: model must be a torch.nn.Module, got {type(model).__name__}")
    require(CHECKPOINTING, "apply_checkpointing")
    if not calls_go_through_instances():
        raise RuntimeError(
            f"bigkernels.apply_checkpointing: torch {torch.__version__} calls modules in another way "
            f"than by {CALL}; use bigkernels.checkpoint"
        )
    policy = resolve_policy(policy)
    if every < 1:
        raise ValueError(f"bigkernels.apply_checkpointing: every is {every}, expected a positive number")
    names = {module: name for name, module in model.named_modules()}
    # Wrappers that flatten parameters (FSDP of the first kind) leave blocks without any.
    segments = (_blocks(model) or _blocks(model, empty=True)) if modules is None else _given(modules, names)
    if not segments:
        raise ValueError(
            "bigkernels.apply_checkpointing: no list of modules of one class and structure is in "
            f"{type(model).__name__}; name the segments by modules="
        )
    remove_checkpointing(model)
    chosen = segments[::every]
    plans: dict[tuple, Plan] = {}
    for module in chosen:
        plan = None
        if isinstance(policy.keep, Selection):
            plan = plans.setdefault(_structure(module), Plan(policy.keep))
        module.__dict__[_KEY] = _Checkpointed(module, policy, plan)
    return [names[module] for module in chosen]


@contextmanager
def checkpointed(
    model: nn.Module,
    policy: str | Policy = "recompute",
    *,
    every: int = 1,
    modules: Iterable[nn.Module | str] | type | None = None,
) -> Iterator[list[str]]:
    """`apply_checkpointing(model, ...)` inside a `with` block; after it the model is as it was, with what had been
    applied before. Backward may come after the block: what it recomputes was noted in forward.
    """
    before = {module: module.__dict__[_KEY] for module in model.modules() if _KEY in module.__dict__}
    names = apply_checkpointing(model, policy, every=every, modules=modules)
    try:
        yield names
    finally:
        remove_checkpointing(model)
        for module, call in before.items():
            module.__dict__[_KEY] = call


def remove_checkpointing(model: nn.Module) -> None:
    """Undo `apply_checkpointing`. A model without segments is left as it is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"bigkernels.remove_checkpointing: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module.__dict__.get(_KEY), _Checkpointed):
            del module.__dict__[_KEY]


def _given(modules: Any, names: dict[nn.Module, str]) -> list[nn.Module]:
    if isinstance(modules, type):
        return [m for m in names if isinstance(m, modules)]
    by_name = {name: module for module, name in names.items()}
    given = []
    for m in modules:
        module = by_name.get(m) if isinstance(m, str) else m
        if module not in names:
            raise ValueError(f"bigkernels.apply_checkpointing: {m!r} is not in the model")
        given.append(module)
    return given


def _structure(module: nn.Module) -> tuple:
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _blocks(model: nn.Module, empty: bool = False) -> list[nn.Module]:
    """Blocks of all lists, outermost first: a list within a block belongs to the block.

    Models alternate kinds of blocks (mixtures of experts, windows): a list counts if some structure repeats in it.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            continue
        children = list(module.children())
        kinds = [_structure(c) for c in children]
        if len({type(c) for c in children}) < len(children) and len(set(kinds)) < len(children):
            blocks = [
                c for c, kind in zip(children, kinds, strict=True) if (kind[1] or empty) and next(c.children(), None)
            ]
            found += [b for b in blocks if b not in inside]
            inside.update(m for b in blocks for m in b.modules())
    return found
