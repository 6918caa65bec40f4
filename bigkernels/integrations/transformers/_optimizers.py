"""The optimizers of `bigkernels.optim` by name, as ``TrainingArguments(optim=...)`` takes them."""

# mypy: ignore-errors

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.generic import ExplicitEnum

from ... import optim

if TYPE_CHECKING:
    from transformers import TrainingArguments

_CLASSES: dict[str, type[optim.Optimizer]] = {
    kind.__name__.lower(): kind
    for kind in (getattr(optim, name) for name in optim.__all__)
    if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer
}
_STATES: dict[str, Any] = {"": None, "_8bit": "int8", "_16bit": torch.bfloat16}
NAMES = {f"bigkernels_{name}{end}": (name, states) for name in _CLASSES for end, states in _STATES.items()}


def optimizer_cls_and_kwargs(
    name: str, args: TrainingArguments, optim_args: Mapping[str, Any] | None = None
) -> tuple[Callable[..., optim.Optimizer], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, for an optimizer by its name.

    Args:
        name: "bigkernels_" and a class of `bigkernels.optim` in lower case, as "bigkernels_adamw";
            with "_8bit" or "_16bit" after it, its states are stored in 8 bits or in bfloat16.
        args: where learning rate, betas and eps are taken from (Muon's are its own defaults, and AdamW's beside it).
        optim_args: further arguments of the class, as ``{"rounding": "kahan"}``; `args.optim_args` by default. Values
            may be texts, as they are there.

    Returns:
        The class and its arguments; for Muon, what `Trainer` calls a factory, as it sets parameters apart by modules.

    Raises:
        ValueError: there is no such name.
    """
    if name not in NAMES:
        raise ValueError(f"bigkernels: optim is {name!r}; accepted are {', '.join(NAMES)}")
    short, states = NAMES[name]
    kind = _CLASSES[short]
    if optim_args is None:
        optim_args = _parsed(args.optim_args)
    known = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    accepted = inspect.signature(kind).parameters
    options = {"lr": args.learning_rate}
    if "betas" in accepted:  # the arguments are those of Adam; another rule's eps has another default
        options |= {key: value for key, value in known.items() if key in accepted}
    if states is not None:
        options["state_dtype"] = states
    options |= {key: _value(value) for key, value in optim_args.items()}
    if short != "muon":
        return kind, options
    return _muon, {"weight_decay": args.weight_decay} | options


def _muon() -> Callable[..., optim.Optimizer]:
    return lambda model, **options: optim.Muon(optim.muon_groups(model), **options)


def _parsed(text: str | None) -> dict[str, str]:
    found = {}
    for part in (text or "").replace(" ", "").split(","):
        if part:
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"bigkernels: optim_args is {text!r}, expected names and values: 'a=1,b=2'")
            found[key] = value
    return found


def _value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[value.lower()]
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype) and value not in ("int8",):  # "int8" is a format of its own
        return dtype
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def register_optimizers() -> None:
    """Let ``TrainingArguments(optim="bigkernels_adamw_8bit")`` be what it says.

    The names are made when transformers first asks for one: its trainer takes a second to import.
    """
    missing = ExplicitEnum._missing_.__func__
    if getattr(missing, "_bigkernels", False):
        return

    def with_ours(cls: type, value: Any) -> Any:
        if cls.__name__ == "OptimizerNames" and value in NAMES and can_be_taught():
            _teach(cls)
            return cls._value2member_map_[value]
        return missing(cls, value)

    with_ours._bigkernels = True
    ExplicitEnum._missing_ = classmethod(with_ours)


def can_be_taught() -> bool:
    """Whether this version of transformers looks optimizers up in a table."""
    return importlib.util.find_spec("transformers.trainer_optimizer") is not None


def _teach(names: type) -> None:
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS

    def handler(context: Any) -> tuple[Any, dict[str, Any]]:
        return optimizer_cls_and_kwargs(context.args.optim.value, context.args, context.optim_args)

    for name in NAMES:
        if name not in names._value2member_map_:
            _OPTIMIZER_HANDLERS[_added(names, name)] = handler


def _added(names: type, value: str) -> Any:
    """A new member of an enumeration of texts: there is no other way past the check of `TrainingArguments`."""
    member = str.__new__(names, value)
    member._name_, member._value_ = value.upper(), value
    setattr(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = names._value2member_map_[value] = member
    return member


def is_ours(optimizer: Any) -> bool:
    """Whether an optimizer, or what accelerate wrapped around it, is of `bigkernels.optim`."""
    return isinstance(getattr(optimizer, "optimizer", optimizer), optim.Optimizer)
