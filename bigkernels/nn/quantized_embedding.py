"""An embedding whose table is quantized and frozen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.quantized_linear import dequantize_rows
from ..quantization import Format, QuantizedWeight, quantize_weight
from ._quantized import Quantized


class QuantizedEmbedding(Quantized):
    """Rows of a table (N, K) in codes: those that are asked for are decoded, in plain PyTorch, and no others.

    Args:
        qweight: from `bigkernels.functional.quantize_weight`.
        dtype: of the rows it gives; by default what was quantized. It follows casts of the model.
    """

    def __init__(self, qweight: QuantizedWeight, dtype: torch.dtype | None = None) -> None:
        super().__init__(qweight)
        self.num_embeddings, self.embedding_dim = qweight.shape
        self.like = torch.empty(0, dtype=dtype or qweight.dtype)  # cast as the model is

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: str | Format) -> QuantizedEmbedding:
        """The rows of a `torch.nn.Embedding`, which gets no gradients anymore and has no `max_norm`."""
        return cls(quantize_weight(embedding.weight, config)).train(embedding.training)

    def dequantize(self) -> nn.Embedding:
        """The `torch.nn.Embedding` of the values that the codes stand for."""
        return nn.Embedding.from_pretrained(self.qweight.dequantize(self.like.dtype), freeze=False).train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to rows (..., K)."""
        codes, scale, zero, row_scale, book, group = self.qweight.operands()
        flat = ids.reshape(-1)
        picked = (t if t is None else t[flat] for t in (codes, scale, zero, row_scale))
        wide = torch.float64 if self.like.dtype == torch.float64 else torch.float32
        rows = dequantize_rows(*picked, book, group, self.embedding_dim, wide)
        if self.qweight.channel is not None:
            rows = rows * self.qweight.channel.to(wide)
        return rows.to(self.like.dtype).view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        self.like = fn(self.like)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.config}"
