"""Layers of transformers' caches that keep keys and values in buffers with room.

A new token is written where there is room for it, instead of copying the whole cache, and the step program works on the
same buffers as the modules. What is seen from outside (`keys`, `values`, lengths, masks, errors) is what transformers'
own layers show; a layer of theirs becomes one of these where it is (`buffered`), in any cache.

This module imports transformers; `_cache.py` imports it where a cache is at hand.
"""

from __future__ import annotations

import copy
import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .._torch_private import storage_users, transforms
from ..ops.program import settle

STEP = 64  # buffers grow to multiples of it, by a quarter and two steps more than is needed


def room_for(tokens: int) -> int:
    return (tokens + tokens // 4 + 3 * STEP - 1) // STEP * STEP


SLAB = 16 << 20  # bytes
HUGE = 4 << 20  # bytes from which on memory is asked for in huge pages


Kind = tuple[tuple[int, ...], torch.dtype]  # of a buffer


def side_by_side(kinds: Sequence[Kind]) -> list[Tensor]:
    """Uninitialized tensors, each of a storage of its own. Several share a piece of memory on huge pages where the
    system has them: a cache that is read at each token would else be twice as slow for the translation of addresses.
    """
    out, waiting, size = [], [], 0

    def make() -> None:
        if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            out.extend(torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype, _ in waiting)
        else:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            try:
                memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # it is advice
            for shape, dtype, at in waiting:
                flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=at)
                out.append(flat.view(shape))

    for shape, dtype in kinds:
        waiting.append((shape, dtype, size))
        size += -(-math.prod(shape) * dtype.itemsize // 64) * 64
        if size >= SLAB:
            make()
            waiting, size = [], 0
    make()
    return out


class BufferedLayer(DynamicLayer):
    """Its keys and values are slots [begin, end) of two buffers, or two tensors as somebody has set them."""

    _own_class: type[DynamicLayer] = DynamicLayer  # as which it is pickled
    _names = ("_k", "_v")  # of its buffers, (B, H, slots, ...)
    # Defaults of what `_buffers` sets, so that layers that transformers makes need no __init__ of ours.
    _k: Tensor | None = None
    _v: Tensor | None = None
    _begin = _end = 0
    _set_keys: Tensor | None = None
    _set_values: Tensor | None = None
    _stamp: object = None  # of the description (`_cache.py`) that knows this layer as it is
    _lent = False  # whether a program has had the buffers: threads that lost their core may still write to them

    # ---- keys and values --------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        return self._set_keys if self._k is None else self._k[:, :, self._begin : self._end]

    @keys.setter
    def keys(self, x: Tensor | None) -> None:
        self._release()
        self._set_keys = x

    @property
    def values(self) -> Tensor | None:
        return self._set_values if self._v is None else self._v[:, :, self._begin : self._end]

    @values.setter
    def values(self, x: Tensor | None) -> None:
        self._release()
        self._set_values = x

    def _release(self) -> None:
        """From buffers to two tensors."""
        self._stamp = None
        if self._k is not None:
            keys, values = self.keys, self.values
            self._settle()
            for name in self._names:
                setattr(self, name, None)
            self._set_keys, self._set_values = keys, values

    def _buffers(self, parts: Sequence[Tensor], length: int) -> None:
        """Takes buffers that hold so many tokens from their first slot on."""
        self._settle()
        for name, x in zip(self._names, parts, strict=True):
            setattr(self, name, x)
        self._begin, self._end = 0, length
        self._set_keys = self._set_values = self._stamp = None

    def _settle(self) -> None:
        if self._lent:
            settle()
            self._lent = False

    def _length(self) -> int:
        """Tokens that are stored."""
        if self._k is not None:
            return self._end - self._begin
        return self._set_keys.shape[-2] if self._set_keys is not None and self._set_keys.dim() > 1 else 0

    def _has_room(self, tokens: int) -> bool:
        if self._k is None or self._end + tokens > self._k.shape[2]:
            return False
        return not self._k.is_inference() or torch.is_inference_mode_enabled()

    def _kinds(self, batch: int, groups: int, capacity: int, d: int, dv: int, dtype: torch.dtype) -> list[Kind]:
        return [((batch, groups, capacity, n), dtype) for n in (d, dv)]

    def _move(self, parts: Sequence[Tensor], beams: Tensor | None = None) -> None:
        """Into other buffers with what is there, or with rows `beams` of it."""
        length = self._length()
        if self._k is not None:
            for name, new in zip(self._names, parts, strict=True):
                old = getattr(self, name)[:, :, self._begin : self._end]
                if beams is None:
                    new[:, :, :length].copy_(old)
                else:
                    torch.index_select(old, 0, beams, out=new[:, :, :length])
        elif length:
            self._write(parts, 0, self._set_keys, self._set_values)
        self._buffers(parts, length)

    def _write(self, parts: Sequence[Tensor], at: int, k: Tensor, v: Tensor) -> None:
        """Tokens into slots from `at` on."""
        for part, x in zip(parts, (k, v), strict=True):
            part[:, :, at : at + x.shape[2]].copy_(x)

    def _like(self, capacity: int, batch: int = 0) -> list[Tensor]:
        """Empty buffers of another size, or for another batch."""
        parts = (getattr(self, name) for name in self._names)
        return [x.new_empty((batch or x.shape[0], x.shape[1], capacity, *x.shape[3:])) for x in parts]

    def _unshare(self) -> None:
        """Before slots are written again: not under the eyes of those who hold views of them."""
        if any(storage_users(x.untyped_storage()._cdata) > ALONE for x in (self._k, self._v)):
            self._move(self._like(self._k.shape[2] - self._begin))
        else:
            self._settle()

    # ---- what transformers calls ------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._appends(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        tokens = key_states.shape[2]
        if not self._has_room(tokens):
            capacity = room_for(self._length() + tokens)
            kinds = self._kinds(*key_states.shape[:2], capacity, key_states.shape[3], value_states.shape[3],
                                key_states.dtype)  # fmt: skip
            self._move([torch.empty(shape, dtype=dtype, device=key_states.device) for shape, dtype in kinds])
        self._stamp = None
        self._write([getattr(self, name) for name in self._names], self._end, key_states, value_states)
        return self._appended(tokens)

    def _appends(self, k: Tensor, v: Tensor) -> bool:
        """Whether new tokens can be written behind those that are there. Autograd, which remembers what it has read,
        and tracing get tensors of their own."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms() is not None:
            return False
        if not (type(k) is type(v) is Tensor and k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3]):
            return False
        if k.dtype != v.dtype or k.device != v.device:
            return False
        return self._continues(k, v)

    def _continues(self, k: Tensor, v: Tensor) -> bool:
        """Whether new tokens are of the kind of those that are there."""
        keys, values = (self._set_keys, self._set_values) if self._k is None else (self._k, self._v)
        for new, old in ((k, keys), (v, values)):
            if type(old) is not Tensor or new.dtype != old.dtype or new.device != old.device:
                return False
            if old.dim() == 4:
                if (*old.shape[:2], old.shape[3]) != (*new.shape[:2], new.shape[3]):
                    return False
            elif old.numel():
                return False
        return keys.dim() == values.dim() and keys.shape[:-1] == values.shape[:-1]

    def _appended(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The layer moves on by tokens that are written; returns what the new ones see."""
        self._end += tokens
        return self.keys, self.values

    def get_seq_length(self) -> int:
        if self._k is None:
            return super().get_seq_length()
        return self._end - self._begin if self.is_initialized and self._k.numel() else 0

    def crop(self, tokens_to_remove: int) -> None:
        if self._k is None or tokens_to_remove >= 0 or not self.is_initialized:
            return super().crop(tokens_to_remove)
        self._cut(-tokens_to_remove)

    def _cut(self, tokens: int) -> None:
        self._unshare()
        self._stamp = None
        self._end = max(self._begin, self._end - tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._k is None or self._length() == 0 or torch.is_grad_enabled():
            return super().reorder_cache(beam_idx)
        self._move(self._like(self._k.shape[2] - self._begin, len(beam_idx)), beam_idx.to(self._k.device))

    # ---- copies -----------------------------------------------------------------------------------------------------

    def _rest(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name not in OURS}

    def _copy(self, rest: dict[str, Any], tensors: dict[str, Any]) -> Any:
        new = object.__new__(type(self))
        new.__dict__.update(rest)
        if self._k is not None:
            length = self._length()
            parts = self._like(room_for(length))
            for name, x in zip(self._names, parts, strict=True):
                x[:, :, :length].copy_(getattr(self, name)[:, :, self._begin : self._end])
            new._buffers(parts, length)
        else:
            new._set_keys, new._set_values = tensors["keys"], tensors["values"]
        return new

    def __copy__(self) -> Any:
        return self._copy(self._rest(), {"keys": self._set_keys, "values": self._set_values})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        loose = {"keys": self._set_keys, "values": self._set_values}
        new = self._copy(copy.deepcopy(self._rest(), memo), copy.deepcopy(loose, memo))
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: int) -> tuple:
        """As transformers' own layer, which any process knows."""
        tensors = {name: getattr(self, name) for name in ("keys", "values")}
        if self._k is not None:
            tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
        return object.__new__, (self._own_class,), self._rest() | tensors

    def __del__(self) -> None:
        if not sys.is_finalizing():  # operators are gone by then, and so are threads
            self._settle()


OURS = {"_k", "_v", "_k_scale", "_v_scale", "_begin", "_end", "_set_keys", "_set_values", "_stamp", "_lent"}


class BufferedSlidingWindowLayer(BufferedLayer, DynamicSlidingWindowLayer):
    """The window is the last slots in use; those before it are given up when there is no more room."""

    _own_class = DynamicSlidingWindowLayer

    def _appended(self, tokens: int) -> tuple[Tensor, Tensor]:
        self._end += tokens
        begin = self._begin
        if self.record_past:
            begin = max(begin, self._end - (self.sliding_window - 1 + tokens))
        seen = self._views(begin)
        self._moved(tokens)
        return seen

    def _views(self, begin: int) -> tuple[Tensor, Tensor]:
        return self._k[:, :, begin : self._end], self._v[:, :, begin : self._end]

    def _moved(self, tokens: int) -> None:
        self.cumulative_length += tokens
        if not self.record_past and self.sliding_window > 1:
            self._begin = max(self._begin, self._end - (self.sliding_window - 1))

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        full = self.cumulative_length >= self.sliding_window
        if self._k is None or tokens_to_remove > 0 or (full and not self.record_past):
            return DynamicSlidingWindowLayer.crop(self, tokens_to_remove)
        if not full:
            if tokens_to_remove < 0 and self.is_initialized:
                self._cut(-tokens_to_remove)
            self.cumulative_length = self._end - self._begin
            return
        if tokens_to_remove:
            self._cut(-tokens_to_remove)
            self.cumulative_length += tokens_to_remove
        if self.sliding_window > 1:
            self._stamp = None
            self._begin = max(self._begin, self._end - (self.sliding_window - 1))


BUFFERED = {DynamicLayer: BufferedLayer, DynamicSlidingWindowLayer: BufferedSlidingWindowLayer}


def buffered(layer: Any) -> None:
    """Makes a layer of transformers' one of these, where it is."""
    keys, values = layer.__dict__.pop("keys", None), layer.__dict__.pop("values", None)
    layer.__class__ = BUFFERED[type(layer)]
    layer._set_keys, layer._set_values = keys, values


def _alone() -> int:
    x = torch.empty(1, dtype=torch.uint8, device="cpu")
    return storage_users(x.untyped_storage()._cdata)


ALONE = _alone()  # users of a storage that one tensor has, as counted in `_unshare`
