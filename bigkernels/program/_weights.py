"""Tensors of a model as records read them: by address, where the model keeps them."""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn.quantized import Quantized
from ..nn.quantized_linear import QuantizedLinear
from ..ops.codes import FP8, KINDS, Operands
from ..quantization import QuantizedWeight
from ..quantization.layers import exact_weight, is_transposed
from . import _records as records
from ._ir import Stored, StoredLinear
from ._trace import Refused

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Reads:
    """The tensors that records have addresses of.

    Attributes:
        held: those of the model, whose addresses are watched.
        made: those that were computed from the model's, kept alive.
        sources: those of the model's from which some of `made` were computed.
        codes: those of the model's that hold codes and what belongs to them.
    """

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.made: list[object] = []
        self.sources: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.formats: dict[str, int] = {}
        self._seen: set[int] = set()

    def address(self, t: Tensor) -> int:
        if id(t) not in self._seen:
            self._seen.add(id(t))
            self.held.append(t)
        return t.data_ptr()

    def vector(self, t: Tensor | Stored | None, size: int, what: str) -> records.Vector:
        """(size,) numbers; absent where `t` is None."""
        if isinstance(t, Stored):
            t = _stored(t)
        if t is None:
            return records.Vector(None, 0, 0)
        plain_tensor(t, what)
        if t.numel() != size:
            raise Refused(f"{what} has {t.numel()} elements, not {size}")
        if t.dtype not in TYPES:
            raise Refused(f"{what} is {_name(t.dtype)}")
        if size > 1 and not t.is_contiguous():
            raise Refused(f"{what} is not contiguous")
        return records.Vector(self.address(t), TYPES[t.dtype], 0)

    def weight(self, module: nn.Module | StoredLinear) -> Operand:
        """The weight of a linear layer, plain or quantized."""
        if isinstance(module, QuantizedLinear):
            weight, rounds = self.quantized(module.qweight)
            operand = Operand(weight, module.bias, rounds)
        elif isinstance(module, Quantized):
            raise Refused(f"{type(module).__name__} in the place of a linear layer")
        else:
            operand = self._dense(module)
        name = module.weight_format.name if isinstance(module, Quantized) else _name(module.weight.dtype)
        self.formats[name] = self.formats.get(name, 0) + 1
        return operand

    def _dense(self, module: nn.Module | StoredLinear) -> Operand:
        weight = module.weight
        if not isinstance(weight, Tensor) or not exact_weight(weight):
            raise Refused(f"the weight of a {type(module).__name__} is a {type(weight).__name__}")
        transposed = module.transposed if isinstance(module, StoredLinear) else is_transposed(type(module))
        return Operand(self.matrix(weight, transposed), module.bias, False)

    def matrix(self, weight: Tensor, transposed: bool = False) -> records.Weight:
        """Numbers (N, K), or (K, N) if transposed."""
        plain_tensor(weight, "a weight")
        if weight.dtype not in TYPES:
            raise Refused(f"a weight is {_name(weight.dtype)}")
        rows, columns = weight.shape
        if columns > 1 and weight.stride(1) != 1:
            if weight.stride(0) != 1 and rows > 1:
                raise Refused(f"a weight has strides {tuple(weight.stride())}")
            transposed, row = not transposed, weight.stride(1)
            n, k = (rows, columns) if transposed else (columns, rows)
        else:
            row = weight.stride(0) if rows > 1 else columns
            n, k = (columns, rows) if transposed else (rows, columns)
        return records.Weight(
            n=n,
            k=k,
            kind=TYPES[weight.dtype],
            codes=self.address(weight),
            code_row=row * weight.itemsize,
            transposed=transposed,
        )

    def quantized(self, qweight: QuantizedWeight) -> tuple[records.Weight, bool]:
        """Its record, and whether its format rounds tokens by itself."""
        operands = qweight.operands()
        if qweight.format.dynamic and operands.kind == FP8.number:
            raise Refused("its tokens are rounded to floats of 8 bits")
        if qweight.format.derived:
            self.sources += (qweight.tensors[name] for name in qweight.format.derived)
            if not all(t.is_contiguous() for t in self.sources):
                raise Refused("codes are not contiguous")
        stored = {id(t) for t in qweight.tensors.values()}
        for t in operands[:5]:
            if t is not None:
                plain_tensor(t, "codes")
                if id(t) not in stored:
                    self.made.append(t)
        for t in qweight.tensors.values():
            if id(t) not in self._seen:
                self.codes.append(t)
            self.address(t)
        return coded(operands, qweight.shape[1]), qweight.format.dynamic


class Operand(NamedTuple):
    """A linear layer. `rounds`: its format rounds tokens by itself."""

    weight: records.Weight
    bias: Tensor | None
    rounds: bool


def coded(operands: Operands, k: int) -> records.Weight:
    """What `Format.operands` gives, as a record."""
    codes, scale, zero, row_scale, book, group, kind = operands
    if not KINDS[kind].has_kernels:
        raise Refused(f"its codes are {KINDS[kind].name}, which no kernel reads")
    if codes.stride(-1) != 1 and codes.shape[1] > 1:
        raise Refused("codes are not contiguous")
    for t in (scale, zero, row_scale, book):
        if t is not None and not t.is_contiguous():
            raise Refused("scales are not contiguous")
    address = [None if t is None else t.data_ptr() for t in (codes, scale, zero, row_scale, book)]
    row = codes.stride(0) if codes.shape[0] > 1 else codes.shape[1]
    return records.Weight(codes.shape[0], k, kind, address[0], row, *address[1:], group, -(-k // group) if group else 0)


def rows_of(weight: records.Weight, begin: int, end: int) -> records.Weight:
    """Rows [begin, end) of a weight, in the same memory."""
    part = records.Weight.from_buffer_copy(weight)
    part.n = end - begin
    if weight.kind in TYPES.values():
        item = 4 if weight.kind == 0 else 2
        part.codes = weight.codes + begin * (item if weight.transposed else weight.code_row)
        return part
    part.codes = weight.codes + begin * weight.code_row
    if weight.scale:
        part.scale = weight.scale + begin * ((weight.groups or 1) * KINDS[weight.kind].scale_bytes)
    if weight.zero:
        part.zero = weight.zero + begin * weight.groups * 2
    if weight.row_scale:
        part.row_scale = weight.row_scale + begin * 4
    return part


def plain_tensor(t: Tensor, what: str) -> None:
    if not isinstance(t, Tensor) or (type(t) not in (Tensor, nn.Parameter)) or t.layout is not torch.strided:
        raise Refused(f"{what} is a {type(t).__name__}")
    if t.device.type != "cpu":
        raise Refused(f"{what} is on {t.device.type}")


def _stored(place: Stored) -> Tensor | None:
    module, name = place.module, place.name
    if name in module._parameters:
        return module._parameters[name]
    if name in module._buffers:
        return module._buffers[name]
    value = getattr(module, name)
    if value is not None and not isinstance(module.__dict__.get(name), Tensor):
        raise Refused(f"{type(module).__name__}.{name} is computed")
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
