"""What the losses over a vocabulary check of their arguments, and their logits in plain PyTorch."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_same_device, check_same_dtype, check_shape, check_tensor, type_name
from .codes import CodedWeight
from .linear import wide_product
from .registry import compute_dtype, is_forced, is_readable, sees_plain_alone


def as_reference(hidden: Tensor, weight: object, bias: Tensor | None) -> bool:
    """Whether all logits are made at once, in plain PyTorch."""
    plain = weight if isinstance(weight, Tensor) else None
    return is_forced("reference") or sees_plain_alone(hidden, plain, bias)


def check_head(
    op: str, hidden: Tensor, weight: object, bias: object, lowered: torch.dtype | None, of: str = ""
) -> None:
    """Hidden states (..., H), a weight (V, H) or a `QuantizedWeight`, a bias (V,); `of` is before their names."""
    check_tensor(op, f"{of}hidden", hidden)
    plain = weight
    if isinstance(weight, CodedWeight):
        plain = weight.operands().codes
    else:
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"bigkernels.{op}: {of}weight is {type_name(weight)}; accepted are floating tensors and QuantizedWeight"
            )
        check_tensor(op, f"{of}weight", weight)
    check_tensor(op, f"{of}bias", bias, optional=True)
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(f"bigkernels.{op}: {of}weight has shape {tuple(weight.shape)}, expected (V, H), none 0")
    vocabulary, size = weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != size:
        raise ValueError(f"bigkernels.{op}: {of}hidden has shape {tuple(hidden.shape)}, expected (..., {size})")
    check_shape(op, f"{of}bias", bias, (vocabulary,), "one number a class")
    check_same_device(op, f"{of}hidden", hidden, **{f"{of}weight": plain, f"{of}bias": bias})
    if lowered is None and plain is weight:
        check_same_dtype(op, f"{of}hidden", hidden, **{f"{of}weight": weight, f"{of}bias": bias})


def check_target(op: str, target: object, hidden: Tensor) -> None:
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"bigkernels.{op}: target is {type_name(target)}; accepted are int64 and int32 class indices")
    check_same_device(op, "hidden", hidden, target=target)
    check_shape(op, "target", target, hidden.shape[:-1], "one class a token")


def targets_inside(op: str, target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Data-dependent, so on CPU only: on a GPU it would wait for the device."""
    if not is_readable(target):
        return
    outside = target[(target != ignore_index) & ((target < 0) | (target >= vocabulary))]
    if outside.numel():
        raise ValueError(
            f"bigkernels.{op}: target holds {outside[0].item()}, outside the vocabulary "
            f"[0, {vocabulary}) and not ignore_index ({ignore_index})"
        )


def check_positive(op: str, **options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"bigkernels.{op}: {name} is {value}, expected a positive number")


def logits_of(
    hidden: Tensor,
    weight: object,
    bias: Tensor | None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """What `Head` makes, of all tokens at once and in plain PyTorch."""
    from .quantized_linear import quantized_linear

    if isinstance(weight, Tensor):
        z = wide_product(hidden, weight, bias)
    else:
        z = quantized_linear(hidden.to(compute_dtype(hidden.dtype)), weight, bias)
    z = z * scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
