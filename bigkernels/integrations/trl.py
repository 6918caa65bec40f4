"""TRL: this package's products and losses in the place of its fused head.

TRL's trainers compute log probabilities of tokens, entropies and accuracies from hidden states, some tokens at a time.
`use_head` lets them do so by `bigkernels.functional.linear_logprobs`: on the CPU with float32 logits that are computed
by kernels, where TRL rounds them to the dtype of the model; and a quantized head is read in its codes, on every device.
`bigkernels.integrations.transformers.TrainerCallback` calls it.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer import utils

from ..nn._weight import LazyWeight
from ..ops._arguments import autocast_dtype
from ..ops._chunks import Call, Tokens, per_token
from ..ops.linear_logprobs import LogProbs
from ..program._suspend import PASSES_ON
from ..quantization import QuantizedWeight

_THEIRS = "_ChunkedLogProbFunction"
# What TRL asks for beside log probabilities, in the order in which it takes them.
_EXTRAS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def use_head(model: nn.Module) -> bool:
    """Let the fused head that a trainer of TRL has given `model` compute by bigkernels; of this model alone.

    Args:
        model: as the trainer has it, in wrappers or not. A model without such a head stays as it is.

    Returns:
        Whether it has one.
    """
    found = False
    for module in model.modules():
        forward = module.__dict__.get("forward")
        function = getattr(forward, "__func__", None)
        if not isinstance(function, types.FunctionType) or _THEIRS not in function.__code__.co_names:
            continue
        found = True
        if function.__globals__.get(_THEIRS) is not _Head:
            module.forward = types.MethodType(_with_our_head(function), module)
    return found


def _with_our_head(function: types.FunctionType) -> types.FunctionType:
    """The function, with another class under the name of TRL's."""
    names = {**function.__globals__, _THEIRS: _Head, "_use_triton": lambda device: True}
    made = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if "original_forward" in cells:  # rollouts of a patched model keep their step program
        setattr(made, PASSES_ON, cells["original_forward"].cell_contents)
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    return made


class _Head:
    """In the place of TRL's autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        softcap: float | None = None, logit_scale: float = 1.0, outputs: tuple[str, ...] = ("log_probs",),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Log probabilities (N,) of the targets, and of entropies, log sums of squared probabilities, mean logits and
        whether the target is the largest logit those that are asked for, or None.
        """
        head = _quantized(weight)
        if head is None and not hidden.is_cpu:
            theirs = getattr(utils, _THEIRS)
            return theirs.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
        lowered = autocast_dtype(hidden.device)
        if lowered is not None:
            hidden = hidden.to(lowered)
        if head is None and weight.dtype != hidden.dtype:
            weight = weight.to(hidden.dtype)
        if bias is not None and bias.dtype != hidden.dtype:
            bias = bias.to(hidden.dtype)
        extras = tuple(name for name in _EXTRAS if name in outputs)
        objective = _Described(targets.long(), "entropy" in outputs, extras)
        call = Call(
            objective, quantized=head, scale=float(logit_scale), softcap=softcap, temperature=float(temperature)
        )
        found = per_token(hidden, None if head is not None else weight, bias, call)
        named = dict(zip(objective.names, found, strict=True))
        if "is_top1" in named:
            named["is_top1"] = named["is_top1"].bool()
        return tuple(
            t if t is None or name in ("log_probs", "entropy") else t.detach()
            for name, t in ((name, named.get(name)) for name in ("log_probs", "entropy", *_EXTRAS))
        )


class _Described(LogProbs):
    """Log probabilities, and what is known of the distribution without a gradient."""

    def __init__(self, target: Tensor, entropy: bool, extras: tuple[str, ...]) -> None:
        super().__init__(target, entropy)
        self.extras, self._own = extras, self.outputs
        self.names = ("log_probs", "entropy")[: self._own] + extras
        self.outputs += len(extras)

    def values(self, z: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
        found = []
        for name in self.extras:
            if name == "is_top1":
                found.append((z.argmax(-1) == self.target[tokens]).to(z.dtype))
            elif name == "mean_logits":
                found.append(z.mean(-1))
            else:
                found.append(torch.logsumexp(2 * z, -1) - 2 * torch.logsumexp(z, -1))
        first = super().values(z, tokens)
        return (*first[: self._own], *found, *first[self._own :])

    def gradient(self, z: Tensor, tokens: Tokens, values: Any, grads: Any) -> Tensor:
        values = [*values[: self._own], *values[self.outputs :]]
        return super().gradient(z, tokens, values, grads[: self._own])


def _quantized(weight: Tensor) -> QuantizedWeight | None:
    """What a quantized layer's ``weight`` reads."""
    if isinstance(weight, LazyWeight) and weight._owner is not None and not weight._trained:
        return getattr(weight._owner, "qweight", None)
    return None
