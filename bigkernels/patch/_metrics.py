"""What the fused loss of a patched language model reports while it trains."""

# mypy: ignore-errors

from __future__ import annotations

import functools
from types import FunctionType, TracebackType

import torch
from torch import Tensor, nn

from ..ops.linear_cross_entropy import CrossEntropyOutput
from ..program.suspend import RECORD

WATCHED = "_bigkernels_loss_metrics"  # of the module whose forward has the loss
_HELPER = "_bigkernels_logits"


class LossMetrics:
    """Token accuracy of a patched language model in training, whose loss makes no logits, and a z-loss::

        bigkernels.patch(model)
        metrics = bigkernels.LossMetrics(model, z_loss=1e-4)
        for batch in batches:
            model(**batch).loss.backward()
            ...
        print(metrics.token_accuracy, metrics.z_loss)
        metrics.reset()

    Nothing waits for a GPU until a figure is read. What the loss is computed from in another way is not counted: in
    evaluation, where the logits are there, and in `torch.compile`'s graphs.

    Args:
        model: as `patch` left it, in wrappers or not. Of several of these objects the last one counts.
        z_loss: not negative; adds ``z_loss * logsumexp(logits)^2`` of each token to the loss (PaLM,
            https://arxiv.org/abs/2204.02311). A training step whose loss could not have it raises RuntimeError.

    Attributes:
        tokens: how many labels have counted since `reset`.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: no loss of the model was fused by `patch`, or `z_loss` is negative.
    """

    def __init__(self, model: nn.Module, *, z_loss: float = 0.0) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"bigkernels.LossMetrics: model must be a torch.nn.Module, got {type(model).__name__}")
        if not 0 <= z_loss < float("inf"):
            raise ValueError(f"bigkernels.LossMetrics: z_loss is {z_loss}, expected a number that is not negative")
        self.coefficient = float(z_loss)
        self._modules = [module for module in model.modules() if _is_fused(module)]
        if not self._modules:
            raise ValueError(
                f"bigkernels.LossMetrics: {type(model).__name__} has no loss that bigkernels.patch has "
                "fused with its output layer; the report of patch says why"
            )
        for module in self._modules:
            module.__dict__[WATCHED] = self
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self._sums: dict[torch.device, Tensor] = {}

    def close(self) -> None:
        """Leave the model as it was; figures stay."""
        for module in self._modules:
            if module.__dict__.get(WATCHED) is self:
                del module.__dict__[WATCHED]

    def __enter__(self) -> LossMetrics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def tokens(self) -> int:
        return int(self._total(0))

    @property
    def token_accuracy(self) -> float | None:
        """The part of the labels that were the largest logit; None where nothing was counted."""
        return self._total(1) / self.tokens if self.tokens else None

    @property
    def z_loss(self) -> float | None:
        """The mean of what was added to the loss of a token; None where nothing was counted."""
        return self._total(2) / self.tokens if self.tokens else None

    def _total(self, which: int) -> float:
        return sum(float(sums[which]) for sums in self._sums.values())

    @torch.no_grad()
    def add(self, found: CrossEntropyOutput, kept: Tensor, mean: bool) -> None:
        """What one loss has reported: its accuracy, and its z-loss as a mean or a sum over `kept`."""
        count = kept.sum().to(torch.float64)
        z_loss = found.z_loss * (count if mean else 1)
        new = torch.stack([count, (found.token_accuracy * count).round(), z_loss.to(count.dtype)])
        new = torch.where(count > 0, new, 0)
        before = self._sums.get(new.device)
        self._sums[new.device] = new if before is None else before + new


def watcher_of(module: nn.Module) -> LossMetrics | None:
    return module.__dict__.get(WATCHED)


def _is_fused(module: nn.Module) -> bool:
    """Whether the forward that `patch` wrote asks for logits that are not computed."""
    below = [module.__dict__.get(RECORD, {}).get("forward", (None,))[0]]
    while below:
        function = below.pop()
        if isinstance(function, functools.partial):  # the step program has the rest below it
            below += [function.func, *function.args]
        elif isinstance(function, FunctionType):
            if _HELPER in (*function.__code__.co_names, *function.__code__.co_freevars):
                return True
            below.append(getattr(function, "__wrapped__", None))  # a decorator of the model's own
    return False
