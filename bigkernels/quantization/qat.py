"""Quantization-aware training: layers that train as if they were quantized already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._deprecated import renamed_arguments, renamed_members
from ..ops.quantized_linear import round_tokens
from ._report import QuantizeReport
from ._weight import quantize_weight
from .format import Format, resolve_format
from .fp8 import FP8
from .layers import become, is_transposed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(w, format):
        return quantize_weight(w, format).dequantize(w.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.clone()  # a view would have to be one of the output too

    @staticmethod
    def vmap(info, dims, w, format):
        if dims[0] is None:
            return _StraightThrough.apply(w, format), None
        return torch.stack([_StraightThrough.apply(each, format) for each in w.unbind(dims[0])]), 0


@renamed_arguments("bigkernels.quantization.fake_quantize", w="weight", config="format")
def fake_quantize(weight: Tensor, format: str | Format) -> Tensor:
    """The values (N, K) that `quantize_weight` would store for a weight, with the gradient of the identity (Bengio et
    al. 2013, https://arxiv.org/abs/1308.3432).

    Raises:
        ValueError, TypeError: as `quantize_weight`; calibrated formats are refused.
    """
    return _StraightThrough.apply(weight, resolve_format(format))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, format: Format) -> Tensor:
    if format.dynamic:
        whole, scale = round_tokens(x.detach().float(), isinstance(format, FP8))
        x = x + ((whole * scale).to(x.dtype) - x).detach()
    return F.linear(x, fake_quantize(weight, format), bias)


@renamed_members("bigkernels.quantization.FakeQuantizedLinear", config="weight_format")
class FakeQuantizedLinear(nn.Linear):
    """A `torch.nn.Linear`, with its parameters and state dict, that computes with the weight which its format would
    store (and, for "int8-dynamic", with the tokens that it would multiply), and trains the weight straight through.

    `bigkernels.quantize` takes it for a linear layer. For int4, round-to-nearest costs least in each step:
    ``Int4(64, "rtn")``.
    """

    weight_format: Format

    @classmethod
    @renamed_arguments("bigkernels.quantization.FakeQuantizedLinear.from_linear", config="format")
    def from_linear(cls, linear: nn.Linear, format: str | Format) -> FakeQuantizedLinear:
        """The layer of a `torch.nn.Linear`, whose parameters and hooks it takes over.

        Raises:
            ValueError: the format is calibrated.
        """
        return cast(FakeQuantizedLinear, become(linear, cls, weight_format=_fit(format)))

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias, self.weight_format)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.weight_format}"


@renamed_members("bigkernels.quantization.FakeQuantizedConv1D", config="weight_format")
class FakeQuantizedConv1D(nn.Module):
    """As `FakeQuantizedLinear`, for the `Conv1D` of transformers, whose weight is (K, N)."""

    weight_format: Format
    weight: nn.Parameter
    bias: nn.Parameter
    kind: type  # of the layer that it stands for

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight.T, self.bias, self.weight_format)

    def extra_repr(self) -> str:
        k, n = self.weight.shape
        return f"in_features={k}, out_features={n}, {self.weight_format}"


@renamed_members("bigkernels.quantization.FakeQuantizedEmbedding", config="weight_format")
class FakeQuantizedEmbedding(nn.Embedding):
    """A `torch.nn.Embedding`, with its parameters and state dict, of the rows that its format would store."""

    weight_format: Format

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(
            ids,
            fake_quantize(self.weight, self.weight_format),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.weight_format}"


_PLAIN = {FakeQuantizedLinear: nn.Linear, FakeQuantizedEmbedding: nn.Embedding}


def plain_kind(module: nn.Module) -> type:
    """The class of a module or, where it trains as if it were quantized, of the one that it was made of."""
    kind = type(module)
    return module.kind if isinstance(module, FakeQuantizedConv1D) else _PLAIN.get(kind, kind)


@renamed_arguments("bigkernels.quantization.prepare_qat", config="format")
def prepare_qat(
    model: nn.Module,
    format: str | Format | Mapping[str, str | Format | None],
    *,
    skip: str | tuple[str, ...] = ("lm_head",),
    filter: Callable[[str, nn.Module], bool] | None = None,
    embeddings: bool = False,
) -> list[str]:
    """Replace the layers of a model that `bigkernels.quantize` would quantize with these arguments by
    `FakeQuantizedLinear` and its like, in place; afterwards train it, then call `bigkernels.quantize` with the same
    arguments. Weights of experts are left to it.

    Returns:
        The names of the layers.

    Raises:
        ValueError: a format is calibrated.
    """
    from .select import put, select

    selection = select(model, format, skip, filter, embeddings, QuantizeReport())
    chosen = sorted(selection.alone + sum(selection.shared, []), key=lambda c: selection.order[c.path])
    layers = [_fake(c.module, c.format) for c in chosen]
    for c, module in zip(chosen, layers, strict=True):
        put(model, c.paths, module)
    return [c.path for c in chosen]


def _fake(module: nn.Module, format: Format) -> nn.Module:
    kind, format = plain_kind(module), _fit(format)
    if is_transposed(kind):
        return become(module, FakeQuantizedConv1D, weight_format=format, kind=kind)
    return become(module, FakeQuantizedEmbedding if kind is nn.Embedding else FakeQuantizedLinear, weight_format=format)


def _fit(format: str | Format) -> Format:
    format = resolve_format(format)
    if format.calibrated:
        raise ValueError(f"bigkernels.quantization: {format} is calibrated, which no training step can repeat")
    return format
