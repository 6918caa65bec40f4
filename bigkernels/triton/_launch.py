"""What the launchers share: launching, the shape of a grid, and views of tensors as rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.registry import KERNEL_DTYPES
from ..ops.routes import capability_of
from ._prepared import note_launch


@dataclass(frozen=True)
class Launch:
    """One launch as the ahead-of-time check compiles it."""

    kernel: Any
    args: dict[str, Any]
    num_warps: int
    maxnreg: int | None = None
    grid: tuple[int, ...] = ()


_recorded: list[Launch] | None = None
_elsewhere = 80  # the compute capability for tensors that are on no GPU


@contextlib.contextmanager
def recording(capability: int | None = None) -> Iterator[list[Launch]]:
    """Collect launches and run none of them: with meta tensors the launchers need no GPU. What they would launch is for
    GPUs of a compute capability, 90 for 9.0.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        with as_if(_elsewhere if capability is None else capability):
            yield _recorded
    finally:
        _recorded = before


@contextlib.contextmanager
def as_if(capability: int) -> Iterator[None]:
    """Tensors that are on no GPU are taken to be on one of this compute capability."""
    global _elsewhere
    before, _elsewhere = _elsewhere, capability
    try:
        yield
    finally:
        _elsewhere = before


def capability(t: Tensor) -> int:
    """The compute capability of a tensor's GPU, 90 for 9.0."""
    found = capability_of(t)
    return _elsewhere if found is None else 10 * found[0] + found[1]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    maxnreg: int | None = None,
    debug: bool = False,
    **constants: Any,
) -> None:
    """Run `kernel` on the device of its first argument.

    Args:
        maxnreg: registers a thread, where the assembler is not to choose: it spills some to fit more programs.
    """
    if _recorded is not None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        _recorded.append(Launch(kernel, named, num_warps, maxnreg, grid))
        return
    device = args[0].device
    guard = contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)
    with guard:
        compiled = kernel[grid](*args, num_warps=num_warps, maxnreg=maxnreg, debug=debug, **constants)
    note_launch(kernel, grid, compiled, args, constants)


def falls_back(fallback: Callable, *, inputs: int = 1, empty: Callable | None = None) -> Callable[[Callable], Callable]:
    """Leave calls to others where one of the first `inputs` tensors is empty or of a dtype without kernels.

    Args:
        fallback: the operator in plain PyTorch.
        empty: takes empty tensors in its place. Fallbacks that differentiate by autograd cannot run inside a dispatch
            mode; the fake kernel is right where there is nothing to compute.
    """

    def decorate(launcher: Callable) -> Callable:
        @functools.wraps(launcher)
        def call(*args):
            if not all(x.numel() for x in args[:inputs]):
                return (empty or fallback)(*args)
            return (launcher if all(x.dtype in KERNEL_DTYPES for x in args[:inputs]) else fallback)(*args)

        return call

    return decorate


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Multiprocessors of `device`; a small number where kernels are interpreted, a typical one where none is run."""
    if device.type == "cuda":
        return _processors(device.index)
    return 2 if device.type == "cpu" else 132


def rows(x: Tensor) -> Tensor:
    """`x` as (rows, D) with the elements of a row adjacent; a view where the strides allow it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def require(operator: str, condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"bigkernels::{operator}: {message}")


@functools.cache
def since(major: int, minor: int) -> bool:
    """Whether Triton is this version or a later one: tables have entries for compilers that differ."""
    return tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (major, minor)


def power_of_2(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))
