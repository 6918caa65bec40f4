"""One weight in a format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .._deprecated import renamed_arguments, renamed_members
from ..ops.codes import CodedWeight
from ..ops.registry import is_watched
from .format import Format, Operands, resolve_format

_WHAT = "bigkernels.functional.quantize_weight"
_AT_ONCE = 2**22  # elements: float32 copies and what the formats make of them stay small


@renamed_members("bigkernels.quantization.QuantizedWeight", config="format")
@dataclass(eq=False)
class QuantizedWeight(CodedWeight):
    """A weight (N, K) in codes.

    Attributes:
        format: its format.
        shape: (N, K).
        dtype: what it was quantized from, and what `dequantize` makes by default.
        tensors: what is stored, by name.
    """

    format: Format
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: dict[str, Tensor]
    _read: tuple[tuple, Operands] | None = field(default=None, repr=False)

    def operands(self) -> Operands:
        """What `quantized_linear` reads; made once as long as the stored tensors stay what they are."""
        if torch.compiler.is_dynamo_compiling():
            return self.format.operands(self.tensors)
        if is_watched():
            self._check_dtypes()
            return self.format.operands(self.tensors)
        held = self._read
        if held is not None and all(map(_Seen.holds, held[0], self.tensors.values())):
            return held[1]
        self._check_dtypes()
        derived = self.format.derived
        operands = self.format.operands(self.tensors)
        self._read = tuple(_Seen.of(t, name in derived) for name, t in self.tensors.items()), operands
        return operands

    def _check_dtypes(self) -> None:
        for name, (_, dtype) in self.format.layout(self.shape).items():
            held = self.tensors[name].dtype
            if held != dtype:
                raise TypeError(
                    f"bigkernels.quantization.QuantizedWeight: {name} is {held}, and {self.format} stores "
                    f"{dtype}: something cast the buffers of the model one by one"
                )

    def with_exact_tokens(self) -> QuantizedWeight:
        """The same weight; tokens that it is multiplied with are not rounded."""
        exact = self.format.exact()
        return self if exact is self.format else QuantizedWeight(exact, self.shape, self.dtype, self.tensors)

    def rows(self, begin: int, end: int) -> QuantizedWeight:
        """Rows [begin, end) as a weight of their own, in the same memory."""
        return _Rows(self.format, (end - begin, self.shape[1]), self.dtype, self.tensors, whole=self, begin=begin)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (N, K) that the codes stand for, computed in float32 and rounded once."""
        dtype = self.dtype if dtype is None else dtype
        wide = dtype if dtype == torch.float64 else torch.float32
        return self.leaving(self.operands().decoded(self.shape[1], wide)).to(dtype)

    @property
    def channel(self) -> Tensor | None:
        """(K,) powers of two by which inputs are multiplied before the codes are, or None."""
        return self.tensors.get("channel")

    @property
    def order(self) -> Tensor | None:
        """(K,) the element of an input that each element of a row of codes meets; None: the one in its place."""
        return self.tensors.get("order")

    def entering(self, x: Tensor) -> Tensor:
        """Inputs (..., K) as the codes meet them."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        return x if self.channel is None else x * self.channel.to(x.dtype)

    def leaving(self, rows: Tensor) -> Tensor:
        """What codes stand for, or gradients of what meets them, (..., K), as inputs have it: `entering` transposed."""
        if self.channel is not None:
            rows = rows * self.channel.to(rows.dtype)
        if self.order is None:
            return rows
        return torch.zeros_like(rows).index_copy(-1, self.order.long(), rows)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_read": None}

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """Of what is stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(eq=False)
class _Rows(QuantizedWeight):
    """Some rows of a weight: its tensors are those of the whole weight, what kernels read of them is its own."""

    whole: QuantizedWeight = field(kw_only=True)
    begin: int = field(kw_only=True)

    def operands(self) -> Operands:
        mine = slice(self.begin, self.begin + self.shape[0])
        return self.whole.operands().rows(lambda t: t[mine])


class _Seen(NamedTuple):
    """A stored tensor, and what tells whether operands computed from it still hold: on the CPU its bytes, which
    are few beside those of the weight, as writes through `.data` are not counted.
    """

    tensor: Tensor
    dtype: torch.dtype
    version: int = 0
    address: int = 0
    parts: tuple[Tensor, ...] = ()
    copies: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, t: Tensor, derived: bool) -> _Seen:
        if not derived:
            return cls(t, t.dtype)
        if type(t) is Tensor and t.device.type == "cpu":
            parts = _words(t)
            return cls(t, t.dtype, 0, t.data_ptr(), parts, tuple(part.clone() for part in parts))
        return cls(t, t.dtype, -1 if t.is_inference() else t._version + 1)

    def holds(self, t: Tensor) -> bool:
        if t is not self.tensor or t.dtype is not self.dtype or self.version < 0:  # inference tensors count no writes
            return False
        if self.version:
            return self.version == t._version + 1
        return not self.parts or (t.data_ptr() == self.address and all(map(torch.equal, self.parts, self.copies)))


def _words(t: Tensor) -> tuple[Tensor, ...]:
    """The bytes of a tensor, eight at a time where they come so: compared, that is faster."""
    if not t.is_contiguous() or t.storage_offset() * t.element_size() % 8:
        return (t,)
    flat = t.view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    return tuple(part for part in (flat[:whole].view(torch.int64), flat[whole:]) if part.numel())


@renamed_arguments(_WHAT, w="weight", config="format", gram="hessian")
@torch.no_grad()
def quantize_weight(weight: Tensor, format: str | Format, hessian: Tensor | None = None) -> QuantizedWeight:
    """A weight in a format. The same values give the same bits, on every device and number of threads.

    Args:
        weight: (N, K), floating, any strides; every value finite.
        format: a format, or its name: "int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "fp8-dynamic",
            "q4_1" or "q8_0".
        hessian: (K, K), the sum or mean of ``x x^T`` over inputs x of the layer; for formats that are calibrated, and
            of no use to others.

    Of a weight on the meta device, which has no values, shapes and dtypes are made and nothing else.

    Raises:
        TypeError: `weight` is not a floating tensor.
        ValueError: `weight` is no matrix or holds a value that is not finite (in float32) or beyond the format's range
            (float16 in "q4_1" and "q8_0"), there is no such format, or `hessian` is missing, of another shape, or not
            finite.
    """
    format = resolve_format(format)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{_WHAT}: weight is {given}; accepted are floating tensors")
    if weight.dim() != 2:
        raise ValueError(f"{_WHAT}: weight has shape {tuple(weight.shape)}, expected (N, K)")
    weight = weight.detach()
    data = None
    if weight.is_meta:
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in format.layout((weight.shape[0], weight.shape[1])).items()
        }
        return QuantizedWeight(format, (weight.shape[0], weight.shape[1]), weight.dtype, tensors)
    if format.calibrated:
        data = format.prepare(weight, _checked_hessian(format, hessian, weight.shape[1]).to(weight.device))
    at_once = max(1, _AT_ONCE // max(weight.shape[1], 1))
    parts = []
    for rows in weight.split(at_once) if weight.shape[0] else [weight]:
        rows = rows.float().contiguous()
        if not rows.isfinite().all():
            raise ValueError(f"{_WHAT}: weight holds a value that is not finite")
        parts.append(format.encode(rows, data))
    tensors = format.finish({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, data)
    return QuantizedWeight(format, (weight.shape[0], weight.shape[1]), weight.dtype, tensors)


def _checked_hessian(format: Format, hessian: Tensor | None, k: int) -> Tensor:
    if hessian is None:
        raise ValueError(f"{_WHAT}: {format} is calibrated: give hessian, or `calibration` to `quantize`")
    if hessian.shape != (k, k):
        raise ValueError(f"{_WHAT}: hessian has shape {tuple(hessian.shape)}, expected ({k}, {k})")
    if not hessian.isfinite().all():
        raise ValueError(f"{_WHAT}: hessian holds a value that is not finite")
    return hessian
