"""An embedding whose table is quantized and frozen."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .._deprecated import renamed_arguments
from ..quantization import Format, QuantizedWeight, quantize_weight
from ..quantization.layers import Shell, carry_hooks
from .quantized import Quantized, weight_of


class QuantizedEmbedding(Quantized):
    """Rows of a table (N, K) in codes: those that are asked for are decoded, in plain PyTorch, and no others.

    Args:
        qweight: from `bigkernels.functional.quantize_weight`. Its dtype is that of the rows; it follows casts of the
            model.
        shell: what `dequantize` makes of it; a `torch.nn.Embedding` by default.
        trained: whether the weight of that requires a gradient.
    """

    def __init__(self, qweight: QuantizedWeight, shell: Shell | None = None, trained: bool = True) -> None:
        super().__init__(qweight, shell, trained)
        self.num_embeddings, self.embedding_dim = qweight.shape

    @classmethod
    @renamed_arguments("bigkernels.nn.QuantizedEmbedding.from_embedding", config="format")
    def from_embedding(cls, embedding: nn.Embedding, format: str | Format) -> QuantizedEmbedding:
        """The rows of a `torch.nn.Embedding`, which gets no gradients anymore.

        Raises:
            ValueError: it has a `max_norm`, by which it changes its rows.
        """
        if embedding.max_norm is not None:
            raise ValueError("bigkernels.nn.QuantizedEmbedding: an embedding with max_norm changes its rows")
        return cls.standing_for(embedding, quantize_weight(embedding.weight, format))

    @classmethod
    def standing_for(
        cls, embedding: nn.Embedding, qweight: QuantizedWeight, kind: type | None = None
    ) -> QuantizedEmbedding:
        """The table with given codes, which `dequantize` makes an `embedding` of (of class `kind`) again."""
        layer = cls(qweight, Shell(embedding, kind), embedding.weight.requires_grad)
        carry_hooks(embedding, layer)
        return layer.train(embedding.training)

    @property
    def weight(self) -> Tensor:
        """(N, K): shape, dtype and device, and values that are computed when they are read; writing to it raises."""
        return weight_of(self)

    @property
    def padding_idx(self) -> int | None:
        return None if self._shell is None else cast(Any, self._shell.options.get("padding_idx"))

    def dequantize(self) -> nn.Embedding:
        """The embedding of the values that the codes stand for, in the dtype that was quantized or cast to since."""
        values = self.qweight.dequantize()
        if self._shell is not None:
            return cast(nn.Embedding, self._shell.filled(values, None, self._trained, self))
        layer = nn.Embedding.from_pretrained(values, freeze=not self._trained)
        carry_hooks(self, layer)
        return layer.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...), from 0 to N - 1, to rows (..., K)."""
        flat = ids.reshape(-1)
        # Unlike indexing, `index_select` refuses ids below 0.
        picked = self.qweight.operands().rows(lambda t: t.index_select(0, flat))
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        rows = self.qweight.leaving(picked.decoded(self.embedding_dim, wide))
        return rows.to(self.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.weight_format}"
