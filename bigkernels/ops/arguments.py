"""Argument checks shared by the operators. They raise before anything is computed or written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def type_name(value: object) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__


def check_tensor(op: str, name: str, value: object, *, optional: bool = False) -> None:
    """`value` is a floating tensor (or None where optional)."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"bigkernels.{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        raise TypeError(f"bigkernels.{op}: {name} is {type_name(value)}; accepted are {accepted}")


def check_same_device(op: str, first: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.device != reference.device:
            raise ValueError(
                f"bigkernels.{op}: {name} is on {value.device} and {first} on {reference.device}; "
                "all tensors must be on one device"
            )


def check_shape(op: str, name: str, value: Tensor | None, expected: Sequence[int], why: str) -> None:
    if value is not None and tuple(value.shape) != tuple(expected):
        raise ValueError(f"bigkernels.{op}: {name} has shape {tuple(value.shape)}, expected {tuple(expected)} ({why})")


def check_same_dtype(op: str, first: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.dtype != reference.dtype:
            raise TypeError(
                f"bigkernels.{op}: {name} is {type_name(value)} and {first} is {type_name(reference)}; "
                "they must have one dtype"
            )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast that is on for a device; None where none is, or where the device has none."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inside autocast, mixed floating inputs are widened to one dtype, as autocast does for its promoted operators."""
    dtype = tensors[0].dtype
    if all(t.dtype == dtype for t in tensors) or autocast_dtype(tensors[0].device) is None:
        return tensors
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def own(t: Tensor | None) -> Tensor | None:
    """A copy of what a backward pass reads again. Loaders refill their buffers of labels, weights and lengths before
    backward ran, and where they do it through numpy or `.data`, no version counter tells.
    """
    return None if t is None else t.clone()


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one run of memory, in some order of the dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
