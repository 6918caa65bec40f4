"""Hands CPU tensors to the launchers of bigkernels.triton, which `bigkernels.use("triton")` then accepts.

What runs the kernels is another matter: Triton's interpreter (tests/interpreter), or nothing
(driver_without_device.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bigkernels.ops import OPERATORS
from bigkernels.ops.compress import OPERATOR as CODES
from bigkernels.ops.grouped_linear import OPERATOR as EXPERTS
from bigkernels.ops.registry import KERNEL_DTYPES, Implementation
from bigkernels.triton import OPERATORS as KERNELS
from bigkernels.triton import launchers, play_directly


class _OnCpu(Implementation):
    def refuses(self, device: str, dtype: torch.dtype) -> str | None:
        return super().refuses("cpu" if device == "cuda" else device, dtype)  # tensors that say they are on a GPU


@contextmanager
def launchers_take_cpu_tensors(dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES) -> Iterator[None]:
    library = torch.library.Library("bigkernels", "IMPL")
    operators = OPERATORS | {"compress": CODES, "grouped_linear": EXPERTS}
    before = {name: operator.implementations for name, operator in operators.items()}

    def forget() -> None:
        for operator in operators.values():
            operator._choices.clear()
            operator._on_cpu.clear()

    found = launchers()
    for name, launcher in found.items():
        library.impl(name, launcher, "CPU", allow_override=True)
    bound = play_directly(found, on_cpu=True)
    for name in KERNELS:
        ours = [i.name for i in before[name] if i.name in ("triton", "gluon")]
        operators[name].implementations = tuple(_OnCpu(kind, "cpu", dtypes=dtypes) for kind in ours)
    forget()
    try:
        yield
    finally:
        for module, name, overload in bound:
            setattr(module, name, overload)
        for name, operator in operators.items():
            operator.implementations = before[name]
        forget()
        library._destroy()
