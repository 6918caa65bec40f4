"""Which calls of attention the kernels for Hopper take (`_hopper_attention.py`), and their launches.

They are off until a GPU has run them: `bigkernels.use("gluon")`, `BIGKERNELS_GLUON=1`, or a row of the table of routes
that says "gluon" puts them in the place of the Triton kernels, for those calls that they take.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
from torch import Tensor

from ..ops import registry
from ..ops.routes import find
from ._launch import launch

_SIZES = (64, 128)
_ROWS = 64  # of a group of warps
_BLOCK = 128  # keys that a program of `attend` reads at a time
_ENABLED = os.environ.get("BIGKERNELS_GLUON", "0") not in ("", "0")


@functools.cache
def _missing() -> str | None:
    try:
        from . import _hopper_attention  # noqa: F401
    except ImportError as error:
        return f"this Triton has no Gluon for Hopper ({error})"
    return None


def refusal(call, *tensors: Tensor) -> str | None:
    """Why the kernels do not take a call (`attention.Call`); None if they do. `tensors` are what descriptors read."""
    if call.capability // 10 != 9:
        return f"they are for compute capability 9.0, not {call.capability / 10}"
    if call.wide:
        return "no kernel for float32"
    if call.common["D"] != call.common["DV"] or call.common["D"] not in _SIZES:
        return f"heads of {call.common['D']} and {call.common['DV']} elements; they take {_SIZES}"
    given = [name.lower() for name in ("BIAS", "MASK", "SLOPES", "PREFIXES") if call.tensors[name] is not None]
    if given or call.common["DROPOUT"]:
        return f"they take no {', '.join(given) or 'dropout'}"
    if call.scale <= 0:
        return "they take positive scales alone"
    for t in tensors:
        steps = zip(t.stride()[:-1], t.shape[:-1], strict=True)
        if t.data_ptr() % 16 or any(n % 8 or (not n and size > 1) for n, size in steps):
            return "rows do not start on 16 bytes"
    return _missing()


def takes(call, *tensors: Tensor) -> bool:
    """Whether a call goes to these kernels.

    Raises:
        RuntimeError: they are forced and do not take it.
    """
    forced = registry.is_forced("gluon")
    if not forced and (registry.is_forced("triton") or not _is_on(call.capability)):
        return False
    reason = refusal(call, *tensors)
    if forced and reason is not None:
        raise RuntimeError(f"bigkernels.functional.attention: 'gluon' was forced but {reason}")
    return reason is None


def _is_on(capability: int) -> bool:
    if capability // 10 != 9:
        return False
    return _ENABLED or find("attention", "ours on Hopper", (9, 0)).by == "gluon"


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _launch(kernel, grid: tuple[int], *args, **options) -> None:
    """A launch of a kernel that makes descriptors, for which Triton wants to be told who gives memory."""
    from triton.runtime import _allocation

    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_scratch)  # of this thread: those of autograd have their own
    launch(kernel, grid, *args, num_warps=4, **options)


def backward(
    call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    strides: dict[str, int],
) -> None:
    """Fills dq, dk and dv. `lse` is in base 2; `strides` are those of all but q, k and v, by the kernels' names."""
    from ._hopper_backward import backward_keys, backward_queries

    options = _options(call) | strides | {"q_scale": call.scale, "GROUPS": 2, "STAGES": 2}
    inputs = (q, k, v, grad, lse, delta)
    dk_strides = {n: options.pop(n) for n in list(options) if n.startswith(("dk_", "dv_"))}
    dq_strides = {n: options.pop(n) for n in list(options) if n.startswith("dq_")}
    blocks = -(-call.queries // (2 * _ROWS))
    _launch(backward_queries, (blocks * call.batch * q.shape[1],), *inputs, dq, BLOCK_N=64, **options, **dq_strides)
    blocks = -(-call.keys // (2 * _ROWS))
    block = 32 if call.common["D"] > 64 and options["SOFTCAP"] else 64  # what the registers hold
    _launch(backward_keys, (blocks * call.batch * k.shape[1],), *inputs, dk, dv, BLOCK_M=block, **options, **dk_strides)


def _options(call) -> dict[str, object]:
    names = ["queries", "keys", "left", "right", "scale", "HEADS", "GROUP", "D", "LEFT", "RIGHT"]
    names += [f"{tensor}_{by}" for tensor in "qkv" for by in ("batch", "head", "token")]
    softcap = call.common["softcap"]
    return {n: call.common[n] for n in names} | {
        "CU_Q": call.tensors["CU_Q"],
        "CU_K": call.tensors["CU_K"],
        "softcap": softcap or 0.0,
        "SOFTCAP": softcap is not None,
    }


def forward(
    call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, strides: dict[str, int]
) -> None:
    """Fills out and lse; `strides` are theirs, by the kernels' names."""
    from ._hopper_attention import attend

    blocks = -(-call.queries // (2 * _ROWS))
    _launch(
        attend,
        (blocks * call.batch * q.shape[1],),
        q,
        k,
        v,
        out,
        lse,
        SINKS=sinks,
        GROUPS=2,
        BLOCK_N=_BLOCK,
        STAGES=2,
        **_options(call),
        **strides,
    )
