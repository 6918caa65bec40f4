"""The weights of a mixture's experts, quantized and frozen, in the place of the parameter that held them."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor, nn

from .._deprecated import renamed_arguments, renamed_members
from ..ops.grouped_linear import OPERATOR, grouped_linear
from ..ops.quantized_linear import quantized_linear
from ..quantization import Format, QuantizedWeight, quantize_weight
from .quantized import Quantized

_linear = nn.functional.linear
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm}
_GROUPED = {getattr(torch, "_grouped_mm", None), getattr(nn.functional, "grouped_mm", None)} - {None}
_BATCHED = {torch.bmm, Tensor.bmm}


@renamed_members("bigkernels.nn.QuantizedExperts", experts="num_experts", turned="transposed")
class QuantizedExperts(Quantized):
    """Weights (E, N, K) of E experts in codes, for code that reads them as it would a parameter.

    ``w[i]``, with a number or a tensor of one, is a `QuantizedExpert`, which linear layers and matrix products multiply
    with without the dequantized weight; ``w.transpose(-2, -1)`` is the same weights transposed, which
    `torch.nn.functional.grouped_mm` multiplies with expert by expert. Whatever else is asked of it is answered by the
    dequantized weights, or those of them that an index picks.

    Args:
        qweight: the experts one below the other, (E * N, K).
        num_experts: E.
        transposed: the parameter held (E, K, N), what tokens are multiplied with from the left.
    """

    def __init__(
        self, qweight: QuantizedWeight, num_experts: int, transposed: bool = False, trained: bool = True
    ) -> None:
        # `experts` and `turned` are names in saved files.
        super().__init__(qweight, None, trained, experts=num_experts, turned=int(transposed))
        self.num_experts, self.transposed = num_experts, transposed

    @classmethod
    @renamed_arguments("bigkernels.nn.QuantizedExperts.from_parameter", config="format", turned="transposed")
    def from_parameter(cls, weight: Tensor, format: str | Format, transposed: bool = False) -> QuantizedExperts:
        """Of weights (E, N, K), or (E, K, N) if transposed."""
        rows = (weight.transpose(1, 2) if transposed else weight).reshape(-1, weight.shape[1 if transposed else 2])
        return cls(quantize_weight(rows, format), weight.shape[0], transposed, weight.requires_grad)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights in the shape that the parameter had."""
        values = self.qweight.dequantize(dtype).view(self.num_experts, -1, self.in_features)
        return values.transpose(1, 2) if self.transposed else values

    def expert(self, i: int) -> QuantizedExpert:
        """Weights i, which may count from the end."""
        if not -self.num_experts <= i < self.num_experts:
            raise IndexError(f"expert {i} of {self.num_experts}")
        n = self.out_features // self.num_experts
        begin = i % self.num_experts * n
        return QuantizedExpert(self.qweight.rows(begin, begin + n), self.transposed)

    def __getitem__(self, index):
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool):
            return self.expert(operator.index(index))
        if isinstance(index, Tensor) and index.dim() == 1 and not index.dtype.is_floating_point:
            if index.is_cuda and index.dtype != torch.bool:
                return self._gathered(index)
            picked, where = torch.unique(
                index.nonzero()[:, 0] if index.dtype == torch.bool else index, return_inverse=True
            )
            return torch.stack([self.expert(i).dequantize() for i in picked.tolist()])[where]
        return self.dequantize()[index]

    def _gathered(self, index: Tensor) -> Tensor:
        """The dequantized weights of experts on the device: nobody waits to hear which."""
        k, dtype = self.in_features, self.qweight.dtype
        index = torch.where(index < 0, index + self.num_experts, index)
        picked = self.qweight.operands().rows(lambda t: t.unflatten(0, (self.num_experts, -1))[index].flatten(0, 1))
        values = self.qweight.leaving(picked.decoded(k, dtype if dtype == torch.float64 else torch.float32))
        values = values.to(dtype).unflatten(0, (len(index), -1))
        return values.transpose(1, 2) if self.transposed else values

    def __len__(self) -> int:
        return self.num_experts

    def __iter__(self):
        return (self.expert(i) for i in range(self.num_experts))

    @property
    def shape(self) -> torch.Size:
        n = self.out_features // self.num_experts
        return torch.Size((self.num_experts, *((self.in_features, n) if self.transposed else (n, self.in_features))))

    @property
    def ndim(self) -> int:
        return 3

    def dim(self) -> int:
        return 3

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    def transpose(self, a: int, b: int) -> _Transposed | Tensor:
        if {a % 3, b % 3} == {1, 2}:
            return _Transposed(self)
        return self.dequantize().transpose(a, b)

    swapaxes = transpose

    @property
    def mT(self) -> _Transposed:
        return _Transposed(self)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ w``, batched over the experts: x (E, T, K) to (E, T, N)."""
        if OPERATOR.uses_kernel(x) and x.dim() == 3 and x.shape[0] == self.num_experts:
            ends = torch.arange(1, self.num_experts + 1, dtype=torch.int32, device=x.device) * x.shape[1]
            return grouped_linear(x.flatten(0, 1), self.qweight, ends).unflatten(0, x.shape[:2])
        return torch.stack([quantized_linear(part, self.expert(i).qweight) for i, part in enumerate(x.unbind(0))])

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, shape={tuple(self.shape)}, {self.weight_format}"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        weights = args[1] if len(args) > 1 else None
        if isinstance(weights, cls) and weights.transposed and isinstance(args[0], Tensor):
            if func in _GROUPED:
                return _grouped(weights, *args, **kwargs)
            if func in _BATCHED and not kwargs:
                return weights(args[0])
        return _plainly(func, args, kwargs)


class _View:
    """What is seen of quantized weights: other methods than its own are those of the dequantized tensor."""

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dequantize(), name)


class QuantizedExpert(_View):
    """The weight (N, K) of one expert, or (K, N) if transposed; see `QuantizedExperts`."""

    def __init__(self, qweight: QuantizedWeight, transposed: bool) -> None:
        self.qweight, self.transposed = qweight, transposed

    def dequantize(self) -> Tensor:
        values = self.qweight.dequantize()
        return values.T if self.transposed else values

    def t(self) -> QuantizedExpert:
        return QuantizedExpert(self.qweight, not self.transposed)

    T = mT = property(t)

    def transpose(self, a: int, b: int) -> QuantizedExpert:
        return self if a % 2 == b % 2 else self.t()

    @property
    def shape(self) -> torch.Size:
        n, k = self.qweight.shape
        return torch.Size((k, n) if self.transposed else (n, k))

    @property
    def dtype(self) -> torch.dtype:
        return self.qweight.dtype

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, cast(Tensor, self))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _linear and len(args) > 1 and isinstance(args[1], cls) and not args[1].transposed:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if isinstance(args[0], Tensor):
                return quantized_linear(args[0], args[1].qweight, bias)
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            x, weight = (args[1], args[0]) if func is Tensor.__rmatmul__ else args
            if isinstance(weight, cls) and weight.transposed and isinstance(x, Tensor):
                return quantized_linear(x, weight.qweight)
        return _plainly(func, args, kwargs)


class _Transposed(_View):
    """`QuantizedExperts` seen with its last two dimensions exchanged."""

    def __init__(self, weights: QuantizedExperts) -> None:
        self.weights = weights

    def dequantize(self) -> Tensor:
        return self.weights.dequantize().transpose(1, 2)

    def __getitem__(self, index):
        picked = self.weights[index]
        return picked.transpose(-2, -1) if isinstance(index, (int, Tensor)) else self.dequantize()[index]

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def shape(self) -> torch.Size:
        e, a, b = self.weights.shape
        return torch.Size((e, b, a))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        weights = args[1].weights if len(args) > 1 and isinstance(args[1], cls) else None
        if func in _GROUPED and weights is not None and not weights.transposed and isinstance(args[0], Tensor):
            return _grouped(weights, *args, **kwargs)
        return _plainly(func, args, kwargs)


def _grouped(weights: QuantizedExperts, x: Tensor, _, *, offs: Tensor, bias: Tensor | None = None, out_dtype=None):
    """As `torch.nn.functional.grouped_mm` of tokens (T, K) in the order of their experts."""
    if offs.shape != (weights.num_experts,):
        raise ValueError(f"grouped_mm: offs has shape {tuple(offs.shape)}, expected ({weights.num_experts},)")
    out = grouped_linear(x, weights.qweight, offs)
    if bias is not None:
        out = out + bias
    return out if out_dtype is None else out.to(out_dtype)


def _plainly(func, args, kwargs):
    """With the weights dequantized."""

    def plain(value):
        if isinstance(value, (QuantizedExperts, QuantizedExpert, _Transposed)):
            return value.dequantize()
        return type(value)(plain(v) for v in value) if isinstance(value, (list, tuple)) else value

    return func(*plain(tuple(args)), **{key: plain(value) for key, value in kwargs.items()})
