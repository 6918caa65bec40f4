"""What the families share: the layout of sequences, float32 or float64, exponentials that do not overflow, checks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PreferenceLoss(NamedTuple):
    """Of P pairs.

    Attributes:
        loss: the mean of `losses`.
        losses: (P,), a loss a pair, differentiable.
        chosen_rewards: (P,), the implicit reward of the chosen completions.
        rejected_rewards: (P,), that of the rejected ones.
    """

    loss: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """(P,), the reward of the chosen completions beyond that of the rejected ones."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def accuracy(self) -> Tensor:
        """The part of the pairs whose chosen completion has the larger reward."""
        return (self.margins > 0).to(self.losses.dtype).mean()


def of_pairs(losses: Tensor, chosen: Tensor, rejected: Tensor) -> PreferenceLoss:
    return PreferenceLoss(losses.mean(), losses, chosen.detach(), rejected.detach())


def wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def bounded(log_ratio: Tensor) -> Tensor:
    """No larger than what exp makes a finite number of, with room for a product: 80 in float32.

    Beyond that there is no gradient: that of a sum with infinity in it would be NaN for all the others.
    """
    return log_ratio.clamp_max(0.9 * math.log(torch.finfo(log_ratio.dtype).max))


def smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(x), where a part of the labels is the other way round."""
    loss = -(1 - label_smoothing) * logsigmoid(x)
    return loss - label_smoothing * logsigmoid(-x) if label_smoothing else loss


# ---- sequences ------------------------------------------------------------------------------------------------------


def sums(t: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of sequences, (B,)."""
    if cu_seqlens is None:
        return t.sum(-1)
    return torch.segment_reduce(t, "sum", offsets=cu_seqlens, initial=0, unsafe=True)


def spread(t: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A number a sequence (B,) to its tokens."""
    if cu_seqlens is None:
        return t.unsqueeze(-1).expand_as(like)
    position = torch.arange(like.shape[0], device=like.device, dtype=cu_seqlens.dtype)
    return t[torch.searchsorted(cu_seqlens, position, right=True) - 1]


def kept_of(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_shapes(op: str, first: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.shape != reference.shape:
            raise ValueError(
                f"bigkernels.losses.{op}: {name} has shape {tuple(t.shape)} and {first} "
                f"{tuple(reference.shape)}; they must have one shape"
            )


def check_layout(op: str, name: str, t: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    expected, dim = ("(B, S)", 2) if cu_seqlens is None else ("(T,), as cu_seqlens is given", 1)
    if t.dim() != dim:
        raise ValueError(f"bigkernels.losses.{op}: {name} has shape {tuple(t.shape)}, expected {expected}")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0):
        raise ValueError(f"bigkernels.losses.{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (B + 1,)")
    check_shapes(op, name, t, mask=mask)


def check_range(op: str, name: str, value: object, accepted: object, fits: bool) -> None:
    if not fits:
        raise ValueError(f"bigkernels.losses.{op}: {name} is {value}, expected {accepted}")


def check_name(op: str, name: str, value: object, accepted: Iterable[str]) -> None:
    accepted = tuple(accepted)
    check_range(op, name, repr(value), "one of " + ", ".join(accepted), value in accepted)


def check_smoothing(op: str, label_smoothing: float) -> None:
    check_range(op, "label_smoothing", label_smoothing, "in [0, 0.5)", 0 <= label_smoothing < 0.5)
