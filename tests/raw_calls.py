"""Catches the calls of raw operators that a public function and its backward pass make."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigkernels._samples import Sample


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bigkernels":
            self.calls.append((func, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


def recorded(sample: Sample, inputs: dict[str, Tensor], backend: str) -> list[tuple[torch._ops.OpOverload, tuple]]:
    """(operator, arguments) of each raw call, in order."""
    with _Recorder() as recorder:
        sample.results(inputs, backend=backend)
    return recorder.calls


def raw_calls(sample: Sample, inputs: dict[str, Tensor], backend: str) -> list[tuple[torch._ops.OpOverload, tuple]]:
    """The same, of an operator whose forward and backward are a raw call each."""
    calls = recorded(sample, inputs, backend)
    if sample.differentiable:
        assert [op.name().split("_")[-1] for op, _ in calls] == ["fwd", "bwd"]
    return calls
