"""A linear layer whose weight is quantized and frozen."""

# mypy: ignore-errors

from __future__ import annotations

from torch import Tensor, nn

from .._deprecated import renamed_arguments
from ..ops.quantized_linear import quantized_linear
from ..quantization import Format, QuantizedWeight, quantize_weight
from ..quantization.layers import Shell, carry_hooks, is_transposed, rows
from .quantized import Quantized, weight_of


class QuantizedLinear(Quantized, nn.Linear):
    """``x @ W.T + bias`` with W (N, K) in codes; gradients reach `x` and `bias`.

    It is a `torch.nn.Linear` to whoever asks, as PEFT does, with a `weight` that is computed when it is read. The
    tensors of the weight are buffers: they are saved, copied and moved as the model is, and keep their dtypes when it
    is cast. A state dict loads into a layer of the same format and size alone.

    Args:
        qweight: from `bigkernels.functional.quantize_weight`.
        bias: (N,), which becomes a parameter (itself, if it is one), or None.
        shell: what `dequantize` makes of it; a `torch.nn.Linear` by default.
        trained: whether the weight of that requires a gradient.
    """

    def __init__(
        self, qweight: QuantizedWeight, bias: Tensor | None = None, shell: Shell | None = None, trained: bool = True
    ) -> None:
        super().__init__(qweight, shell, trained)
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @classmethod
    @renamed_arguments("bigkernels.nn.QuantizedLinear.from_linear", config="format")
    def from_linear(cls, linear: nn.Module, format: str | Format) -> QuantizedLinear:
        """The layer of a `torch.nn.Linear` (or `Conv1D` of transformers), whose bias and hooks it takes over."""
        return cls.standing_for(linear, quantize_weight(rows(linear), format))

    @classmethod
    def standing_for(cls, linear: nn.Module, qweight: QuantizedWeight, kind: type | None = None) -> QuantizedLinear:
        """The layer with given codes, which `dequantize` makes a `linear` of (of class `kind`) again."""
        layer = cls(qweight, linear.bias, Shell(linear, kind), linear.weight.requires_grad)
        carry_hooks(linear, layer)
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """(N, K), or (K, N) where it stands for a `Conv1D`: shape, dtype and device, and values that are computed when
        they are read; writing to it raises.
        """
        return weight_of(self, self._shell is not None and is_transposed(self._shell.kind))

    def dequantize(self) -> nn.Module:
        """The layer of the values that the codes stand for, in the dtype that was quantized or cast to since."""
        values = self.qweight.dequantize()
        if self._shell is not None:
            return self._shell.filled(values, self.bias, self._trained, self)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", values.dtype)
        linear.weight, linear.bias = nn.Parameter(values, requires_grad=self._trained), self.bias
        carry_hooks(self, linear)
        return linear.train(self.training)

    def requantized(self, values: Tensor) -> QuantizedLinear:
        """The same layer with other values (N, K), in a format that needs no data."""
        qweight = quantize_weight(values.to(self.dtype), self.weight_format.blind())
        layer = QuantizedLinear(qweight, self.bias, self._shell, self._trained)
        carry_hooks(self, layer)
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.qweight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.weight_format}"
        )
