"""The layers that can be quantized, and what is left of one whose weight went into codes."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

_HOOKS = [name for name in nn.Module().__dict__ if "hook" in name and "state_dict" not in name]
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def conv1d() -> type | None:
    """The class of transformers whose weight is that of a linear layer, transposed; None where it is not loaded."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def is_transposed(kind: type) -> bool:
    """Whether the weight of layers of a class is (K, N)."""
    return kind is not None and kind is conv1d()


def is_linear(kind: type) -> bool:
    """Whether a class is `torch.nn.Linear` itself, or `Conv1D`."""
    return kind is nn.Linear or is_transposed(kind)


def rows(module: nn.Module, kind: type | None = None) -> Tensor:
    """The weight (N, K) of a layer; `kind` is its class, where it is one that stands for another."""
    weight: Any = module.weight
    return weight.T if is_transposed(kind or type(module)) else weight


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Put the hooks of one module on another; their handles remove them there."""
    for name in _HOOKS:
        target.__dict__[name] = source.__dict__[name]


def has_state_hooks(module: nn.Module) -> bool:
    return any(module.__dict__.get(name) for name in _STATE_HOOKS)


_PATCH = "_bigkernels_patch"  # where `patch` keeps what it wrote into an instance


def has_own_forward(module: nn.Module) -> bool:
    """Whether an instance has a forward that `patch` did not give it: what it computes is then not known."""
    held = module.__dict__.get("forward")
    return held is not None and held is not module.__dict__.get(_PATCH, {}).get("forward", (None,))[0]


def _unpatched(module: nn.Module) -> dict[str, object]:
    """Attributes without what `patch` wrote: what it wrote is for that instance."""
    record = module.__dict__.get(_PATCH, {})
    kept = {key: value for key, value in module.__dict__.items() if key != _PATCH and key not in record}
    return kept | {key: before for key, (_, before) in record.items() if not isinstance(before, str)}


class Shell:
    """A layer without its parameters: its class, its options and what users put on it.

    Attributes:
        kind: its class.
        options: its attributes by name.
    """

    def __init__(self, module: nn.Module, kind: type | None = None) -> None:
        self.kind = kind or type(module)
        own = {"_parameters", "_buffers", "_modules", *_HOOKS}
        self.options = {key: value for key, value in _unpatched(module).items() if key not in own}
        self._names = tuple(module._parameters)

    def filled(self, values: Tensor, bias: nn.Parameter | None, trained: bool, like: nn.Module) -> nn.Module:
        """The layer with a weight (N, K) and a bias; hooks and the mode are those of `like`."""
        module: nn.Module = object.__new__(self.kind)
        nn.Module.__init__(module)
        module.__dict__.update(self.options)
        weight = values.T.contiguous() if is_transposed(self.kind) else values
        held = {"weight": nn.Parameter(weight, requires_grad=trained), "bias": bias}
        for name in self._names:
            module.register_parameter(name, held[name])
        carry_hooks(like, module)
        return module.train(like.training)


def become(module: nn.Module, other: type, /, **attributes: object) -> nn.Module:
    """A module of another class with the attributes, parameters and hooks of a layer."""
    replacement: nn.Module = object.__new__(other)
    nn.Module.__init__(replacement)
    replacement.__dict__.update(_unpatched(module))
    replacement._parameters = dict(module._parameters)
    for name, value in attributes.items():
        setattr(replacement, name, value)
    return replacement


def is_spread(weight: Tensor) -> bool:
    """Whether a weight lies in parts on several ranks."""
    import torch.distributed as dist

    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def exact_weight(weight: Tensor) -> bool:
    """Whether a weight is a tensor of numbers as they are: no subclass that holds something else, no 8-bit floats."""
    plain = isinstance(weight, nn.Parameter) or type(weight) is Tensor
    return plain and type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.itemsize > 1
