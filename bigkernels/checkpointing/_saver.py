"""Hooks that keep what autograd saves in another form: in 8 bits, elsewhere, or as the way to compute it again."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch_private import dispatch_modes, is_traceable_wrapper_subclass, without_dispatch_modes
from ..ops.arguments import is_dense
from ..ops.compress import decompress, encode
from ._places import Place, Slot
from ._policy import Code, Policy
from ._precise import Watch
from ._recomputable import recipe
from ._recompute import Exact

_LEAST = 4096  # values: smaller tensors are nothing to save
_STATISTICS = 16  # tensors this many times smaller than what is saved beside them are row statistics, and stay exact
_BESIDE = 6  # tensors of one node, that is
_PARTS = 4  # a view of a part is kept as the whole, of at most so many times its size: the rest is saved as well

_keys = itertools.count(1)  # of stochastic rounding: torch's generators belong to the model


class _Kept:
    """A run of memory that saved tensors are views of.

    Attributes:
        exact: whether it stays as it is; until `settle` that may change.
        flat: the values, as long as it may.
    """

    def __init__(self, flat: Tensor):
        self.users = 0
        self.ready: Tensor | None = None
        self.exact = self.stored = False
        self.flat: Exact | None = Exact(flat)

    def get(self) -> Tensor:
        """The values (n,); made once for all its users, if each asks once."""
        if self.flat is not None:
            return self.flat.get()
        flat = self.make() if self.ready is None else self.ready
        self.users -= 1
        self.ready = flat if self.users > 0 else None
        return flat

    def settle(self) -> None:
        """Whether it is exact is known now."""
        if self.flat is None or self.exact:
            return
        if not self.stored:
            self.store(self.flat.tensor)
            self.stored = True
        self.flat = None

    def store(self, flat: Tensor) -> None:
        """Keep what `make` needs."""

    def make(self) -> Tensor:
        raise NotImplementedError


class _Stored(_Kept):
    def __init__(self, flat: Tensor, code: Code | None, place: Place | None, slots: list[weakref.ref[Slot]]):
        super().__init__(flat)
        self.code, self.place, self.dtype, self.slots = code, place, flat.dtype, slots
        self.scale: Tensor | None = None

    def settle(self) -> None:
        if self.exact and self.flat is not None and self.place is not None:  # there it is exact, too
            self.stored = self.stored and self.scale is None  # in codes, for a node that can do with them
            self.exact, self.code, self.scale = False, None, None
        super().settle()

    def store(self, flat: Tensor) -> None:
        # Numbers beyond float32's range have no code, and on a GPU nobody waits to hear whether there are any.
        if self.code is not None and not (self.dtype == torch.float64 and flat.is_cuda):
            key = (next(_keys) * 0x9E3779B1) & 0x7FFFFFFF
            coded, scale = encode(flat, self.code.format, self.code.stochastic, key)
            if self.dtype == torch.float64 and type(scale) is Tensor and not bool(scale.isfinite().all()):
                flat = flat.clone() if self.place is None else flat
            else:
                flat, self.scale = coded, scale
        self.values = flat if self.place is None else self.place.put(flat)
        if isinstance(self.values, Slot):
            self.slots.append(weakref.ref(self.values))

    def make(self) -> Tensor:
        flat = self.values.get() if isinstance(self.values, Slot) else self.values
        return (
            flat
            if self.scale is None or self.code is None
            else decompress(flat, self.scale, self.code.format, dtype=self.dtype)
        )


class _Recomputed(_Kept):
    def __init__(self, run: Callable[[], Tensor], flat: Tensor):
        super().__init__(flat)
        self.run = run

    def make(self) -> Tensor:
        return _flat(self.run())


def _flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory, as a view."""
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


def is_parameter(t: Tensor) -> bool:
    """Whether it is a leaf with a gradient, a view of one, or autocast's copy of one."""
    base = t if t._base is None else t._base
    if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
        return True
    node = base.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return False
    source = node.next_functions[0][0]
    return source is not None and source.name() == "torch::autograd::AccumulateGrad"


class Packed(NamedTuple):
    """A saved tensor as a view of what is kept."""

    kept: _Kept
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


_last: Callable[[], Saver | None] = lambda: None  # noqa: E731  the segment that ran before


class Saver:
    """`pack` and `unpack` for `saved_tensors_hooks`, of one segment.

    A tensor that several nodes save is kept once, and so are views of one tensor. Parameters, `constants`, integers and
    small tensors stay as they are. Under its `watch`, so do tensors that backward divides by or compares.
    """

    def __init__(self, policy: Policy, constants: Iterable[Tensor] = ()):
        global _last
        self.code = policy.code
        self.place = None if policy.place is None else Place(policy.place)
        self.constants = {t.untyped_storage()._cdata for t in constants}
        self.sizes: deque[int] = deque(maxlen=_BESIDE)
        self.kept: dict[tuple, tuple[StorageWeakRef, int, _Kept]] = {}
        self.slots: list[weakref.ref[Slot]] = []
        self.watch: Watch | None = None
        self.before: Callable[[], Saver | None] | None = None  # of the segment before, whose tensors are fetched ahead
        if self.place is not None:
            self.before, _last = _last, weakref.ref(self)

    def pack(self, tensor: Tensor) -> Exact | Packed:
        if self.watch is None:
            return self._pack(tensor)
        self.watch.is_away = True
        try:
            if dispatch_modes() > 1:
                return self._pack(tensor)
            with without_dispatch_modes():  # it costs less than calls of a mode that does nothing
                return self._pack(tensor)
        finally:
            self.watch.is_away = False

    def _pack(self, tensor: Tensor) -> Exact | Packed:
        if not self._worth(tensor):
            return Exact(tensor)
        kept, stride, offset = self._keep(tensor)
        kept.users += 1
        return Packed(kept, tensor.shape, stride, offset)

    def unpack(self, packed: Exact | Packed) -> Tensor:
        if isinstance(packed, Exact):
            return packed.get()
        if self.place is not None and self.before is not None:
            # Backward has reached this segment; what it needs next is that of the segment before.
            before, self.before = self.before(), None
            if before is not None:
                before.fetch()
        kept, shape, stride, offset = packed
        flat = kept.get()
        return flat.as_strided(shape, stride, flat.storage_offset() + offset)  # what stayed has one of its own

    def fetch(self) -> None:
        for reference in reversed(self.slots):  # backward needs the last first
            slot = reference()
            if slot is not None:
                slot.fetch()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the operators whose tensors are put into codes."""
        if self.code is None:
            yield
            return
        with Watch() as self.watch:
            try:
                yield
            finally:
                self.watch = None

    def close(self) -> None:
        """The segment has run."""
        self.kept.clear()

    def _worth(self, t: Tensor) -> bool:
        if not t.is_floating_point() or t.layout != torch.strided or is_traceable_wrapper_subclass(t):
            return False
        self.sizes.append(t.numel())
        return not (
            t.numel() < _LEAST
            or (self.code is not None and (t.element_size() == 1 or t.numel() * _STATISTICS <= max(self.sizes)))
            or is_parameter(t)
            or t.untyped_storage()._cdata in self.constants
        )

    def _keep(self, t: Tensor) -> tuple[_Kept, tuple[int, ...], int]:
        """What keeps a tensor, and its stride and offset there."""
        flat, stride = t, t.stride()
        offset: Any = 0
        whole = t.untyped_storage().nbytes() // t.element_size()
        if is_dense(t):
            flat = _flat(t)
        elif whole <= _PARTS * t.numel():
            flat, offset = t.as_strided((whole,), (1,), 0), t.storage_offset()
        else:
            stride = torch.empty(t.shape, device="meta", dtype=torch.float32).stride()
        storage = t.untyped_storage()
        key = storage._cdata, flat.storage_offset(), flat.shape, flat.stride(), t.dtype
        held = self.kept.get(key)
        # The weak reference keeps another storage from getting this one's address.
        if held is None or held[1] != t._version:
            held = self.kept[key] = StorageWeakRef(storage), t._version, self._kept(t, flat)
        kept = held[2]
        if self.watch is None:
            kept.settle()
        elif not kept.exact or kept.flat is None:
            kept.exact, kept.flat = False, Exact(flat)  # it may have gone into codes before
            self.watch.hold(kept, storage._cdata)
        return kept, stride, offset

    def _kept(self, t: Tensor, flat: Tensor) -> _Kept:
        run = recipe(t) if self.code is not None and flat.numel() == t.numel() else None
        if run is not None:
            return _Recomputed(run, flat)
        return _Stored(flat.detach().reshape(-1), self.code, self.place, self.slots)
