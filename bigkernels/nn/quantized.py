"""A weight in codes, as a module: what the modules that multiply with one share."""

# mypy: ignore-errors

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._deprecated import renamed_members
from ..ops import _few_tokens
from ..quantization import QuantizedWeight
from ..quantization.layers import Shell
from ._weight import LazyWeight

_DESCRIPTION = "format"  # the buffer that says what the others are


@renamed_members("bigkernels.nn.Quantized", config="weight_format")
class Quantized(nn.Module):
    """Holds the tensors of a weight (N, K) as buffers: they are saved, copied and moved as the model is, and keep their
    dtypes when it is cast. A state dict loads into a module of the same format and size alone.
    """

    _is_hf_initialized = True  # transformers leaves it alone where it fills weights that no file had

    def __init__(
        self, qweight: QuantizedWeight, shell: Shell | None = None, trained: bool = True, **described: int
    ) -> None:
        nn.Module.__init__(self)
        self.weight_format = qweight.format
        self.dtype = qweight.dtype  # of the values: what was quantized, or what the module was cast to since
        self.out_features, self.in_features = qweight.shape
        self._described = _description(qweight, described)
        device = qweight.device
        for name, t in qweight.tensors.items():
            self.register_buffer(name, t)
        self.register_buffer(_DESCRIPTION, _bytes(self._described, device))
        self._qweight: QuantizedWeight | None = None
        self._weight: tuple[QuantizedWeight, LazyWeight] | None = None
        self._shell, self._trained, self._tie = shell, trained, None
        self._among_trained = False  # whether parameters of the model that stayed required gradients

    @property
    def qweight(self) -> QuantizedWeight:
        """The weight: its tensors are the buffers."""
        names = self.weight_format.layout((self.out_features, self.in_features))
        tensors = {name: self._buffers[name] for name in names}
        held = self._qweight
        if held is None or held.dtype != self.dtype or any(held.tensors[name] is not t for name, t in tensors.items()):
            held = QuantizedWeight(self.weight_format, (self.out_features, self.in_features), self.dtype, tensors)
            self._qweight = held
        return held

    @torch.no_grad()
    def share(self, other: Quantized) -> None:
        """Read the codes of another module from now on, wherever both are moved.

        Raises:
            ValueError: it has another format or size.
        """
        if other._described != self._described:
            raise ValueError(
                f"bigkernels.nn.{type(self).__name__}: {other._described} cannot stand for {self._described}"
            )
        if other is not self:
            other._tie = self._tie = other._tie or _Tie()
            self._tie.members.update((self, other))
            for name in self.qweight.tensors:
                self._buffers[name] = other._buffers[name]

    def shares(self, other: Quantized) -> bool:
        """Whether both read the same codes."""
        return self._tie is not None and self._tie is other._tie

    def description(self) -> Tensor:
        """The buffer that a state dict says format and size with, on the CPU."""
        return _bytes(self._described, torch.device("cpu"))

    def refresh(self) -> None:
        """Forget what was derived from the codes."""
        self._qweight = self._weight = None
        if (codes := self._buffers.get("codes")) is not None:
            _few_tokens.forget(codes)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            return super().__setattr__(name, value)
        owner = value._owner if isinstance(value, LazyWeight) else None
        if not isinstance(owner, Quantized):
            raise TypeError(
                f"bigkernels.nn.{type(self).__name__}: its weight is held in codes and cannot be set; call "
                "bigkernels.dequantize(model) first, or put another module in its place"
            )
        self.share(owner)

    def requires_grad_(self, requires_grad: bool = True) -> Quantized:
        self._trained = requires_grad
        return super().requires_grad_(requires_grad)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_qweight": None, "_weight": None}  # what it derived is made again

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self._tie is not None:
            self._tie.members.add(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        # Casts are for floating tensors: seen as bytes, ours are moved and nothing else.
        before = dict(self._buffers)
        for name, t in before.items():
            self._buffers[name] = t.view(torch.uint8)
        try:
            super()._apply(fn, recurse)
        finally:
            for name, t in before.items():
                self._buffers[name] = self._buffers[name].view(t.dtype)
        if self._tie is not None:
            for name in self.qweight.tensors:
                self._buffers[name] = self._tie.moved(name, fn, before[name], self._buffers[name])
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before[_DESCRIPTION].device)).dtype
        described = self._buffers[_DESCRIPTION]
        if before[_DESCRIPTION].is_meta and not described.is_meta:
            self._buffers[_DESCRIPTION] = _bytes(self._described, described.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        described = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if described is not None:
            described["dtype"] = str(self.dtype).removeprefix("torch.")

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        given = {name: state_dict.get(prefix + name) for name in self._buffers}
        kind, path = f"bigkernels.nn.{type(self).__name__}", prefix[:-1] or "the module"
        if (mark := state_dict.get(prefix + "weight")) is not None and mark.shape == (0,):
            del state_dict[prefix + "weight"]  # by which files of transformers refuse a model without codes
        if prefix + "weight" in state_dict and all(t is None for t in given.values()):
            errors.append(
                f"{kind}: {path} is quantized and the state has a plain weight for it; load it before `quantize`"
            )
            return
        if given[_DESCRIPTION] is not None and not given[_DESCRIPTION].is_meta:
            text = _text(given[_DESCRIPTION])
            if text != self._described:
                errors.append(f"{kind}: {path} was saved as {text}, and is {self._described}")
                return
        wrong = [
            f"{kind}: {prefix}{name} is {t.dtype} of shape {tuple(t.shape)}, expected {held.dtype} of shape "
            f"{tuple(held.shape)}"
            for name, held in self._buffers.items()
            if (t := given[name]) is not None and (t.shape, t.dtype) != (held.shape, held.dtype)
        ]
        if wrong:
            errors += wrong
            return
        before = {name: self._buffers[name] for name in self.qweight.tensors}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if local_metadata.get("assign_to_params_buffers"):  # dtypes are those of the state, of a plain weight, too
            bias = state_dict.get(prefix + "bias")  # files without metadata have no other
            name = local_metadata.get("dtype")
            self.dtype = getattr(torch, name) if name else self.dtype if bias is None else bias.dtype
        self._qweight = None
        for other in self._tie.members if self._tie is not None else ():
            for name, t in before.items():  # `assign=True` puts other tensors here
                if other is not self and other._buffers[name] is t:
                    other._buffers[name] = self._buffers[name]


class _Tie:
    """What modules with the same codes share, so that these stay one when the modules are moved one after the other."""

    def __init__(self) -> None:
        self.members: weakref.WeakSet[Quantized] = weakref.WeakSet()
        self._last: dict[str, tuple] = {}

    def moved(self, name: str, fn: Callable, before: Tensor, after: Tensor) -> Tensor:
        """The moved tensor: that of the module that was moved before, where it had the same by the same function."""
        key = before.device, before.shape, 0 if before.is_meta else before.data_ptr()
        if name in self._last:
            by, of, reference = self._last[name]
            if by() is fn and of == key and (kept := reference()) is not None:
                return kept
        self._last[name] = weakref.ref(fn), key, weakref.ref(after)
        return after

    def __deepcopy__(self, memo: dict) -> _Tie:
        return _Tie()

    def __reduce__(self):
        return _Tie, ()


def _description(qweight: QuantizedWeight, more: dict[str, int]) -> str:
    """Format, options and size."""
    held = {"format": qweight.format.name, "shape": list(qweight.shape), **dataclasses.asdict(qweight.format), **more}
    return json.dumps(held)


def _bytes(text: str, device: torch.device) -> Tensor:
    """Text in bytes: a tensor, which every kind of checkpoint can hold."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)


def _text(description: Tensor) -> str:
    return bytes(description.cpu().tolist()).decode(errors="replace")


def weight_of(module: Quantized, transposed: bool = False) -> Tensor:
    """``module.weight``, (K, N) if transposed."""
    from ..ops.quantized_linear import quantized_linear

    qweight = module.qweight
    values = (lambda: qweight.dequantize().T.contiguous()) if transposed else qweight.dequantize
    if torch.compiler.is_dynamo_compiling():
        return values()
    if module._weight is not None and module._weight[0] is qweight:
        return module._weight[1]
    exact = qweight.with_exact_tokens()
    linear = None if transposed else (lambda x, bias: quantized_linear(x, exact, bias))
    n, k = qweight.shape
    lazy = LazyWeight(
        (k, n) if transposed else (n, k), module.dtype, qweight.device, values, owner=module, linear=linear
    )
    if transposed:
        lazy._is_param = False  # PEFT's DoRA transposes it, and a parameter would have to stay one
    module._weight = qweight, lazy
    return lazy
