"""A weight on its way from a folder into a model: codes that transformers' loader handles as a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..quantization import NF4, Format, QuantizedWeight


class Packed:
    """Rows (N, K) in a format, or (E, N, K) of E experts.

    Args:
        config: the format.
        shape: of the weight.
        tensors: as the format stores them of all rows, one below the other.
    """

    def __init__(self, config: Format, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> None:
        self.format, self.shape, self.tensors = config, torch.Size(shape), tensors

    @classmethod
    def of(cls, qweight: QuantizedWeight) -> Packed:
        return cls(qweight.format, qweight.shape, qweight.tensors)

    def __getitem__(self, index: Any) -> Packed:
        if index is not Ellipsis:
            raise TypeError(f"a weight in codes cannot be indexed by {index!r}")
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Packed:
        """On a device; codes have no other dtype."""
        if device is None:
            return self
        return Packed(self.format, self.shape, {name: t.to(device) for name, t in self.tensors.items()})

    def qweight(self, dtype: torch.dtype) -> QuantizedWeight:
        """All rows as a weight of a dtype."""
        n = self.shape[:-1].numel()
        expected = self.format.layout((n, self.shape[-1]))
        for name, (shape, kind) in expected.items():
            held = self.tensors[name]
            if held.shape != shape or held.dtype != kind:
                raise ValueError(
                    f"bigkernels: {name} is {held.dtype} of shape {tuple(held.shape)}, expected {kind} of shape {shape}"
                )
        return QuantizedWeight(self.format, (n, self.shape[-1]), dtype, self.tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.qweight(dtype).dequantize().view(self.shape)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.stack, torch.cat):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            joined = _joined(list(args[0]), func is torch.stack, dim)
            if joined is not None:
                return joined
            return func([t.dequantize() if isinstance(t, cls) else t for t in args[0]], dim)
        raise TypeError(
            f"bigkernels: the model's weights are made by {getattr(func, '__name__', func)}, which weights "
            "in codes do not support"
        )


def _joined(parts: Sequence[Any], stack: bool, dim: int) -> Packed | None:
    """Weights as one: experts stacked, or the rows of several; None where they are not of one kind."""
    if not all(isinstance(part, Packed) for part in parts):
        return None
    parts = [_by_rows(part) for part in parts]
    first = parts[0]
    if any(part.format != first.format or part.shape[-1] != first.shape[-1] for part in parts):
        return None
    shared = {"order": first.tensors["order"]} if "order" in first.tensors else {}  # of all rows
    if any(not torch.equal(part.tensors[name], t) for part in parts for name, t in shared.items()):
        return None
    each = [name for name in first.tensors if name not in shared]
    if stack:
        if dim != 0 or any(part.shape != first.shape for part in parts) or len(first.shape) != 2:
            return None
        joined = {name: torch.cat([part.tensors[name] for part in parts]) for name in each}
        return Packed(first.format, (len(parts), *first.shape), joined | shared)
    rows = len(first.shape) - 2
    if dim % len(first.shape) != rows or any(part.shape[:-2] != first.shape[:-2] for part in parts):
        return None
    count = first.shape[:-2].numel()
    joined = {
        name: torch.cat([part.tensors[name].unflatten(0, (count, -1)) for part in parts], 1).flatten(0, 1)
        for name in each
    }
    n = sum(part.shape[-2] for part in parts)
    return Packed(first.format, (*first.shape[:-2], n, first.shape[-1]), joined | shared)


def _by_rows(part: Packed) -> Packed:
    """With scales that are stored a row: those of NF4 that are quantized lie across rows."""
    if not isinstance(part.format, NF4) or not part.format.double_quant:
        return part
    scale = part.format.operands(part.tensors).scale
    assert scale is not None
    return Packed(
        replace(part.format, double_quant=False), part.shape, {"codes": part.tensors["codes"], "scale": scale}
    )
