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

OPERATORS = (
    "rms_norm", "layer_norm", "rope", "glu", "cross_entropy", "attention", "varlen_attention", "decode_attention",
    "quantized_linear", "grouped_linear", "compress",
)  # fmt: skip


def _launcher(operator: str, direction: str) -> Callable:
    found = None

    def call(*args):
        nonlocal found
        if found is None:
            from ._prepared import prepared

            found = prepared(getattr(importlib.import_module("." + operator, __name__), direction))
        return found(*args)

    return call


def launchers() -> dict[str, Callable]:
    """The launcher of each raw operator of OPERATORS."""
    found = {
        "append_kv_": _launcher("decode_attention", "append"),
        "decompress": _launcher("compress", "decompress"),
        "cross_entropy_bwd_": _launcher("cross_entropy", "backward_over"),
        "cross_entropy_predict": _launcher("cross_entropy", "predict"),
        "grouped_linear_weight_bwd": _launcher("grouped_linear", "weight_backward"),
    }
    for operator in OPERATORS:
        for suffix, direction in (("_fwd", "forward"), ("_bwd", "backward"), ("", "infer")):
            if hasattr(torch.ops.bigkernels, operator + suffix):  # not every operator has all forms
                found[operator + suffix] = _launcher(operator, direction)
    return found


def register() -> None:
    """Register the launchers for CUDA tensors, where this torch and this environment could run them."""
    if not torch.backends.cuda.is_built() or importlib.util.find_spec("triton") is None:
        return
    from ..ops import _few_tokens

    found = launchers()
    found["quantized_linear_fwd"] = _few_tokens.before(found["quantized_linear_fwd"])
    for name, launcher in found.items():
        torch.library.impl(f"bigkernels::{name}", "CUDA")(launcher)
