"""Quantization-aware training: layers that train as if they were quantized already."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.quantized_linear import round_tokens
from ._format import Format, named
from ._weight import quantize_weight


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, config):
        return quantize_weight(w, config).dequantize(w.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def fake_quantize(w: Tensor, config: str | Format) -> Tensor:
    """The values (N, K) that `quantize_weight` would store for a weight, with the gradient of the identity (Bengio et
    al. 2013, https://arxiv.org/abs/1308.3432).

    Raises:
        ValueError, TypeError: as `quantize_weight`; calibrated formats are refused.
    """
    return _StraightThrough.apply(w, named(config))


class FakeQuantizedLinear(nn.Linear):
    """A `torch.nn.Linear`, with its parameters and state dict, that computes with the weight which its format would
    store (and, for "int8-dynamic", with the tokens that it would multiply), and trains the weight straight through.

    `bigkernels.quantize` takes it for a linear layer. For int4, round-to-nearest costs least in each step:
    ``Int4(64, "rtn")``.
    """

    config: Format

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: str | Format) -> FakeQuantizedLinear:
        """The layer of a `torch.nn.Linear`, whose parameters it takes over.

        Raises:
            ValueError: the format is calibrated.
        """
        config = named(config)
        if config.calibrated:
            raise ValueError(f"bigkernels.quantization: {config} is calibrated, which no training step can repeat")
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
        made.weight, made.bias, made.config = linear.weight, linear.bias, config
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        weight = fake_quantize(self.weight, self.config)
        if self.config.dynamic:
            whole, scale = round_tokens(x.detach().float())
            x = x + ((whole * scale).to(x.dtype) - x).detach()
        return nn.functional.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


def prepare_qat(model: nn.Module, config: str | Format, *, skip: tuple[str, ...] = ("lm_head",)) -> list[str]:
    """Replace the linear layers of a model by `FakeQuantizedLinear`, in place; afterwards train it, then call
    `bigkernels.quantize` with the same format.

    Args:
        model: any module; layers of class `torch.nn.Linear` are replaced, subclasses are not.
        config: a format or its name.
        skip: names, or last parts of names, of layers to leave alone.

    Returns:
        The names of the layers.
    """
    config = named(config)
    names = [name for name, module in model.named_modules() if name and type(module) is nn.Linear
             and not any(name == part or name.endswith("." + part) for part in skip)]  # fmt: skip
    made = {name: FakeQuantizedLinear.from_linear(model.get_submodule(name), config) for name in names}
    for name, module in made.items():
        model.set_submodule(name, module)
    return names
