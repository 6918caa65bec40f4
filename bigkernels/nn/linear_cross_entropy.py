"""A head and the cross entropy of its logits in one, as a module."""

# mypy: ignore-errors

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.linear_cross_entropy import CrossEntropyOutput, linear_cross_entropy


class LinearCrossEntropyLoss(nn.Module):
    """Cross entropy of ``logit_scale * (hidden @ weight.T + bias)`` without these logits.

    Arguments as those of `torch.nn.LinearCrossEntropyLoss`, but for two: the parameter (V, H) of the head is `weight`
    itself, so weights a class are called `class_weight`, and only one loss a token is computed (no `out_features`).
    The other options are those of `bigkernels.functional.linear_cross_entropy`; those that report something beside the
    loss make it return a `CrossEntropyOutput`.

    To tie the head to an embedding, assign its parameter: ``loss.weight = embedding.weight``.

    Args:
        in_features: H, the size of a hidden state.
        num_classes: V, the size of the vocabulary.
        bias: whether the head has one.
        ignore_index: tokens with this target do not count; None is -100.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        focal_gamma: float = 0.0,
        logit_scale: float = 1.0,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self.register_buffer("class_weight", class_weight)
        self.options = {
            "ignore_index": -100 if ignore_index is None else ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "focal_gamma": focal_gamma,
            "logit_scale": logit_scale,
        }
        reports = {
            "return_z_loss": return_z_loss,
            "return_token_accuracy": return_token_accuracy,
            "return_predicted_tokens": return_predicted_tokens,
        }
        self.options |= {name: True for name, asked in reports.items() if asked}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear`: uniform within 1 / sqrt(H)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, hidden: Tensor, target: Tensor, token_weight: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """hidden (..., H), target (...), token_weight (...) or None: a loss, or one a token, in float32."""
        return linear_cross_entropy(
            hidden,
            self.weight,
            target,
            self.bias,
            class_weight=self.class_weight,
            token_weight=token_weight,
            **self.options,
        )

    def extra_repr(self) -> str:
        vocabulary, size = self.weight.shape
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"in_features={size}, num_classes={vocabulary}, bias={self.bias is not None}, {options}"
