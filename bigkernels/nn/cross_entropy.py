"""Cross entropy as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.cross_entropy import cross_entropy


class CrossEntropyLoss(nn.Module):
    """Cross entropy of logits (T, V) and targets (T,); options as in `bigkernels.functional.cross_entropy`."""

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean",
                 label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
                 focal_gamma: float = 0.0) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("weight", weight)
        self.options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing,
                        "z_loss": z_loss, "softcap": softcap, "focal_gamma": focal_gamma}  # fmt: skip

    def forward(self, logits: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        return cross_entropy(logits, target, self.weight, token_weight=token_weight, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
