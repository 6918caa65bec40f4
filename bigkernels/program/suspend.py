"""A model's own code, for a while: without what `patch` put on its instances, and with every call of a module noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks

# Key in a module's __dict__ under which the values that patch wrote and those that were there before are kept.
RECORD = "_bigkernels_patch"
ABSENT = "absent"
# Attribute of a forward that was put over the one of `patch` and hands every call of the model's own kind on to it.
PASSES_ON = "_bigkernels_passes_on"

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CAPTURING = "transformers.utils.output_capturing"  # its hooks do nothing where no outputs are asked for
# Of transformers and PEFT, for adapters under gradient checkpointing: they let outputs require a gradient.
_REQUIRING = ("make_inputs_require_grads", "make_inputs_require_grad")
_GLOBAL = (hooks._global_forward_hooks, hooks._global_forward_pre_hooks)


def idle(hook: Any) -> bool:
    """Whether a hook changes no number of a call in inference."""
    module = str(getattr(hook, "__module__", None))
    requiring = getattr(hook, "__name__", None) in _REQUIRING and module.partition(".")[0] in ("transformers", "peft")
    return module == _CAPTURING or requiring


def disturbance(model: nn.Module) -> str | None:
    """What somebody put around the model's code, which a program would leave out; None if nothing."""
    if any(_GLOBAL):
        return "there are hooks on all modules"
    for path, module in model.named_modules():
        where = path or "(model)"
        for name in _HOOKS:
            if not all(map(idle, getattr(module, name).values())):
                return f"{where}: has hooks"
        if module._compiled_call_impl is not None:
            return f"{where}: is compiled"
        for key in ("forward", "__call__"):
            record = module.__dict__.get(RECORD, {})
            own = module.__dict__.get(key, ABSENT)
            if own is not ABSENT and getattr(own, PASSES_ON, own) is not record.get(key, (ABSENT,))[0]:
                return f"{where}: its forward was replaced on this instance"
            before = record.get(key, (None, ABSENT))[1]
            if not (isinstance(before, str) and before == ABSENT):  # of a pickle, it is another string
                return f"{where}: its forward was replaced on this instance"
    return None


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Inside, no module has what `patch` wrote on it."""
    taken: list[tuple[dict, str, Any]] = []
    for module in model.modules():
        for key, (value, before) in module.__dict__.get(RECORD, {}).items():
            own = module.__dict__.get(key, ABSENT)
            if own is value or getattr(own, PASSES_ON, None) is value:
                taken.append((module.__dict__, key, own))
                if isinstance(before, str) and before == ABSENT:
                    del module.__dict__[key]
                else:
                    module.__dict__[key] = before
    try:
        yield
    finally:
        for where, key, value in taken:
            where[key] = value


@contextmanager
def wrapped(model: nn.Module, wrap: Callable[[nn.Module, str], Callable | None]) -> Iterator[None]:
    """Inside, `wrap(module, path)` is called where a module's forward is; None leaves it."""
    taken = []
    try:
        for path, module in model.named_modules():
            wrapper = wrap(module, path)
            if wrapper is not None:
                module.__dict__["forward"] = wrapper
                taken.append(module.__dict__)
        yield
    finally:
        for where in taken:
            where.pop("forward", None)
