"""The GPU kernels: one file an operator, `forward`, `backward` and `infer` launching the Triton kernels above them.

Importing this package does not import triton: the dispatcher gets functions that load an operator's file when a CUDA
tensor first reaches it. Nothing here asks whether a GPU exists, because asking initialises the driver, and a process
that has done so can no longer fork workers that use it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

OPERATORS = ("rms_norm", "layer_norm", "rope", "glu", "cross_entropy")


def _launcher(operator: str, direction: str) -> Callable:
    def call(*args):
        return getattr(importlib.import_module("." + operator, __name__), direction)(*args)

    return call


def register() -> None:
    """Register the launchers for CUDA tensors, where this torch and this environment could run them."""
    if not torch.backends.cuda.is_built() or importlib.util.find_spec("triton") is None:
        return
    for operator in OPERATORS:
        for suffix, direction in (("_fwd", "forward"), ("_bwd", "backward"), ("", "infer")):
            if hasattr(torch.ops.bigkernels, operator + suffix):  # not every operator has a form without backward
                torch.library.impl(f"bigkernels::{operator}{suffix}", "CUDA")(_launcher(operator, direction))
