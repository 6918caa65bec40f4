"""What a format is, and the formats by name."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.codes import Operands

_FORMATS: dict[str, type[Format]] = {}


@dataclass(frozen=True)
class Format(abc.ABC):
    """How a weight (N, K) is stored.

    Attributes:
        name: by which `quantize` knows the format with its default options.
        dynamic: whether tokens are rounded to 8 bits too.
    """

    name: ClassVar[str]
    dynamic: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        _FORMATS[cls.name] = cls

    @property
    def calibrated(self) -> bool:
        """Whether it needs to know the inputs of the layer."""
        return False

    @property
    def rounds_gradients(self) -> bool:
        """Whether the gradients of tokens are computed in 8 bits too."""
        return False

    def blind(self) -> Format:
        """The format itself or, where it is calibrated, the one nearest to it that needs no data."""
        return self

    def exact(self) -> Format:
        """The format itself or, where it rounds tokens too, the one that stores the same and does not."""
        return self

    @property
    def derived(self) -> tuple[str, ...]:
        """The stored tensors that `operands` computes from; others it hands on as they are."""
        return ()

    def prepare(self, weight: Tensor, hessian: Tensor) -> Any:
        """What `encode` takes for data, from a whole weight and the second moments (K, K) of its inputs; of formats
        that are calibrated.
        """
        raise NotImplementedError(f"{self} needs no data")

    @abc.abstractmethod
    def encode(self, rows: Tensor, data: Any = None) -> dict[str, Tensor]:
        """Finite float32 rows (n, K) as named tensors, each with n rows."""

    def finish(self, tensors: dict[str, Tensor], data: Any = None) -> dict[str, Tensor]:
        """What is stored, from the tensors of all rows."""
        return tensors

    @abc.abstractmethod
    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each stored tensor of a weight of this shape."""

    @abc.abstractmethod
    def operands(self, tensors: dict[str, Tensor]) -> Operands:
        """What operators read of the stored tensors, by the kind of codes that they are (`bigkernels.ops.codes`)."""


def resolve_format(format: str | Format) -> Format:
    """The format of a name, with its default options; formats as they are.

    Raises:
        ValueError: no format has this name.
        TypeError: neither a name nor a format.
    """
    if isinstance(format, Format):
        return format
    if not isinstance(format, str):
        raise TypeError(f"bigkernels.quantization: format is {type(format).__name__}; accepted are names and formats")
    if format not in _FORMATS:
        raise ValueError(f"bigkernels.quantization: format is {format!r}; accepted are {', '.join(sorted(_FORMATS))}")
    return _FORMATS[format]()


def ratio(values: Tensor, scale: Tensor) -> Tensor:
    """``values / scale``, zero where the scale is."""
    return torch.where(scale > 0, values / torch.where(scale > 0, scale, 1.0), 0.0)


def in_groups(rows: Tensor, size: int) -> Tensor:
    """(n, K) as (n, G, size); the last group is filled up with the row's last element, which changes no range."""
    short = -rows.shape[1] % size
    if short:
        rows = torch.cat((rows, rows[:, -1:].expand(-1, short)), 1)
    return rows.unflatten(1, (-1, size)) if rows.shape[1] else rows.new_zeros(rows.shape[0], 0, size)


def pack4(codes: Tensor, k: int) -> Tensor:
    """Codes (n, >= k) below 16, two in a byte, the first in its low half: (n, ceil(k / 2))."""
    codes = codes[:, :k].to(torch.uint8)
    if k % 2:
        codes = torch.cat((codes, torch.zeros_like(codes[:, :1])), 1)
    return codes[:, ::2] | codes[:, 1::2] << 4
