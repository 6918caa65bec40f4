"""What the rules for attention share: one call in the terms of `scaled_dot_product_attention`, by the kernels."""

# mypy: ignore-errors

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._replaced import Watched
from ..._torch_private import flash_sdp_enabled
from ...functional import attention, varlen_attention
from ...ops import routes
from ...ops.attention import OPERATOR
from ...ops.registry import KERNEL_DTYPES
from ...ops.varlen_attention import OPERATOR as PACKED
from .._verify import plain
from .attention_mask import Structure, StructuredMask, dense

log = logging.getLogger("bigkernels")
_logged: set[tuple[str, str]] = set()
_WATCHED = Watched((F, ("scaled_dot_product_attention", "softmax", "dropout")), (torch, ("softmax", "matmul")))


def refusal(q: Any, k: Any, v: Any, mask: Any = None, dropout_p: Any = 0.0, *others: Any) -> str | None:
    """Why the kernels do not give what `scaled_dot_product_attention` would, or not faster; None where they do.

    `mask` and each of `others`, boolean or added to the scores, broadcast to the scores' (B, H, Sq, Sk).
    """
    masks = [m for m in (mask, *others) if m is not None and type(m) is not StructuredMask]
    if not plain(q, k, v, *masks):
        return "the tensors are of a kind of their own"
    if not q.dim() == k.dim() == v.dim() == 4 or q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return "the tensors have no or other dimensions than (batch, heads, length, size)"
    if not (_one_dtype(q, k, v) and q.device == k.device == v.device):
        return "query, key and value differ in dtype or device"
    if (
        not q.shape[0] == k.shape[0] == v.shape[0]
        or k.shape[1:3] != v.shape[1:3]
        or q.shape[3] != k.shape[3]
        or q.shape[1] % k.shape[1]
    ):
        return "the shapes of query, key and value broadcast"
    scores = (*q.shape[:3], k.shape[2])
    for m in masks:
        if m.dtype != torch.bool and m.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            return f"the mask is {m.dtype} and the query {q.dtype}"
        if m.dim() > 4 or any(n not in (1, s) for n, s in zip(reversed(m.shape), reversed(scores), strict=False)):
            return "the mask has another shape than the scores"
    if type(mask) is StructuredMask and (mask.shape[0], mask.shape[2], mask.shape[3]) != (scores[0], *scores[2:]):
        return "the mask has another shape than the scores"
    return unserved(dropout_p, q, k, v, *masks)


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.dtype == k.dtype == v.dtype:
        return q.is_floating_point()
    # Autocast brings them to one: rotations in float32 leave queries and keys that differ from the values.
    return torch.is_autocast_enabled(q.device.type) and all(t.dtype in KERNEL_DTYPES for t in (q, k, v))


def unserved(dropout_p: Any, q: Tensor, *others: Tensor) -> str | None:
    """The part of `refusal` that no shape decides."""
    if not 0 <= dropout_p < 1:
        return f"dropout is {dropout_p}"
    # Whoever chooses torch's kernels by `torch.nn.attention.sdpa_kernel` wants theirs, for second derivatives say.
    if not flash_sdp_enabled():
        return "fused attention is switched off in torch"
    if not torch.compiler.is_compiling() and (reason := _WATCHED.replaced()):
        return reason
    if not OPERATOR.uses_kernel(q, *others):
        return f"no kernel supports {q.dtype} on {q.device.type} here"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """What is not refused: (B, H, Sq, Dv). With `causal` query i sees the keys up to i.

    `options` are `sinks` and `softcap` of `functional.attention`.
    """
    window = None
    if type(mask) is StructuredMask:
        structure = mask.structure
        if structure is not None and structure.sequences is not None:
            if bias is None and PACKED.uses_kernel(q, k, v):
                return _packed(q, k, v, structure, dropout_p=dropout_p, scale=scale, **options)
        elif structure is not None:
            k, v = k[:, :, : structure.used], v[:, :, : structure.used]
            bias = None if bias is None else bias[..., : structure.used] if bias.shape[-1] > 1 else bias
            padding = structure.padding
            mask = None if padding is None else padding[:, None, None]
            window = (structure.left, structure.right)
        mask = dense(mask)
    if causal:
        # The kernel's causal mask ends at the last key, this one at the key with the last query's number.
        queries, keys = q.shape[2], k.shape[2]
        if keys > queries:
            k, v = k[:, :, :queries], v[:, :, :queries]
            mask, bias = (t if t is None or t.shape[-1] == 1 else t[..., :queries] for t in (mask, bias))
        window = (-1, max(queries - keys, 0))
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask if bias is None else bias + mask
    left, right = (-1, -1) if window is None else window
    route = routes.by_torch(
        q,
        k,
        v,
        left=left,
        right=right,
        scale=scale,
        masked=mask is not None,
        others=bias is not None or any(option is not None for option in options.values()),
        dropout_p=dropout_p,
        mask=mask,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # the model's own attention promises no more
    )
    if route is not None:
        return route
    return attention(q, k, v, mask=mask, bias=bias, window=window, dropout_p=dropout_p, scale=scale, **options)


def _packed(q: Tensor, k: Tensor, v: Tensor, structure: Structure, **options: Any) -> Tensor:
    batch, _, length, _ = q.shape
    ends, longest = structure.packed
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out = varlen_attention(q, k, v, ends, ends, longest, longest, window=(structure.left, structure.right), **options)
    return out.unflatten(0, (batch, length)).transpose(1, 2)


def log_fallback(place: str, reason: str) -> None:
    """Say once why the model's own attention takes a call."""
    if not torch.compiler.is_compiling() and (place, reason) not in _logged:
        _logged.add((place, reason))
        log.info("attention of %s is left to the model: %s", place, reason)
