"""A linear layer whose weight is quantized and frozen."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.quantized_linear import quantized_linear
from ..quantization import Format, QuantizedWeight, quantize_weight
from ._quantized import Quantized


class QuantizedLinear(Quantized):
    """``x @ W.T + bias`` with W (N, K) in codes; gradients reach `x` and `bias`.

    The tensors of the weight are buffers: they are saved, copied and moved as the model is, and keep their dtypes when
    it is cast. A state dict loads into a layer of the same format and size alone.

    Args:
        qweight: from `bigkernels.functional.quantize_weight`.
        bias: (N,), which becomes a parameter (itself, if it is one), or None.
    """

    def __init__(self, qweight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__(qweight)
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: str | Format) -> QuantizedLinear:
        """The layer of a `torch.nn.Linear`, whose bias it takes over."""
        return cls(quantize_weight(linear.weight, config), linear.bias).train(linear.training)

    def dequantize(self) -> nn.Linear:
        """The `torch.nn.Linear` of the values that the codes stand for, in the dtype that was quantized."""
        weight = self.qweight.dequantize()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", weight.dtype)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.qweight, self.bias)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"{self.config}")  # fmt: skip
