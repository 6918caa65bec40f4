"""Layers of transformers' caches that keep keys and values in buffers with room.

A new token is written where there is room for it, instead of copying the whole cache, and the step program works on the
same buffers as the modules. What is seen from outside (`keys`, `values`, lengths, masks, errors) is what transformers'
own layers show; a layer of theirs becomes one of these where it is (`buffered`), in any cache.

This module imports transformers; `_cache.py` imports it where a cache is at hand.
"""

# mypy: ignore-errors

from __future__ import annotations

import copy
import math
import mmap
import sys
from collections.abc import Callable, Sequence
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
    _coded = False  # whether these hold something else than keys and values as modules give them
    # Defaults of what `_buffers` sets, so that layers that transformers makes need no __init__ of ours.
    _k: Tensor | None = None
    _v: Tensor | None = None
    _own_begin = _own_end = 0
    _set_keys: Tensor | None = None
    _set_values: Tensor | None = None
    _lease: Any = None  # the description (`_cache.py`) that knows this layer as it is, and then has its lengths
    _row = 0  # its number there
    _parts_of: Any = None  # the description that has its buffers, whatever became of its lengths
    _lent = False  # whether a program has had the buffers: threads that lost their core may still write to them

    # ---- lengths ----------------------------------------------------------------------------------------------------

    def _drop(self) -> None:
        """What a description knows of it is no longer so."""
        if self._lease is not None:
            self._own_begin, self._own_end = self._lease.slots(self._row)
            self._lease.end()
            self._lease = None

    @property
    def _begin(self) -> int:
        return self._own_begin if self._lease is None else self._lease.slots(self._row)[0]

    @_begin.setter
    def _begin(self, begin: int) -> None:
        self._drop()
        self._own_begin = begin

    @property
    def _end(self) -> int:
        return self._own_end if self._lease is None else self._lease.slots(self._row)[1]

    @_end.setter
    def _end(self, end: int) -> None:
        self._drop()
        self._own_end = end

    def _keeps(self) -> int:
        """How many tokens it keeps; 0: all."""
        return 0

    # ---- keys and values --------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        return self._set_keys if self._k is None else self._views(self._begin)[0]

    @keys.setter
    def keys(self, x: Tensor | None) -> None:
        self._release()
        self._set_keys = x

    @property
    def values(self) -> Tensor | None:
        return self._set_values if self._v is None else self._views(self._begin)[1]

    @values.setter
    def values(self, x: Tensor | None) -> None:
        self._release()
        self._set_values = x

    def _release(self) -> None:
        """From buffers to two tensors."""
        self._drop()
        self._parts_of = None
        if self._k is not None:
            keys, values = self.keys, self.values
            self._settle()
            for name in self._names:
                setattr(self, name, None)
            self._set_keys, self._set_values = keys, values

    def _buffers(self, parts: Sequence[Tensor], length: int) -> None:
        """Takes buffers that hold so many tokens from their first slot on."""
        self._settle()
        self._parts_of = None
        for name, x in zip(self._names, parts, strict=True):
            setattr(self, name, x)
        self._begin, self._end = 0, length
        self._set_keys = self._set_values = None

    def _settle(self) -> None:
        if self._lent:
            settle()
            self._lent = False

    def _views(self, begin: int) -> tuple[Tensor, Tensor]:
        """Keys and values from a slot on, for somebody who may write to them."""
        if self._lent:
            settle()
            self._lent = self._lease is not None  # whose program writes again
        return self._k[:, :, begin : self._end], self._v[:, :, begin : self._end]

    def _places(self) -> tuple[int, ...]:
        return tuple([getattr(self, name).data_ptr() for name in self._names])

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
            kinds = self._kinds(
                *key_states.shape[:2], capacity, key_states.shape[3], value_states.shape[3], key_states.dtype
            )
            self._move([torch.empty(shape, dtype=dtype, device=key_states.device) for shape, dtype in kinds])
        self._drop()
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
        return self._views(self._begin)

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
        self._end = max(self._begin, self._end - tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._k is None or self._length() == 0 or torch.is_grad_enabled():
            return super().reorder_cache(beam_idx)
        self._move(self._like(self._k.shape[2] - self._begin, len(beam_idx)), beam_idx.to(self._k.device))

    # ---- copies -----------------------------------------------------------------------------------------------------

    def _rest(self) -> dict[str, Any]:
        """What else transformers' layer has, by its names."""
        return {name: x for name, x in self.__dict__.items() if name not in OURS}

    def _restore(self, rest: dict[str, Any]) -> None:
        self.__dict__.update(rest)

    def _copy(self, rest: dict[str, Any], tensors: dict[str, Any]) -> Any:
        new = object.__new__(type(self))
        new._restore(rest)
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

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():  # operators are gone by then, and so are threads
            self._drop()
            self._settle()


OURS = {"_k", "_v", "_k_scale", "_v_scale", "_own_begin", "_own_end", "_set_keys", "_set_values", "_lease", "_row",
        "_parts_of", "_lent", "_own_seen", "_own_record"}  # fmt: skip


class BufferedSlidingWindowLayer(BufferedLayer, DynamicSlidingWindowLayer):
    """The window is the last slots in use; those before it are given up when there is no more room."""

    _own_class = DynamicSlidingWindowLayer
    _own_seen, _own_record = 0, False

    @property
    def cumulative_length(self) -> int:
        return self._own_seen if self._lease is None else self._lease.past

    @cumulative_length.setter
    def cumulative_length(self, tokens: int) -> None:
        self._drop()
        self._own_seen = tokens

    @property
    def record_past(self) -> bool:
        return self._own_record

    @record_past.setter
    def record_past(self, record: bool) -> None:
        if record != self._own_record:
            self._drop()
            self._own_record = record

    def _drop(self) -> None:
        if self._lease is not None:
            self._own_seen = self._lease.past
        super()._drop()

    def _keeps(self) -> int:
        return 0 if self.record_past or self.sliding_window < 2 else self.sliding_window - 1

    def _rest(self) -> dict[str, Any]:
        return super()._rest() | {"cumulative_length": self.cumulative_length, "record_past": self.record_past}

    def _restore(self, rest: dict[str, Any]) -> None:
        self.__dict__.update({_OWN.get(name, name): x for name, x in rest.items()})

    def _appended(self, tokens: int) -> tuple[Tensor, Tensor]:
        self._end += tokens
        begin = self._begin
        if self.record_past:
            begin = max(begin, self._end - (self.sliding_window - 1 + tokens))
        seen = self._views(begin)
        self._moved(tokens)
        return seen

    def _moved(self, tokens: int) -> None:
        self.cumulative_length += tokens
        if keeps := self._keeps():
            self._begin = max(self._begin, self._end - keeps)

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
            self._begin = max(self._begin, self._end - (self.sliding_window - 1))


BUFFERED = {DynamicLayer: BufferedLayer, DynamicSlidingWindowLayer: BufferedSlidingWindowLayer}


# What are properties here, by transformers' names.
_OWN = {"keys": "_set_keys", "values": "_set_values", "cumulative_length": "_own_seen", "record_past": "_own_record"}


def buffered(layer: Any, kinds: dict[type, type] = BUFFERED) -> None:
    """Makes a layer of transformers' one of these, where it is."""
    held = layer.__dict__
    for name, own in _OWN.items():
        if name in held:
            held[own] = held.pop(name)
    layer.__class__ = kinds[type(layer)]


def _alone() -> int:
    x = torch.empty(1, dtype=torch.uint8, device="cpu")
    return storage_users(x.untyped_storage()._cdata)


ALONE = _alone()  # users of a storage that one tensor has, as counted in `_unshare`
