"""CPU tensors that say they are on a GPU, and complain of what would be an error or a wait there.

A `PretendGpu` mode holds which tensors are on the GPU: those that were put there, and what is computed from them. An
operation that mixes them with tensors of the host raises, as CUDA would. With `waits="refused"`, so does whatever makes
the host wait for the device: reading a value, a shape that depends on values, a copy from or to memory of the host.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bigkernels.ops import routes

CUDA = torch.device("cuda", 0)
_MARK = "_pretended_device"
_FACTORIES = {
    torch.tensor,
    torch.as_tensor,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.empty,
    torch.arange,
    torch.linspace,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.eye,
    torch.empty_strided,
}
_READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.nonzero,
    torch.nonzero,
    torch.equal,
    Tensor.equal,
    Tensor.masked_select,
    torch.masked_select,
    Tensor.unique,
    torch.unique,
    torch.allclose,
    Tensor.is_nonzero,
}
_DEVICE = {Tensor.device.__get__: CUDA, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}


class Waits(AssertionError):
    pass


def put(*tensors: Tensor) -> None:
    """These are on the GPU from now on."""
    for t in tensors:
        setattr(t, _MARK, "cuda")


def put_module(module: nn.Module) -> nn.Module:
    put(*module.parameters(), *module.buffers())
    return module


def on_gpu(t: Any) -> bool:
    return getattr(t, _MARK, None) == "cuda"


class PretendGpu(TorchFunctionMode):
    def __init__(self, waits: str = "allowed"):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = any(map(on_gpu, given))
        if function in _DEVICE:
            return _DEVICE[function] if on_gpu(args[0]) else function(*args, **kwargs)
        if there and function in _READS:
            self._wait(function)
        if function is Tensor.__getitem__ and there:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index):
                self._wait(function)
            if any(isinstance(i, list) for i in index):
                self._wait(function)
        target, args, kwargs = _target(args, kwargs)
        if target == "cuda" and function in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            self._wait(function)
        moves = function in (Tensor.to, Tensor.cuda, Tensor.copy_)
        away = [t for t in given if getattr(t, _MARK, None) == "cpu" and t.dim()]
        if moves and target == "cuda" and not there:
            self._wait(function)
        elif there and away and not moves:
            raise RuntimeError(f"{function.__name__}: expected all tensors to be on the same device, cuda:0 and cpu")
        elif function is Tensor.copy_ and on_gpu(args[0]) != on_gpu(args[1]):
            self._wait(function)
        out = function(*args, **kwargs)
        mark = target or ("cuda" if there else "cpu" if function in _FACTORIES or away else None)
        if mark is not None:
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    with contextlib.suppress(AttributeError):
                        setattr(t, _MARK, mark)
        return out

    def _wait(self, function: Any) -> None:
        if self.waits == "refused":
            raise Waits(f"{getattr(function, '__qualname__', function)} would wait for the device")


def _target(args: tuple, kwargs: dict) -> tuple[str | None, tuple, dict]:
    """The device that a call names, and its arguments with the CPU in its place."""
    found = None

    def home(value: Any) -> Any:
        nonlocal found
        kind = value.type if isinstance(value, torch.device) else str(value).split(":")[0]
        if kind in ("cuda", "cpu"):
            found = kind
            return torch.device("cpu")
        return value

    if kwargs.get("device") is not None:
        kwargs["device"] = home(kwargs["device"])
    named = (torch.device, str)
    args = tuple(home(a) if isinstance(a, named) and str(a).split(":")[0] in ("cuda", "cpu") else a for a in args)
    return found, args, kwargs


class _Autocast(torch.autocast):
    """That of the CPU, under the GPU's name."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu", *args, **kwargs)


def pretend(monkeypatch: pytest.MonkeyPatch, capturing: bool = False) -> None:
    """What asks torch.cuda about the device gets an answer."""
    monkeypatch.setattr(torch, "autocast", _Autocast)
    monkeypatch.setattr(torch.random, "fork_rng", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(routes, "_capability", lambda index: (9, 0))
    if importlib.util.find_spec("triton") is not None:
        from bigkernels.triton import _launch

        monkeypatch.setattr(_launch, "_processors", lambda index: 132)
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": asked("cpu" if kind == "cuda" else kind))
