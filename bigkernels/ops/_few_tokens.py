"""`quantized_linear` with 1 to 64 tokens, and its gradient, by the CUDA kernels that read a weight in the order of
matrix fragments. They are off until a GPU has measured them: a row of the table of routes says so then. Until then
`bigkernels.use("cuda")` forces them, one operator and no other, and BIGKERNELS_FRAGMENTS=1 takes them for those calls
of a whole model that they take.

The copy in that order is made when a weight first meets these kernels, beside the codes, and takes as much memory as
they do. It holds as long as the tensors that it was made from are the same and count no write; PyTorch counts none
through ``.data`` (`bigkernels.quantization.refresh`).
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._load import cuda_unavailable
from . import registry, routes
from ._fragments import CODES, OFFSETS, Fragments, in_fragments, kind_of, power_of_two
from .registry import Implementation, is_capturing, log

MOST = 64
CALL, BACKWARD = "few tokens, in fragments", "few tokens, in fragments, backward"
_ENABLED = os.environ.get("BIGKERNELS_FRAGMENTS", "0") not in ("", "0")
DTYPES = (torch.bfloat16, torch.float16)

torch.library.define(
    "bigkernels::quantized_few",
    "(Tensor x, Tensor units, Tensor? factor, Tensor? book, Tensor? bias, int code, int offset, int group, "
    "Tensor(a!) out) -> ()",
)
torch.library.define(
    "bigkernels::quantized_few_bwd",
    "(Tensor grad, Tensor units, Tensor? book, Tensor? top, int code, int offset, int group, Tensor(a!) out) -> ()",
)
_run, _run_back = torch.ops.bigkernels.quantized_few.default, torch.ops.bigkernels.quantized_few_bwd.default


def unavailable() -> str | None:
    """Why no GPU here runs these kernels; None if all do. Asks the driver."""
    if reason := cuda_unavailable():
        return reason
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return None if oldest >= (8, 0) else f"a GPU here has compute capability {oldest[0]}.{oldest[1]}; it needs 8.0"


def kernel() -> Implementation:
    return Implementation("cuda", "cuda", DTYPES, unavailable)


# ---- the copy --------------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """The tensors that a copy was made from, and how often each had been written to."""

    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: tuple[Tensor | None, ...]) -> _Seen:
        return cls(tensors, tuple(0 if t is None else t._version for t in tensors))

    def holds(self, other: _Seen) -> bool:
        return self.versions == other.versions and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))


@dataclass
class _Copy:
    codes_version: int
    seen: _Seen  # of all but the codes, which are what this is held by
    fragments: Fragments | None  # None: where what it was made from has changed, until that is seen a second time


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def forget(codes: Tensor) -> None:
    """Drop the copy of a weight; the next call makes another."""
    _copies.pop(codes, None)


def _fragments(
    codes: Tensor, others: tuple[Tensor | None, ...], group: int, kind: int, k: int, at_once: bool
) -> Fragments | str:
    """The copy, or why there is none. `at_once`: make it whenever there is none."""
    base = codes._base
    if base is not None and base.nbytes > codes.nbytes:
        return "the codes are a part of another tensor"
    if any(t is not None and t.is_inference() for t in (codes, *others)):
        return "inference tensors count no writes to them"
    version, seen, held = codes._version, _Seen.of(others), _copies.get(codes)
    same = held is not None and held.codes_version == version and held.seen.holds(seen)
    if same and held.fragments is not None:
        return held.fragments
    if is_capturing(codes):
        return "a CUDA graph is captured, and the copy of the weight was not made before"
    if held is not None and not same and not at_once:
        # What is made anew for each call is not worth a copy. The second call with the same tensors makes it.
        _copies[codes] = _Copy(version, seen, None)
        return "the weight has just changed"
    with torch.no_grad():
        fragments = in_fragments(codes, *others, group, kind, k)
    log.info(
        "quantized_linear: a weight (%d, %d) copied in the order of matrix fragments: %.1f MB beside its %.1f MB",
        fragments.n,
        fragments.k,
        fragments.nbytes / 1e6,
        sum(t.nbytes for t in (codes, *others) if t is not None) / 1e6,
    )
    _copies[codes] = _Copy(version, seen, fragments)
    return fragments


# ---- calls -----------------------------------------------------------------------------------------------------------


@functools.cache
def _is_routed(call: str, capability: routes.Capability) -> bool:
    wanted = _ENABLED or routes.find("quantized_linear", call, capability).by == "cuda"
    return wanted and unavailable() is None


def is_chosen(x: Tensor, call: str = CALL) -> bool:
    """Whether these kernels come first, by the table of routes, a variable or `use`."""
    forced = registry._forced
    if forced is not None:
        return forced == "cuda"
    capability = routes.capability_of(x)
    return capability is not None and _is_routed(call, capability)


def refusal(
    x: Tensor, bias: Tensor | None, group: int, kind: int, k: int, dynamic: bool = False, depth: int = 0
) -> str | None:
    """Why these kernels do not take a call; None if they do. `depth` is of x, where it is not k."""
    if dynamic:
        return "it multiplies no rounded tokens"
    if x.dtype not in DTYPES:
        return f"no kernel for {str(x.dtype).removeprefix('torch.')}"
    if x.numel() > MOST * (depth or k):
        return f"it takes {MOST} tokens at most"
    if k % 8:
        return "it takes rows of a multiple of 8 elements"
    if kind_of(kind, group) is None:
        return "no kernel for this format"
    if bias is not None and bias.dtype not in registry.KERNEL_DTYPES:
        return f"no kernel for a bias of {str(bias.dtype).removeprefix('torch.')}"
    return None


def product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    row_scale: Tensor | None,
    book: Tensor | None,
    bias: Tensor | None,
    group: int,
    kind: int,
    k: int,
    wide: bool,
    at_once: bool = False,
) -> Tensor | str:
    """The result, of what `refusal` does not refuse, or why there is no copy of the weight."""
    fragments = _fragments(codes, (scale, zero, row_scale, book), group, kind, k, at_once)
    if isinstance(fragments, str):
        return fragments
    tokens = _in_pieces(x.reshape(-1, k))
    out = x.new_empty(*x.shape[:-1], fragments.n, dtype=torch.float32 if wide else None)
    _run(
        tokens,
        fragments.units,
        fragments.factor,
        book,
        bias if bias is None else bias.contiguous(),
        CODES.index(fragments.code),
        OFFSETS.index(fragments.offset),
        fragments.group,
        out.view(-1, fragments.n),
    )
    return out


def gradient(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    row_scale: Tensor | None,
    book: Tensor | None,
    group: int,
    kind: int,
    k: int,
    at_once: bool = False,
) -> Tensor | str:
    """The gradient of the tokens, as `product`. What rows are scaled with goes to the gradient of the result before. In
    float16 that is divided by a power of two a token, which comes back last: its products with scales of groups would
    be too small.
    """
    fragments = _fragments(codes, (scale, zero, row_scale, book), group, kind, k, at_once)
    if isinstance(fragments, str):
        return fragments
    rows, power = grad.reshape(-1, fragments.n), None
    if fragments.factor is not None or grad.dtype == torch.float16:
        wide = rows.float() if fragments.factor is None else rows.float() * fragments.factor
        if grad.dtype == torch.float16:
            power = power_of_two(wide.abs().amax(1, keepdim=True))
            wide = wide / power
        rows = wide.to(grad.dtype)
    rows = _in_pieces(F.pad(rows, (0, -fragments.n % 8)) if fragments.n % 8 else rows)
    out = grad.new_empty(*grad.shape[:-1], k, dtype=None if power is None else torch.float32)
    _run_back(
        rows,
        fragments.units,
        book,
        fragments.top if power is not None else None,
        CODES.index(fragments.code),
        OFFSETS.index(fragments.offset),
        fragments.group,
        out.view(-1, k),
    )
    return out if power is None else out.view(-1, k).mul_(power).to(grad.dtype).view(*grad.shape[:-1], k)


def _in_pieces(rows: Tensor) -> Tensor:
    """As they are, where rows lie in pieces of 16 bytes, else a copy."""
    if rows.stride(1) == 1 and not rows.stride(0) % 8 and not rows.data_ptr() % 16:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _forced_refusal(why: str) -> RuntimeError:
    return RuntimeError(f"bigkernels.functional.quantized_linear: 'cuda' was forced but {why}")


def before(launcher: Callable) -> Callable:
    """`quantized_linear_fwd` on GPUs: these kernels where the table of routes or `use` says so, else the launcher."""

    def call(x, codes, scale, zero, row_scale, book, bias, group, kind, k, dynamic, wide=False):
        if x.numel() and len(codes) and is_chosen(x):
            forced = registry._forced == "cuda"
            why = refusal(x, bias, group, kind, k, dynamic)
            if why is None:
                out = product(x, codes, scale, zero, row_scale, book, bias, group, kind, k, wide, forced)
                if not isinstance(out, str):
                    return out
                why = out
            if forced:
                raise _forced_refusal(why)
        return launcher(x, codes, scale, zero, row_scale, book, bias, group, kind, k, dynamic, wide)

    return call


def before_backward(launcher: Callable) -> Callable:
    """`quantized_linear_bwd` on GPUs, likewise."""

    def call(grad, codes, scale, zero, row_scale, book, group, kind, k):
        if grad.numel() and k and is_chosen(grad, BACKWARD):
            forced = registry._forced == "cuda"
            why = refusal(grad, None, group, kind, k, depth=len(codes))
            if why is None:
                grad_x = gradient(grad, codes, scale, zero, row_scale, book, group, kind, k, forced)
                if not isinstance(grad_x, str):
                    return grad_x
                why = grad_x
            if forced:
                raise _forced_refusal(why)
        return launcher(grad, codes, scale, zero, row_scale, book, group, kind, k)

    return call
