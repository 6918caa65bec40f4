"""Cross entropy as a module."""

# mypy: ignore-errors

from __future__ import annotations

from torch import Tensor, nn

from .._deprecated import renamed_members
from ..ops.cross_entropy import cross_entropy


@renamed_members("bigkernels.nn.CrossEntropyLoss", weight="class_weight")
class CrossEntropyLoss(nn.Module):
    """Cross entropy of logits (T, V) and targets (T,); options as in `bigkernels.functional.cross_entropy`."""

    class_weight: Tensor | None

    def __init__(
        self,
        class_weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.options = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "focal_gamma": focal_gamma,
        }

    def forward(self, logits: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        return cross_entropy(logits, target, self.class_weight, token_weight=token_weight, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
