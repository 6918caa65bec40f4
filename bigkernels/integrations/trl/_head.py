"""This package's products in the place of TRL's fused head.

TRL's trainers compute log probabilities of tokens, entropies and accuracies from hidden states, some tokens at a time.
`use_head` lets them do so by `bigkernels.functional.linear_logprobs`: on the CPU with float32 logits that are computed
by kernels, where TRL rounds them to the dtype of the model; and a quantized head is read in its codes, on every device.
"""

# mypy: ignore-errors

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from trl.trainer import utils

from ...nn._weight import LazyWeight
from ...ops._chunks import Call, per_token
from ...ops.arguments import autocast_dtype
from ...ops.linear_logprobs import REPORTS, LogProbs, finished
from ...patch._metrics import watcher_of
from ...program.suspend import PASSES_ON
from ...quantization import QuantizedWeight

_THEIRS = "_ChunkedLogProbFunction"


def use_head(model: nn.Module) -> bool:
    """Let the fused head that a trainer of TRL has given `model` compute by bigkernels; of this model alone.

    Args:
        model: as the trainer has it, in wrappers or not. A model without such a head stays as it is.

    Returns:
        Whether it has one.

    Raises:
        ValueError: an adapter is on its output layer, whose weight alone TRL's head reads.
    """
    found = False
    for module, function in _heads(model):
        found = True
        _check_output_layer(module)
        if function.__globals__.get(_THEIRS) is not _Head:
            module.forward = types.MethodType(_with_our_head(function), module)
    return found


def _heads(model: nn.Module) -> Iterator[tuple[nn.Module, types.FunctionType]]:
    """Models with a fused head, and its forward."""
    for module in model.modules():
        function = getattr(module.__dict__.get("forward"), "__func__", None)
        if isinstance(function, types.FunctionType) and _THEIRS in function.__code__.co_names:
            yield module, function


def has_head(model: nn.Module) -> bool:
    return next(_heads(model), None) is not None


def closure_of(model: nn.Module) -> dict[str, Any]:
    """What TRL's fused forward of a model knows, by its names there."""
    _, function = next(_heads(model))
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def _with_our_head(function: types.FunctionType) -> types.FunctionType:
    """The function, with another class under the name of TRL's."""
    names = {**function.__globals__, _THEIRS: _Head, "_use_triton": lambda device: True}
    code = (
        function.__code__.replace()
    )  # of its own: compiled code is kept by it, and looks names up in one function's globals
    made = types.FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
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
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> tuple[Tensor | None, ...]:
        """Log probabilities (N,) of the targets, and of entropies, log sums of squared probabilities, mean logits and
        whether the target is the largest logit those that are asked for, or None.
        """
        head = quantized(weight)
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
        reports = tuple(name for name in REPORTS if name in outputs)
        objective = LogProbs(targets.long(), "entropy" in outputs, reports)
        call = Call(
            objective, quantized=head, scale=float(logit_scale), softcap=softcap, temperature=float(temperature)
        )
        found = finished(per_token(hidden, None if head is not None else weight, bias, call), reports, None)
        named = dict(zip(("log_probs", "entropy")[: objective.outputs] + reports, found, strict=True))
        return tuple(named.get(name) for name in ("log_probs", "entropy", *REPORTS))


def _check_output_layer(module: nn.Module) -> None:
    watcher = watcher_of(module)
    if watcher is not None and watcher.coefficient:
        raise ValueError(
            "bigkernels.integrations.trl: the model has LossMetrics with a z_loss, which TRL's loss would not have"
        )
    layer = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if layer is not None and hasattr(layer, "base_layer") and getattr(layer, "active_adapters", None):
        raise ValueError(
            "bigkernels.integrations.trl: the output layer has an adapter, and TRL's fused head reads the "
            "weight below it: the adapter would be ignored and learn nothing. Leave the layer out of the "
            "adapter's target_modules"
        )


def quantized(weight: Tensor) -> QuantizedWeight | None:
    """What a quantized layer's ``weight`` reads."""
    if isinstance(weight, LazyWeight) and weight._owner is not None and not weight._trained:
        return getattr(weight._owner, "qweight", None)
    return None
