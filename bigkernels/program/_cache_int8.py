"""A cache of transformers' whose keys and values are int8 codes with a scale a token and head, or of another dtype than
the model's.

The step program reads them as they are; modules get their values, as copies. This module imports transformers.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ._cache import TYPES
from ._cache_layers import _OWN, BufferedLayer, BufferedSlidingWindowLayer, Kind, buffered


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., d) as codes and scales (...): the largest magnitude is 127. A head that is not finite has no scale."""
    x = x.float()
    most = x.abs().amax(-1, keepdim=True)
    scale = torch.where(most.isfinite(), most / 127.0, torch.nan)
    codes = torch.where(scale > 0, x / scale, 0.0).round().clamp(-127, 127)
    return codes.to(torch.int8), scale.squeeze(-1)


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scale[..., None]).to(dtype)


class CodedLayer(BufferedLayer):
    """Its buffers are not what modules give and get: those get copies, in the dtype that they gave."""

    _coded = True
    dtype: torch.dtype  # of the values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.dtype = key_states.dtype

    def _seen(self, name: str, begin: int) -> Tensor:
        """The values of a buffer from a slot on."""
        raise NotImplementedError

    def _views(self, begin: int) -> tuple[Tensor, Tensor]:
        return self._seen("_k", begin), self._seen("_v", begin)

    @property
    def keys(self) -> Tensor | None:
        return self._set_keys if self._k is None else self._seen("_k", self._begin)

    @keys.setter
    def keys(self, x: Tensor | None) -> None:
        self._release()
        self._set_keys = x

    @property
    def values(self) -> Tensor | None:
        return self._set_values if self._v is None else self._seen("_v", self._begin)

    @values.setter
    def values(self, x: Tensor | None) -> None:
        self._release()
        self._set_values = x

    def _continues(self, k: Tensor, v: Tensor) -> bool:
        if self._k is None:
            return super()._continues(k, v)
        if k.dtype != self.dtype or k.device != self._k.device:
            return False
        return all((*a.shape[:2], a.shape[3]) == (*b.shape[:2], b.shape[3]) for a, b in ((k, self._k), (v, self._v)))

    def __reduce_ex__(self, protocol: int) -> tuple:
        state = {_OWN.get(name, name): x for name, x in self._rest().items()}
        if self._k is not None:
            parts = {name: getattr(self, name)[:, :, self._begin : self._end].clone() for name in self._names}
            state |= parts | {"_own_begin": 0, "_own_end": self._length()}
        else:
            state |= {"_set_keys": self._set_keys, "_set_values": self._set_values}
        return object.__new__, (type(self),), state


class Int8Layer(CodedLayer):
    _names = ("_k", "_v", "_k_scale", "_v_scale")
    _k_scale: Tensor | None = None
    _v_scale: Tensor | None = None

    def _seen(self, name: str, begin: int) -> Tensor:
        codes, scale = (getattr(self, x)[:, :, begin : self._end] for x in (name, name + "_scale"))
        return decode(codes, scale, self.dtype)

    def _kinds(self, batch: int, groups: int, capacity: int, d: int, dv: int, dtype: torch.dtype) -> list[Kind]:
        slots = (batch, groups, capacity)
        codes: list[Kind] = [((*slots, n), torch.int8) for n in (d, dv)]
        return codes + [(slots, torch.float32)] * 2

    def _write(self, parts: Any, at: int, k: Tensor, v: Tensor) -> None:
        for codes, scales, x in zip(parts[:2], parts[2:], (k, v), strict=True):
            new, scale = encode(x)
            codes[:, :, at : at + x.shape[2]].copy_(new)
            scales[:, :, at : at + x.shape[2]].copy_(scale)


class Int8SlidingWindowLayer(Int8Layer, BufferedSlidingWindowLayer):
    pass


class CastLayer(CodedLayer):
    """Numbers of another dtype than the model's."""

    kept: torch.dtype

    def _seen(self, name: str, begin: int) -> Tensor:
        return getattr(self, name)[:, :, begin : self._end].to(self.dtype, copy=True)

    def _kinds(self, batch: int, groups: int, capacity: int, d: int, dv: int, dtype: torch.dtype) -> list[Kind]:
        return super()._kinds(batch, groups, capacity, d, dv, self.kept)


class CastSlidingWindowLayer(CastLayer, BufferedSlidingWindowLayer):
    pass


INT8 = {DynamicLayer: Int8Layer, DynamicSlidingWindowLayer: Int8SlidingWindowLayer}
CAST = {DynamicLayer: CastLayer, DynamicSlidingWindowLayer: CastSlidingWindowLayer}


class Cache(DynamicCache):
    """A cache for any model of transformers', of int8 codes or of numbers.

    It goes wherever a `transformers.Cache` goes: `model(..., past_key_values=cache)`, `model.generate(...)`. With
    `bits=8` it takes about half of the memory of a 16-bit cache, d + 4 bytes for a head of d elements; each head of a
    token is rounded to 8 bits with a scale of its own. With `dtype` keys and values are rounded to that dtype, whatever
    the model computes in; a float32 model with `dtype=torch.bfloat16` has a cache of half the size. float16 ends at
    65504: what is larger becomes infinite.

    A patched model reads codes and numbers as they are. Modules get copies in their own dtype at each call. What is
    computed with gradients, or keys and values of two dtypes as autocast makes them, is not rounded.

    Args:
        model: a model or a configuration of transformers', for its number of layers and their windows.
        bits: 8, or None for numbers.
        dtype: of the numbers: torch.float32, torch.bfloat16 or torch.float16; None: as the model makes them.

    Raises:
        ValueError: for other `bits` and dtypes, for both at once, and for layers that keep something other than keys
            and values.
    """

    def __init__(self, model: Any, bits: int | None = None, dtype: torch.dtype | None = None):
        if bits not in (None, 8):
            raise ValueError(f"bigkernels.Cache: bits is {bits!r}; 8 is supported, and None for no codes")
        if dtype is not None and dtype not in TYPES:
            raise ValueError(f"bigkernels.Cache: dtype is {dtype!r}; float32, bfloat16 and float16 are supported")
        if bits and dtype:
            raise ValueError(f"bigkernels.Cache: codes of {bits} bits have no dtype; give bits or dtype")
        super().__init__(config=model.config if isinstance(model, nn.Module) else model)
        self.bits, self.kept = bits, dtype
        kinds, form = (INT8, "8-bit form") if bits else (CAST, f"form in {dtype}")
        for i, layer in enumerate(self.layers if bits or dtype else ()):
            if type(layer) not in kinds:
                raise ValueError(f"bigkernels.Cache: layer {i} is a {type(layer).__name__}, which has no {form}")
            buffered(layer, kinds)
            if dtype:
                layer.kept = dtype
