"""The GPU kernels: one file an operator, `forward`, `backward` and `infer` launching the Triton kernels above them.

Importing this package does not import triton: the dispatcher gets functions that load an operator's file when a CUDA
tensor first reaches it. Nothing here asks whether a GPU exists, because asking initialises the driver, and a process
that has done so can no longer fork workers that use it.
"""

# mypy: ignore-errors

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .._torch_private import Overload
from ..ops import _few_tokens

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

OPERATORS = (
    "rms_norm",
    "layer_norm",
    "rope",
    "glu",
    "cross_entropy",
    "attention",
    "varlen_attention",
    "decode_attention",
    "quantized_linear",
    "grouped_linear",
    "compress",
    "mlp",
    "group_norm",
    "batch_norm",
)


class _Launcher:
    """The launcher of a raw operator; its file is loaded by the first call."""

    def __init__(self, operator: str, direction: str) -> None:
        self._operator, self._direction = operator, direction
        self._found: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        if self._found is None:
            from ._prepared import prepared

            module = importlib.import_module("." + self._operator, __name__)
            self._found = prepared(getattr(module, self._direction))
        return self._found(*args)

    def direct(self, overload: Callable) -> Callable | None:
        """What plays this launcher's tapes without the dispatcher; None where there are none yet."""
        made = getattr(self._found, "direct", None)
        return None if made is None else made(overload)


def launchers() -> dict[str, _Launcher]:
    """The launcher of each raw operator of OPERATORS."""
    found = {
        "append_kv_": _Launcher("decode_attention", "append"),
        "decompress": _Launcher("compress", "decompress"),
        "cross_entropy_bwd_": _Launcher("cross_entropy", "backward_over"),
        "cross_entropy_predict": _Launcher("cross_entropy", "predict"),
        "grouped_linear_weight_bwd": _Launcher("grouped_linear", "weight_backward"),
    }
    for operator in OPERATORS:
        for suffix, direction in (("_fwd", "forward"), ("_bwd", "backward"), ("", "infer")):
            if hasattr(torch.ops.bigkernels, operator + suffix):  # not every operator has all forms
                found[operator + suffix] = _Launcher(operator, direction)
    return found


def _directly(overload: Callable, launcher: _Launcher, on_cpu: bool) -> Callable:
    """A raw operator's overload, behind what plays the tapes of its launcher."""
    direct, first = None, -1 if on_cpu else 0
    calls = {
        "bigkernels::quantized_linear_fwd": _few_tokens.CALL,
        "bigkernels::quantized_linear_bwd": _few_tokens.BACKWARD,
    }
    others = calls.get(overload.name())

    def call(*args: Any) -> Any:
        nonlocal direct
        if _is_dynamo_compiling() or args[0].get_device() < first:
            return overload(*args)
        if direct is None:
            direct = launcher.direct(overload)
            if direct is None:
                return overload(*args)
        if others is not None and _few_tokens.is_chosen(args[0], others):
            return overload(*args)
        return direct(*args)

    return call


def play_directly(found: dict[str, _Launcher], on_cpu: bool = False) -> list[tuple[Any, str, Callable]]:
    """Bind the names of raw operators in the files of `ops` to what plays tapes without the dispatcher.
    Returns what was bound before: (module, name, overload).
    """
    before = []
    for operator in OPERATORS:
        module = importlib.import_module(f"..ops.{operator}", __name__)
        for name, overload in list(vars(module).items()):
            if isinstance(overload, Overload):
                launcher = found.get(overload.name().removeprefix("bigkernels::"))
                if launcher is not None:
                    before.append((module, name, overload))
                    setattr(module, name, _directly(overload, launcher, on_cpu))
    return before


def register() -> None:
    """Register the launchers for CUDA tensors, where this torch and this environment could run them."""
    if not torch.backends.cuda.is_built() or importlib.util.find_spec("triton") is None:
        return
    found = launchers()
    for name, launcher in found.items():
        if name in ("quantized_linear_fwd", "quantized_linear_bwd"):
            launcher = (_few_tokens.before if name.endswith("fwd") else _few_tokens.before_backward)(launcher)
        torch.library.impl(f"bigkernels::{name}", "CUDA")(launcher)
    play_directly(found)
