"""The records that the kernels work from (csrc/include/bigkernels/optimizer.h), for the parameters of one device.

A plan is made when a parameter gets its first state, and is good while parameters and states are where they were and
lie as they did, which every step looks at (`bigkernels/_look.py`): then it writes the addresses of the gradients and
nothing else.
"""

# mypy: ignore-errors

from __future__ import annotations

import operator
import struct
from array import array
from collections.abc import Callable, Iterator, MutableMapping
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .._look import Seen
from ._reference import Rule

CHUNK = 128 * 256  # kChunk
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}
ROUNDINGS = {"nearest": 0, "stochastic": 1, "kahan": 2}
_FLAGS = (
    ("maximize", 1),
    ("decoupled_weight_decay", 2),
    ("cautious", 4),
    ("amsgrad", 8),
    ("nesterov", 16),
    ("momentum", 32),
    ("centered", 64),
)


def real(t: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, a view."""
    return torch.view_as_real(t) if t.is_complex() else t


def local(t: Tensor) -> Tensor:
    """The part of a distributed tensor that is here; the elements as real numbers."""
    t = t.detach()
    return real(t.to_local() if hasattr(t, "to_local") else t)


def placed(g: Tensor, p: Tensor) -> Tensor:
    """A distributed gradient cut as its parameter is: that of a tensor parallel layer may be cut otherwise, or be a sum
    over ranks that nobody has taken."""
    if hasattr(g, "placements") and g.placements != p.placements:
        return g.redistribute(p.device_mesh, p.placements)
    return g


def gathered(p: Tensor, here: Tensor) -> Tensor:
    """All of a tensor that is cut as `p` is, from this rank's part."""
    from torch.distributed.tensor import DTensor

    shape = (*p.shape, *here.shape[p.dim() :])  # pairs of real numbers for complex ones
    stride = torch.empty(shape, dtype=here.dtype, device="meta").stride()
    return DTensor.from_local(here, p.device_mesh, p.placements, shape=shape, stride=stride).full_tensor()


def cut(p: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that is to be cut as `p` is."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(whole, p.device_mesh, [Replicate()] * p.device_mesh.ndim)
    return everywhere.redistribute(p.device_mesh, p.placements).to_local()


def dense(t: Tensor) -> bool:
    """Whether a tensor's elements fill a piece of memory, in whatever order."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def strides(t: Tensor) -> tuple[int, ...]:
    """The strides that say something about the order of elements."""
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)


def laid_out(t: Tensor, p: Tensor) -> bool:
    """Whether the elements of `t` lie in the order in which a kernel goes through those of the parameter `p`."""
    if t.shape != p.shape:
        return False
    here, there = local(t), local(p)
    return (
        here.is_contiguous()
        and (there.is_contiguous() or not dense(there))
        or (dense(here) and strides(here) == strides(there))
    )


def backed(t: Tensor) -> bool:
    """Whether there is memory for all elements: that of a storage can be given back behind its tensors."""
    if hasattr(t, "to_local"):
        t = t.to_local()
    if t.numel() == 0 or t.layout != torch.strided or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True
    if t.is_contiguous():
        return (t.storage_offset() + t.numel()) * t.itemsize <= t.untyped_storage().nbytes() or t.is_meta
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.is_meta or (t.storage_offset() + last + 1) * t.itemsize <= t.untyped_storage().nbytes()


def shaped(g: Tensor, p: Tensor) -> Tensor:
    """A gradient, or an error where it is not of the shape and on the device of its parameter: both can be changed
    behind `Tensor.grad`, which checks them."""
    if g.shape != p.shape or g.device != p.device or (g.is_complex() and not p.is_complex()):
        kinds = (f"{tuple(t.shape)}, {t.dtype}, on {t.device}" for t in (g, p))
        raise RuntimeError("bigkernels.optim: a gradient is {}; its parameter is {}".format(*kinds))
    if not backed(g):
        raise RuntimeError("bigkernels.optim: the memory of a gradient was given back")
    return g.resolve_conj().resolve_neg()


class Entry(NamedTuple):
    """A parameter that a plan steps."""

    param: Tensor
    group: int
    state: dict
    keys: tuple[str, ...]  # of the tensors of the state that the options ask for
    count: Tensor  # float64 (): the state's own "step", or in place of one that is kept otherwise


class Plan:
    """Records of parameters with their states; all on one device."""

    def __init__(
        self,
        rule: Rule,
        entries: list[Entry],
        *,
        targets: list[Tensor] | None = None,
        extras: tuple[str, ...] = ("remainder", "ema"),
    ):
        """
        Args:
            targets: dense tensors that are written in the parameters' place; the parameters are not read then.
            extras: what the kernel keeps beside the states of the rule, where the options ask for it.
        """
        self.rule = rule
        self.params = [entry.param for entry in entries]
        self.device = (targets[0] if targets else local(self.params[0])).device
        self._locals = [local(p) for p in self.params]
        # A view with gaps is worked on as a copy, which goes back into the view.
        self.copies = [(i, t, torch.empty_like(t)) for i, t in enumerate(self._locals) if not dense(t)]
        work = list(self._locals)
        for i, _, copy in self.copies:
            work[i] = copy
        self._work = work
        targets = targets or work
        self._contiguous = all(t.is_contiguous() for t in work)
        self._strides = None if self._contiguous else [strides(t) for t in work]
        self._distributed = any(hasattr(p, "to_local") for p in self.params)
        self._complex = any(p.is_complex() for p in self.params)
        self._empty = [i for i, t in enumerate(work) if t.numel() == 0]

        keys = (*rule.states, *(f"{k}_scale" for k in rule.states), *extras)
        rows, chunks = array("q"), array("q")
        for index, (t, entry) in enumerate(zip(targets, entries, strict=True)):
            state, asked = entry.state, entry.keys
            first = next((state[k] for k in rule.states if k in asked), None)
            address = lambda k: local(state[k]).data_ptr() if k in keys and k in asked else 0  # noqa: B023, E731
            given = [address(k) for k in rule.states]
            scales = [address(f"{k}_scale") for k in rule.states]
            pad = [0] * (3 - len(rule.states))
            rows.extend([t.data_ptr(), *given, *pad, *scales, *pad, address("remainder"), address("ema"),
                         entry.count.data_ptr(), t.numel(), entry.group, TYPES[t.dtype],
                         STATE_TYPES[real(first).dtype] if first is not None else 0])  # fmt: skip
            for begin in range(0, t.numel(), CHUNK):
                chunks.extend([index, begin, min(begin + CHUNK, t.numel())])
        self.tensors, self.chunks = Uploaded(self.device)(rows), Uploaded(self.device)(chunks)
        self._grads = Uploaded(self.device)
        self.groups = Uploaded(self.device)
        self._counts = [(e.count, e.state["step"]) for e in entries if e.count is not e.state["step"]]
        # One number has its place whatever its strides, a view that is to be read with another sign too.
        self._single = [i for i, t in enumerate(work) if t.numel() == 1]
        # Through functions of the operator module: what a step does for each of 20,000 tensors has to be short.
        alike: dict[tuple[str, ...], list[Tensor]] = {}
        for entry in entries:
            alike.setdefault((*entry.keys, "step"), []).append(entry.param)
        self._kinds = [(operator.itemgetter(*keys), len(keys), params) for keys, params in alike.items()]
        self._kept, self._own, self._given = Seen(), Seen(), Seen()
        self._there: list[bool] = []
        self._given_types = self._own_types = array("q", [TYPES[t.dtype] for t in work])
        if not (self.copies or self._distributed or self._complex):
            self._own.record(self.params)
        self._kept.record(self._all({e.param: e.state for e in entries}))

    def _all(self, states: MutableMapping) -> list[Tensor]:
        """The parameters, and what the kernel works on of their states; KeyError or TypeError where it is not there."""
        tensors = list(self.params)
        for get, many, params in self._kinds:
            values = map(get, map(states.get, params))
            tensors += values if many == 1 else chain.from_iterable(values)
        return [t.to_local() if hasattr(t, "to_local") else t for t in tensors] if self._distributed else tensors

    def holds(self, states: MutableMapping) -> bool:
        """Whether parameters and states, as an optimizer has them now, are where they were, and lie as they did."""
        try:
            return self._kept.look(self._all(states)) == (True, True)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, BufferError):
            return False  # whoever makes the next plan says what is wrong

    def gradients(
        self, given: list[Tensor | None] | None = None, dense_of: Callable[[Tensor], Tensor] = Tensor.to_dense
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The records of the gradients, zeros for those that are None, and tensors to hold on to until the step ran.

        Args:
            given: in place of the parameters' own.
            dense_of: makes a sparse one dense, or refuses.
        """
        grads = [p.grad for p in self.params] if given is None else given
        rows = None if given is not None or self._distributed or self._complex else self._seen(grads)
        if rows is None:
            grads, rows = self._records(grads, dense_of, given is not None)
        # An empty shard has a gradient too, for its step is counted, but no address: any other than 0 will do.
        for i in self._empty:
            if grads[i] is not None:
                rows[2 * i] = 1
        return self._grads(rows), grads

    def _seen(self, grads: list[Tensor | None]) -> array | None:
        """The records of gradients that lie as their parameters do, or as the last ones did, which were right; None
        where one does not."""
        there = [g is not None for g in grads]
        whole = all(there)
        try:
            seen, types = self._own, self._own_types
            alike, _ = seen.look(
                grads if whole else [p if g is None else g for p, g in zip(self.params, grads, strict=True)]
            )
            if not alike:
                seen, types = self._given, self._given_types
                alike = there == self._there and seen.look([g for g in grads if g is not None])[0]
        except (TypeError, AttributeError, RuntimeError, ValueError, BufferError):  # one is sparse, or a subclass
            return None
        if not alike or any(there[i] and grads[i].is_neg() for i in self._single):
            return None
        addresses = seen.addresses
        if not whole:
            given = iter(addresses) if seen is self._own else self._spread(addresses)
            addresses = array("q", [at if own else 0 for own, at in zip(there, given, strict=True)])
        rows = array("q", bytes(16 * len(grads)))
        rows[::2], rows[1::2] = addresses, types
        return rows

    def _spread(self, addresses: array) -> Iterator[int]:
        """With zeros where the last gradients were None."""
        given = iter(addresses)
        return (next(given) if own else 0 for own in self._there)

    def _records(
        self, grads: list[Tensor | None], dense_of: Callable[[Tensor], Tensor], moved: bool
    ) -> tuple[list, array]:
        """The gradients, those copied that do not lie as their parameter does, and their records.

        `moved`: they have been made for this and are elsewhere than the parameters.
        """
        own = grads
        grads = [None if g is None else dense_of(g) for g in grads]
        if not moved:
            grads = [None if g is None else shaped(placed(g, p), p) for g, p in zip(grads, self.params, strict=True)]
        if self._distributed or self._complex:
            grads = [None if g is None else local(g) for g in grads]
        for i, g in enumerate(grads):
            if g is not None and g.dtype not in TYPES:  # `Tensor.grad_dtype` allows any
                g = grads[i] = g.to(torch.float32)
            if g is not None and not self._fits(i, g):
                grads[i] = torch.empty_like(self._work[i], dtype=g.dtype).copy_(g)
        pairs = [(0, 0) if g is None else (g.data_ptr(), TYPES[g.dtype]) for g in grads]
        if not moved and all(map(operator.is_, grads, own)):
            self._given.record([g for g in grads if g is not None])
            self._given_types = array("q", [number for _, number in pairs])
            self._there = [g is not None for g in grads]
        return grads, array("q", chain.from_iterable(pairs))

    def _fits(self, i: int, g: Tensor) -> bool:
        if self._strides is None:
            return g.is_contiguous()
        return strides(g) == self._strides[i] and dense(g)

    def wait(self) -> None:
        """Until the gradients are where their records say."""

    def before(self) -> None:
        for _, t, copy in self.copies:
            copy.copy_(t)
        self.counts_in()

    def after(self) -> None:
        for _, t, copy in self.copies:
            t.copy_(copy)
        self.counts_out()

    def counts_in(self) -> None:
        for count, kept in self._counts:
            count.copy_(local(kept).view(()))

    def counts_out(self) -> None:
        for count, kept in self._counts:
            local(kept).copy_(count)


class Uploaded:
    """Numbers on a device, sent there when they change; on a GPU without waiting for the copy."""

    def __init__(self, device: torch.device):
        self.device = device
        self._numbers: array | bytearray | None = None
        self._tensor: Tensor | None = None
        self._captured: list[Tensor] = []  # a graph copies from them at each replay

    def __call__(self, numbers: array | bytearray) -> Tensor:
        if self._tensor is not None and self._numbers == numbers:
            return self._tensor
        if not numbers:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        here = torch.frombuffer(numbers, dtype=torch.uint8)
        self._numbers, self._tensor = numbers, here
        if self.device.type != "cpu":
            here = here.pin_memory()
            self._tensor = here.to(self.device, non_blocking=True)
            if torch.cuda.is_current_stream_capturing():
                # The copy has not taken place yet: nothing but the graph may read it.
                self._captured.append(here)
                self._numbers = None
        return self._tensor


def groups(options: list[dict], device: torch.device) -> tuple[bytearray, list[Tensor]]:
    """The records of parameter groups, and tensors they point to."""
    packed, held = bytearray(), []
    for o in options:
        beta1, beta2 = o.get("betas", (0.0, o.get("alpha", 0.0)))
        lr, address, wide = o["lr"], 0, 0
        if isinstance(lr, Tensor):
            if device.type != "cpu" and lr.device == device and lr.dtype in (torch.float32, torch.float64):
                held.append(lr)
                address, wide, lr = lr.data_ptr(), int(lr.dtype == torch.float64), 0.0
            else:
                lr = float(lr)
        flags = sum(bit for name, bit in _FLAGS if o.get(name))
        packed += struct.pack(
            "9d4qQ",
            lr,
            float(beta1),
            float(beta2),
            o.get("eps", 0.0),
            float(o["weight_decay"]),
            o.get("momentum", 0.0),
            o.get("dampening", 0.0),
            o.get("lr_decay", 0.0),
            o["ema_decay"] or 0.0,
            address,
            wide,
            flags,
            ROUNDINGS[o["rounding"]],
            o["seed"],
        )
    return packed, held


def only_gradients(grads: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Records of gradients, dense ones, that belong to no parameter: for their norm."""
    rows, sizes, chunks = array("q"), array("q"), array("q")
    for index, g in enumerate(grads):
        rows.extend([g.data_ptr(), TYPES[g.dtype]])
        sizes.extend([0] * 10 + [g.numel(), 0, 0, 0])
        for begin in range(0, g.numel(), CHUNK):
            chunks.extend([index, begin, min(begin + CHUNK, g.numel())])
    return tuple(Uploaded(device)(numbers) for numbers in (sizes, rows, chunks))
