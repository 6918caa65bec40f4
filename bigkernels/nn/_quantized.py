"""A weight in codes, as a module: what the modules that multiply with one share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..quantization import QuantizedWeight

_DESCRIPTION = "format"  # the buffer that says what the others are


class Quantized(nn.Module):
    """Holds the tensors of a weight (N, K) as buffers: they are saved, copied and moved as the model is, and keep their
    dtypes when it is cast. A state dict loads into a module of the same format and size alone.
    """

    def __init__(self, qweight: QuantizedWeight, **described: int) -> None:
        super().__init__()
        self.config, self.dtype = qweight.config, qweight.dtype
        self.out_features, self.in_features = qweight.shape
        for name, t in qweight.tensors.items():
            self.register_buffer(name, t)
        device = next(iter(qweight.tensors.values())).device
        self.register_buffer(_DESCRIPTION, _described(qweight, described).to(device))
        self._qweight: QuantizedWeight | None = None

    @property
    def qweight(self) -> QuantizedWeight:
        """The weight: its tensors are the buffers."""
        names = self.config.layout((self.out_features, self.in_features))
        tensors = {name: self._buffers[name] for name in names}
        held = self._qweight
        if held is None or any(held.tensors[name] is not t for name, t in tensors.items()):
            held = QuantizedWeight(self.config, (self.out_features, self.in_features), self.dtype, tensors)
            self._qweight = held
        return held

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_qweight": None}  # what it derived is made again

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        # Casts are for floating tensors: seen as bytes, ours are moved and nothing else.
        dtypes = {name: t.dtype for name, t in self._buffers.items()}
        for name, t in self._buffers.items():
            self._buffers[name] = t.view(torch.uint8)
        try:
            super()._apply(fn, recurse)
        finally:
            for name, t in self._buffers.items():
                self._buffers[name] = t.view(dtypes[name])
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        wrong = []
        for name, t in self._buffers.items():
            given = state_dict.get(prefix + name)
            if given is None:
                continue  # named as missing
            if (given.shape, given.dtype) != (t.shape, t.dtype):
                wrong.append(f"{prefix}{name} is {given.dtype} of shape {tuple(given.shape)}, expected {t.dtype} of "
                             f"shape {tuple(t.shape)}")  # fmt: skip
            elif name == _DESCRIPTION and not torch.equal(given.cpu(), t.cpu()):
                wrong.append(f"{prefix[:-1]} was saved as {_text(given)}, and is {_text(t)}")
        if wrong:
            errors += [f"bigkernels.nn.{type(self).__name__}: {message}" for message in wrong]
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def _described(qweight: QuantizedWeight, more: dict[str, int]) -> Tensor:
    """Format, options and size as text in bytes: a tensor, which every kind of checkpoint can hold."""
    held = {"format": qweight.config.name, "shape": list(qweight.shape), **dataclasses.asdict(qweight.config),
            **more}  # fmt: skip
    return torch.tensor(list(json.dumps(held).encode()), dtype=torch.uint8)


def _text(description: Tensor) -> str:
    return bytes(description.cpu().tolist()).decode(errors="replace")
