"""Quantization-aware training: layers that train as if they were quantized already."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.quantized_linear import round_tokens
from ._format import Format, named
from ._layers import become, is_transposed
from ._report import QuantizeReport
from ._weight import quantize_weight
from .fp8 import FP8


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(w, config):
        return quantize_weight(w, config).dequantize(w.dtype)

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
    def vmap(info, dims, w, config):
        if dims[0] is None:
            return _StraightThrough.apply(w, config), None
        return torch.stack([_StraightThrough.apply(each, config) for each in w.unbind(dims[0])]), 0


def fake_quantize(w: Tensor, config: str | Format) -> Tensor:
    """The values (N, K) that `quantize_weight` would store for a weight, with the gradient of the identity (Bengio et
    al. 2013, https://arxiv.org/abs/1308.3432).

    Raises:
        ValueError, TypeError: as `quantize_weight`; calibrated formats are refused.
    """
    return _StraightThrough.apply(w, named(config))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: Format) -> Tensor:
    if config.dynamic:
        whole, scale = round_tokens(x.detach().float(), isinstance(config, FP8))
        x = x + ((whole * scale).to(x.dtype) - x).detach()
    return F.linear(x, fake_quantize(weight, config), bias)


class FakeQuantizedLinear(nn.Linear):
    """A `torch.nn.Linear`, with its parameters and state dict, that computes with the weight which its format would
    store (and, for "int8-dynamic", with the tokens that it would multiply), and trains the weight straight through.

    `bigkernels.quantize` takes it for a linear layer. For int4, round-to-nearest costs least in each step:
    ``Int4(64, "rtn")``.
    """

    config: Format

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: str | Format) -> FakeQuantizedLinear:
        """The layer of a `torch.nn.Linear`, whose parameters and hooks it takes over.

        Raises:
            ValueError: the format is calibrated.
        """
        return become(linear, cls, config=_fit(config))

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias, self.config)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


class FakeQuantizedConv1D(nn.Module):
    """As `FakeQuantizedLinear`, for the `Conv1D` of transformers, whose weight is (K, N)."""

    config: Format
    kind: type  # of the layer that it stands for

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight.T, self.bias, self.config)

    def extra_repr(self) -> str:
        k, n = self.weight.shape
        return f"in_features={k}, out_features={n}, {self.config}"


class FakeQuantizedEmbedding(nn.Embedding):
    """A `torch.nn.Embedding`, with its parameters and state dict, of the rows that its format would store."""

    config: Format

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, fake_quantize(self.weight, self.config), self.padding_idx,
                           scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse)  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


_PLAIN = {FakeQuantizedLinear: nn.Linear, FakeQuantizedEmbedding: nn.Embedding}


def plain_kind(module: nn.Module) -> type:
    """The class of a module or, where it trains as if it were quantized, of the one that it was made of."""
    kind = type(module)
    return module.kind if kind is FakeQuantizedConv1D else _PLAIN.get(kind, kind)


def prepare_qat(
    model: nn.Module,
    config: str | Format | Mapping[str, str | Format | None],
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
    from ._select import put, select

    selection = select(model, config, skip, filter, embeddings, QuantizeReport())
    chosen = sorted(selection.alone + sum(selection.shared, []), key=lambda c: selection.order[c.path])
    made = [_fake(c.module, c.config) for c in chosen]
    for c, module in zip(chosen, made, strict=True):
        put(model, c.paths, module)
    return [c.path for c in chosen]


def _fake(module: nn.Module, config: Format) -> nn.Module:
    kind, config = plain_kind(module), _fit(config)
    if is_transposed(kind):
        return become(module, FakeQuantizedConv1D, config=config, kind=kind)
    return become(module, FakeQuantizedEmbedding if kind is nn.Embedding else FakeQuantizedLinear, config=config)


def _fit(config: str | Format) -> Format:
    config = named(config)
    if config.calibrated:
        raise ValueError(f"bigkernels.quantization: {config} is calibrated, which no training step can repeat")
    return config
