"""Triton's way from a call to a launch, on a machine without a GPU: all of it is real but the driver.

The binder, the specialisation of arguments, the compiler for a compute capability and the check of shared memory are
Triton's own. What comes last, the launch, is noted and not made; a grid that CUDA would refuse is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from kernels_on_cpu import launchers_take_cpu_tensors
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver as drivers
from triton.runtime.jit import JITFunction

from bigkernels.triton import OPERATORS as KERNELS
from bigkernels.triton._launch import as_if

# Bytes of shared memory that a program may have at most, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability").
SHARED_MEMORY = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
LARGEST_GRID = (2**31 - 1, 65535, 65535)
_PROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Launched:
    """A launch that would have been made: the kernel's name, its grid, and what Triton compiled (`metadata`)."""

    kernel: str
    grid: tuple[int, int, int]
    metadata: Any


@dataclass
class Driver:
    """Stands in for triton.backends.nvidia.driver.CudaDriver."""

    capability: int
    launches: list[Launched] = field(default_factory=list)

    def __post_init__(self) -> None:
        properties = {
            "max_shared_mem": SHARED_MEMORY[self.capability],
            "multiprocessor_count": _PROCESSORS[self.capability],
            "warpSize": 32,
            "max_num_regs": 65536,
        }
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, kernel, shared, device: (1, 1, 32, 0, 1024),  # registers, spills, threads at most
            unload_module=lambda *args: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        name, launches = source.name, self.launches

        def launcher(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            if x > LARGEST_GRID[0] or y > LARGEST_GRID[1] or z > LARGEST_GRID[2]:
                raise RuntimeError(f"Triton Error [CUDA]: invalid argument: {name} with the grid {(x, y, z)}")
            launches.append(Launched(name, (x, y, z), metadata))

        return launcher


def kernels() -> list[JITFunction]:
    """Every kernel of the package."""
    names = (
        *KERNELS,
        "_append",
        "_attention",
        "_decode",
        "_hopper_attention",
        "_hopper_backward",
        "_norm",
        "_quantized_many",
    )
    modules = [importlib.import_module(f"bigkernels.triton.{name}") for name in names]
    return list({fn for module in modules for fn in vars(module).values() if isinstance(fn, JITFunction)})


def _forget() -> None:
    """What Triton keeps of devices, by their index alone."""
    compiler.max_shared_mem.cache_clear()
    for kernel in kernels():
        kernel.device_caches.clear()


@contextmanager
def without_device(capability: int = 90) -> Iterator[Driver]:
    """The launchers get CPU tensors and launch nothing: results are memory as it was found. Yields the driver, which
    notes the launches.
    """
    before, driver = drivers._active, Driver(capability)
    drivers.set_active(driver)
    _forget()
    try:
        with launchers_take_cpu_tensors(), as_if(capability):
            yield driver
    finally:
        _forget()  # while the driver is here that unloads what was loaded
        drivers.set_active(before)
