"""What a cache of transformers is to a step program: where its keys and values lie, or why they cannot be used.

Layers of dynamic caches become layers with room (`_cache_layers.py`), those of static caches are used as they are. What
was found is kept as long as nobody changes the cache, so that a token costs a few microseconds here.
"""

# mypy: ignore-errors

from __future__ import annotations

import ctypes
import functools
import weakref
from array import array
from collections.abc import Callable, Sequence
from ctypes import addressof, c_int64, sizeof
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._load import cpu_library
from ..ops.program import settle
from . import _records as records

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FIELDS = sizeof(records.LayerCache) // 8
_VALID, _PAST, _ROOM = range(3)  # words of a CacheLease
_SLOTS = 3  # words of a CacheSlots
FIELD = {name: getattr(records.LayerCache, name).offset // 8 for name, _ in records.LayerCache._fields_}


class CacheShape(NamedTuple):
    """What a program keeps of a token in one layer: `groups` heads of d and dv elements; `window` keys are seen, the
    token's own included, 0: all."""

    groups: int
    d: int
    dv: int
    window: int = 0


class Description:
    """The layers of a cache for a run: `packed` is (layers, LayerCache) as int64, `past` the tokens it has seen, -1
    where none of its layers counts them.

    A run is inside `with description`, and `advance` takes its new tokens in. The runner copies `packed` when a run
    begins. Dynamic layers that it describes have no lengths of their own: they ask here (`slots`), until somebody
    changes them.

    Attributes:
        lease: a CacheLease of csrc/cpu/cache_lease.cpp.
    """

    def __init__(self, shapes: Sequence[CacheShape | None], batch: int, dtype: torch.dtype, past: int):
        self.shapes, self.batch, self.dtype = shapes, batch, dtype
        self.packed = torch.zeros((len(shapes), FIELDS), dtype=torch.int64, device="cpu")
        self.numbers = (c_int64 * (len(shapes) * FIELDS)).from_address(self.packed.data_ptr())
        self._slots = array("q", bytes(8 * _SLOTS * len(shapes)))  # of each layer its begin, end and window
        addresses = self.packed.data_ptr(), self._slots.buffer_info()[0]
        self.lease = array("q", (1, past, 1 << 62, len(shapes), *addresses))
        self.dynamic: list[int] = []  # the `id` of each layer, which ends this when it goes; 0 of a static one
        self.others: list[tuple[int, Any, bool]] = []  # that the model's own code keeps, and whether they count tokens
        self.static: list[tuple[int, Any, Tensor, Tensor, Tensor, c_int64]] = []
        self._places: list[tuple] = []  # where the buffers of each layer lie, which `share_memory_` moves

    def __enter__(self) -> Description:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Threads that lost their core may write the run's tokens again. Dynamic layers wait for them when it could be
        seen; static ones do not know when their owner resets, crops or edits them, and a run that failed leaves slots
        to other tokens.
        """
        if self.static or kind is not None:
            settle()

    @property
    def past(self) -> int:
        return self.lease[_PAST]

    @past.setter
    def past(self, tokens: int) -> None:
        self.lease[_PAST] = tokens

    @property
    def room(self) -> int:
        return self.lease[_ROOM]

    def slots(self, index: int) -> tuple[int, int]:
        """Where the tokens of a layer begin and end in its buffers."""
        return self._slots[_SLOTS * index], self._slots[_SLOTS * index + 1]

    def end(self) -> None:
        """A layer is no longer as it is described."""
        self.lease[_VALID] = 0

    def fits(self, cache: Any, tokens: int) -> bool:
        """Whether the cache is as it was left here, with room for more."""
        lease, layers, past = self.lease, cache.layers, self.past
        if not lease[_VALID] or tokens > lease[_ROOM] or len(layers) < len(self.dynamic):
            return False
        for mine, place, layer in zip(self.dynamic, self._places, layers, strict=False):
            if mine and (mine != id(layer) or layer._places() != place):
                return False
        for i, layer, counts in self.others:
            if layers[i] is not layer or (counts and layer.get_seq_length() != past):
                return False
        for i, layer, k, v, length, number in self.static:
            if layers[i] is not layer or layer.keys is not k or layer.values is not v:
                return False
            if layer.cumulative_length is not length or _places(layer) != self._places[i] or number.value != past:
                return False
            if layer.is_sliding and layer.cumulative_length_int != past:
                return False
        return True

    def advance(self, tokens: int) -> None:
        """The run has written so many tokens."""
        _advance()(self.lease.buffer_info()[0], tokens)
        for _, layer, _, _, _, number in self.static:
            number.value += tokens
            if layer.is_sliding:
                layer.cumulative_length_int += tokens

    def renew(self, cache: Any) -> bool:
        """Whether all that happened to the layers is that each lost its last tokens, as after a draft that was wrong:
        then they are known again.
        """
        layers = cache.layers
        if self.static or self.others or len(layers) < len(self.dynamic):
            return False
        lengths = set()
        for i, (mine, layer) in enumerate(zip(self.dynamic, layers, strict=False)):
            if mine != id(layer) or layer._parts_of is not self or layer._row != i:
                return False
            begin, end = layer._begin, layer._end
            if (begin, layer._keeps()) != (self._slots[_SLOTS * i], self._slots[_SLOTS * i + 2]) or end < begin:
                return False
            lengths.add((layer.get_seq_length(), self._slots[_SLOTS * i + 1] - end))
        if len(lengths) != 1 or (change := lengths.pop())[1] < 0 or self.past - change[0] != change[1]:
            return False
        past, lost = change
        self.lease[_PAST], self.lease[_ROOM], self.lease[_VALID] = past, self.room + lost, 1
        for i, layer in enumerate(layers[: len(self.dynamic)]):
            self._slots[_SLOTS * i + 1] -= lost
            self.numbers[i * FIELDS + FIELD["held"]] -= lost
            layer._lease, layer._lent = self, True
        return True

    def take(self, layer: Any, index: int, window: int) -> None:
        """A dynamic layer, which keeps `window` tokens where that is not 0, gives its lengths to this."""
        layer._drop()
        begin, end = layer._begin, layer._end
        self._slots[_SLOTS * index : _SLOTS * (index + 1)] = array("q", (begin, end, window))
        self.add(index, layer, layer._k, layer._v, begin, end - begin)
        layer._lease, layer._row, layer._lent, layer._parts_of = self, index, True, self

    def skip(self, index: int) -> None:
        """A layer that no record reads or writes."""
        row = records.LayerCache.from_address(addressof(self.numbers) + index * FIELDS * 8)
        row.k = row.v = self.packed.data_ptr()
        row.capacity = 1 << 40

    def add(self, index: int, layer: Any, k: Tensor, v: Tensor, begin: int, held: int) -> None:
        """A layer whose tokens are slots [begin, begin + held) of k (B, H, slots, d) and v."""
        row = records.LayerCache.from_address(addressof(self.numbers) + index * FIELDS * 8)
        row.k, row.v = k[:, :, begin:].data_ptr(), v[:, :, begin:].data_ptr()
        row.k_batch, row.k_head, row.k_token, _ = k.stride()
        row.v_batch, row.v_head, row.v_token, _ = v.stride()
        row.held, row.capacity, row.type = held, k.shape[2] - begin, TYPES.get(k.dtype, TYPES[self.dtype])
        if k.dtype == torch.int8:
            scales = [x[:, :, begin:] for x in (layer._k_scale, layer._v_scale)]
            row.bits, (row.k_scale, row.v_scale) = 8, (x.data_ptr() for x in scales)
            row.scale_batch, row.scale_head, _ = scales[0].stride()
        self.lease[_ROOM] = min(self.room, row.capacity - held)


@functools.cache
def _advance() -> Callable[[int, int], None]:
    """`bk_cache_advance` of csrc/cpu/cache_lease.cpp."""
    function = ctypes.CDLL(str(cpu_library().path)).bk_cache_advance
    function.restype, function.argtypes = None, (ctypes.c_void_p, c_int64)
    return function


def counts(layer: Any) -> bool:
    """Whether a layer of the cache knows how many tokens it has seen."""
    from transformers.cache_utils import CacheLayerMixin

    return isinstance(layer, CacheLayerMixin)


known: weakref.WeakKeyDictionary[Any, Description] = weakref.WeakKeyDictionary()


def describe(
    cache: Any, shapes: Sequence[CacheShape | None], batch: int, tokens: int, dtype: torch.dtype
) -> Description | str:
    """The cache with room for `tokens` more of `batch` sequences, or why the program cannot use it.

    Args:
        cache: transformers' `Cache`.
        shapes: of the program's layers, whose numbers are those of the cache's; None for those of the model's own code.
        dtype: of the model, which the cache has to have.
    """
    try:
        description = known.get(cache)
    except TypeError:  # no weak references
        return f"the cache is a {type(cache).__name__}"
    if description is not None:
        if description.shapes is shapes and description.batch == batch and description.dtype is dtype:
            if description.fits(cache, tokens) or (description.renew(cache) and description.fits(cache, tokens)):
                return description
    description = _look(cache, shapes, batch, tokens, dtype)
    if isinstance(description, Description):
        known[cache] = description
    return description


def _look(
    cache: Any, shapes: Sequence[CacheShape | None], batch: int, tokens: int, dtype: torch.dtype
) -> Description | str:
    from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

    from . import _cache_layers

    if not isinstance(cache, Cache):
        return f"the cache is a {type(cache).__name__}"
    for name in ("update", "get_seq_length", "get_mask_sizes", "get_query_offset"):
        if getattr(type(cache), name) is not getattr(Cache, name) or name in cache.__dict__:
            return f"the cache has its own `{name}`"
    if cache.offloading:
        return "the cache is offloaded"
    if dtype not in TYPES:
        return f"a cache in {dtype}"
    layers = cache.layers
    if cache.layer_class_to_replicate is not None:
        while len(layers) < len(shapes):
            layers.append(cache.layer_class_to_replicate())
    if len(layers) < len(shapes):
        return f"the cache has {len(layers)} layers, and the model {len(shapes)}"
    pasts = set()
    for i, (layer, shape) in enumerate(zip(layers, shapes, strict=False)):
        of = type(layer)
        if "update" in layer.__dict__:
            return f"layer {i} of the cache has its own `update`"
        if shape is None:
            if counts(layer):
                pasts.add(int(layer.get_seq_length()))
            continue
        if of in _cache_layers.BUFFERED:
            _cache_layers.buffered(layer)
        if isinstance(layer, _cache_layers.BufferedLayer):
            reason = _dynamic(layer, shape, batch, dtype)
        elif of is StaticLayer or of is StaticSlidingWindowLayer:
            if not layer.is_initialized:
                new = (torch.empty((batch, shape.groups, 0, n), dtype=dtype, device="cpu") for n in (shape.d, shape.dv))
                layer.lazy_initialization(*new)
            reason = _static(layer, shape, batch, tokens, dtype)
        else:
            reason = f"it is a {of.__name__}"
        if reason:
            return f"layer {i} of the cache: {reason}"
        pasts.add(int(layer.get_seq_length()))
    if len(pasts) > 1:
        return "the layers of the cache have different lengths"
    unknown = -1 if not all(map(counts, layers)) else 0  # where nobody counts
    description = Description(shapes, batch, dtype, pasts.pop() if pasts else unknown)
    pairs = [(layer, shape) for layer, shape in zip(layers, shapes, strict=False) if shape is not None]
    _make_room([p for p in pairs if isinstance(p[0], _cache_layers.BufferedLayer)], batch, tokens, dtype)
    for i, layer in enumerate(layers[: len(shapes)]):
        if shapes[i] is None:
            description.dynamic.append(0)
            description._places.append(())
            description.skip(i)
            description.others.append((i, layer, counts(layer)))
            continue
        if isinstance(layer, _cache_layers.BufferedLayer):
            description.dynamic.append(id(layer))
            description.take(layer, i, layer._keeps())
            description._places.append(layer._places())
            continue
        description.dynamic.append(0)
        description.add(i, layer, layer.keys, layer.values, 0, description.past)
        description._slots[_SLOTS * i + 1] = description.past
        length = layer.cumulative_length
        description._places.append(_places(layer))
        description.static.append((i, layer, layer.keys, layer.values, length, c_int64.from_address(length.data_ptr())))
    return description


def _places(layer: Any) -> tuple:
    """Of a static layer: where its tensors lie, and how large they are."""
    k, v = layer.keys, layer.values
    return k.data_ptr(), v.data_ptr(), layer.cumulative_length.data_ptr(), k.shape, v.shape


def _unlike(keys: Any, values: Any, shape: CacheShape, batch: int, dtype: torch.dtype) -> str | None:
    """What is not as the program's own keys and values would be."""
    for name, x, size in (("keys", keys, shape.d), ("values", values, shape.dv)):
        if type(x) is not Tensor or x.device.type != "cpu" or x.layout != torch.strided:
            return f"its {name} are no plain tensors on the CPU"
        if x.dtype != dtype:
            return f"its {name} are {x.dtype}, and the model's {dtype}"
        if x.requires_grad:
            return f"its {name} have gradients"
        if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, shape.groups, size):
            return f"its {name} have shape {tuple(x.shape)}, which is not that of the model's"
    if keys.shape[2] != values.shape[2]:
        return "it has more keys than values, or fewer"
    return None


def _dynamic(layer: Any, shape: CacheShape, batch: int, dtype: torch.dtype) -> str | None:
    window = getattr(layer, "sliding_window", 0)
    if window and (window != shape.window or window < 2):
        return f"it keeps a window of {window} tokens, and the model sees {shape.window or 'all'}"
    if layer._k is not None and layer._coded:
        reason = _unlike(layer._k, layer._v, shape, batch, layer._k.dtype)
        if not reason and layer.dtype != dtype:
            reason = f"its values are {layer.dtype}, and the model's {dtype}"
    elif not layer.is_initialized or (layer.keys is not None and layer.keys.dim() == 1 and not layer.keys.numel()):
        return None
    else:
        reason = _unlike(layer.keys, layer.values, shape, batch, dtype)
    if not reason and window:
        kept = min(layer.cumulative_length, window - 1)
        if not kept <= layer._length() <= layer.cumulative_length:
            return "it does not have the tokens of its window"
    return reason


def _static(layer: Any, shape: CacheShape, batch: int, tokens: int, dtype: torch.dtype) -> str | None:
    if reason := _unlike(layer.keys, layer.values, shape, batch, dtype):
        return reason
    if layer.keys.stride(3) != 1 or layer.values.stride(3) != 1:
        return "its heads are not contiguous"
    past = int(layer.get_seq_length())
    if past + tokens > layer.keys.shape[2]:
        return f"it has room for {layer.keys.shape[2]} tokens"
    length = layer.cumulative_length
    if type(length) is not Tensor or length.dtype != torch.int64 or length.device.type != "cpu" or length.numel() != 1:
        return "its length is no number on the CPU"
    if layer.is_sliding and (shape.window == 0 or past != int(length)):
        return "it is a window that has moved, or is one where the model sees all"
    return None


def _make_room(layers: Sequence[tuple[Any, CacheShape]], batch: int, tokens: int, dtype: torch.dtype) -> None:
    """Buffers for the layers that lack room, made together."""
    from ._cache_layers import room_for, side_by_side

    layers = [(layer, shape) for layer, shape in layers if not layer._has_room(tokens)]
    kinds = []
    for layer, shape in layers:
        capacity = room_for(layer._length() + tokens)
        kinds.append(layer._kinds(batch, shape.groups, capacity, shape.d, shape.dv, dtype))
    made = iter(side_by_side([kind for of in kinds for kind in of]))
    for (layer, shape), of in zip(layers, kinds, strict=True):
        if not layer.is_initialized:
            new = (torch.empty((batch, shape.groups, 0, n), dtype=dtype, device="cpu") for n in (shape.d, shape.dv))
            layer.lazy_initialization(*new)
        layer._move([next(made) for _ in of])
