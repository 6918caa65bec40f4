"""The step program of causal language models: which modules get one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

from ..program._forward import apply, forward
from ..program._state import KEY, Steps, unsupported
from ._bound import Bound, Stepping
from ._rule import Write


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that `generate` calls: they take tokens and a cache. Those inside of another one are left out."""
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module not in inside and _generates(module):
            inside.update(module.modules())
            yield path, module


def _generates(module: nn.Module) -> bool:
    if not hasattr(type(module), "prepare_inputs_for_generation") or not hasattr(module, "config"):
        return False
    try:
        names = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):
        return False
    return "input_ids" in names and ("cache" in names or "past_key_values" in names)


def decoders(model: nn.Module) -> set[nn.Module]:
    """All modules of those that generate and have no encoder."""
    found: set[nn.Module] = set()
    for _, module in candidates(model):
        if not getattr(module.config, "is_encoder_decoder", False):
            found.update(module.modules())
    return found


def steps_of(module: nn.Module, stored: bool) -> Steps:
    """Those that an earlier patch gave it, or new ones."""
    held = module.__dict__.get(KEY)
    return held if isinstance(held, Steps) and held.stored == stored else Steps(stored=stored)


def release(module: nn.Module) -> None:
    """Let go what the program of a module has copied: a report may outlive it."""
    held = module.__dict__.get(KEY)
    if isinstance(held, Steps):
        held.release()


def writes_for(module: nn.Module, others: list[Write], steps: Steps) -> list[Write]:
    """What to write, among what is written for other reasons: the program goes around the forward that they give."""
    at = next((i for i, w in enumerate(others) if w.module is module and w.key == "forward"), None)
    below = None if at is None else others[at].value.func
    if at is not None:
        del others[at]
    return [
        Write(module, "forward", Stepping(forward, module, below)),
        Write(module, "_apply", Bound(apply, module)),
        Write(module, KEY, steps),
    ]


__all__ = ["candidates", "release", "steps_of", "unsupported", "writes_for"]
