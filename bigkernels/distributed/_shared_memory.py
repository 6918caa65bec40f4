"""Collectives of the ranks of one host through memory that they share: the backend "shared_memory"."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp
from torch.futures import Future

from ._segment import CHUNK, Segment, share

if TYPE_CHECKING:
    from torch.distributed import Store

    _Base = Any  # the stubs of its methods are overloads
else:
    _Base = ProcessGroup

log = logging.getLogger("bigkernels")

BACKEND = "shared_memory"
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.int8,
)
_IN_FLOAT32 = (torch.bfloat16, torch.float16)
_REDUCE: dict[Any, Callable] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.MIN: torch.minimum,
}


class _Done(dist.Work):
    """Of a collective that has run when it returns."""

    def __init__(self, result: list[Tensor]) -> None:
        super().__init__()
        self._future: Future = Future()
        self._future.set_result(result)

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def get_future(self) -> Future:
        return self._future

    def result(self) -> list[Tensor]:
        found: list[Tensor] = self._future.value()
        return found


def _by_gloo(name: str) -> Callable:
    """A method that calls gloo's own.

    Those that a class in Python leaves to its base run with the interpreter's lock held, and then wait for a thread of
    gloo's that may be waiting for that lock; gloo's own methods give it up.
    """

    def method(self: SharedMemoryGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._gloo, name)(*args, **kwargs)

    return method


class SharedMemoryGroup(_Base):
    """A process group of CPU tensors: sums, gathers and broadcasts go through shared memory, all else through gloo.

    Where the ranks are on several hosts, or there is no /dev/shm, everything goes through gloo, and the log says so.
    """

    def __init__(self, store: Store, rank: int, ranks: int, timeout: timedelta) -> None:
        super().__init__(rank, ranks)
        self._timeout, self._lock = timeout, threading.Lock()
        self._gloo: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, ranks, timeout)
        self._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, self._gloo)
        self._set_default_backend(ProcessGroup.BackendType.GLOO)
        self.segment = share(dist.PrefixStore("segment", store), rank, ranks)
        if self.segment is None:
            log.info("the ranks of a group of %d cannot share memory: their collectives go through gloo", ranks)
        else:
            _segments.add(self.segment)

    def getBackendName(self) -> str:
        return BACKEND

    # ---- the names by which torch calls them -------------------------------------------------------------------------

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        op = _op_of(opts)
        if not self._shares("all_reduce", tensors, op):
            return self._gloo.allreduce(tensors, _options(dist.AllreduceOptions, opts, op))
        for t in tensors:
            self._run("all_reduce", partial(_all_reduce, t=t, op=op, timeout=self._timeout))
        return _Done(tensors)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        return self.allreduce(tensors, opts)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        if not self._shares("all_gather", [output, tensor]) or output.dtype != tensor.dtype:
            return self._gloo._allgather_base(output, tensor, *_given(opts))
        self._gather(output.view(-1).chunk(self.size()) if output.numel() else [], output, tensor)
        return _Done([output])

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> Any:
        for output, tensor in zip(outputs, tensors, strict=True):
            self.all_gather_single(output, tensor).wait()
        return _Done(outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather(self, outputs: Any, tensors: Any, opts: Any = None) -> Any:
        lists, own = ([outputs], [tensors]) if isinstance(tensors, Tensor) else (outputs, tensors)
        everything = [t for found in lists for t in found]
        same = all(t.numel() == own[0].numel() for t in everything) and len(own) == 1
        if not same or not self._shares("all_gather", [*everything, *own]):
            return self._gloo.allgather(lists, own, *_given(opts))
        self._gather([t.view(-1) for t in lists[0]], None, own[0])
        return _Done(everything)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        op = _op_of(opts)
        if not self._shares("reduce_scatter", [output, tensor], op) or output.dtype != tensor.dtype:
            return self._gloo._reduce_scatter_base(output, tensor, *_given(opts))
        parts = list(tensor.view(-1).chunk(self.size())) if tensor.numel() else []
        self._run("reduce_scatter", lambda s: _reduce_scatter(s, output.view(-1), parts, op, self._timeout))
        return _Done([output])

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> Any:
        for output, tensor in zip(outputs, tensors, strict=True):
            self.reduce_scatter_single(output, tensor, opts).wait()
        return _Done(outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce_scatter(self, outputs: Any, tensors: Any, opts: Any = None) -> Any:
        own, lists = ([outputs], [tensors]) if isinstance(outputs, Tensor) else (outputs, tensors)
        op = _op_of(opts)
        everything = [t for found in lists for t in found]
        same = all(t.numel() == own[0].numel() for t in everything) and len(own) == 1
        if not same or not self._shares("reduce_scatter", [*everything, *own], op):
            return self._gloo.reduce_scatter(own, lists, *_given(opts))
        parts = [t.view(-1) for t in lists[0]]
        self._run("reduce_scatter", lambda s: _reduce_scatter(s, own[0].view(-1), parts, op, self._timeout))
        return _Done(own)

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        root = opts if isinstance(opts, int) else 0 if opts is None else opts.rootRank
        if not self._shares("broadcast", tensors):
            options = dist.BroadcastOptions()
            options.rootRank = root
            return self._gloo.broadcast(tensors, options)
        for t in tensors:
            self._run("broadcast", partial(_broadcast, t=t.view(-1), root=root, timeout=self._timeout))
        return _Done(tensors)

    def barrier(self, opts: Any = None) -> Any:
        if self.segment is None:
            return self._gloo.barrier(*_given(opts))
        self._run("barrier", lambda s: s.barrier("barrier", self._timeout))
        return _Done([])

    all_to_all_single = alltoall_base = _by_gloo("alltoall_base")
    allgather_coalesced = _by_gloo("allgather_coalesced")
    alltoall = _by_gloo("alltoall")
    gather = _by_gloo("gather")
    monitored_barrier = _by_gloo("monitored_barrier")
    recv = _by_gloo("recv")
    recv_anysource = _by_gloo("recv_anysource")
    reduce = _by_gloo("reduce")
    scatter = _by_gloo("scatter")
    send = _by_gloo("send")

    # ---- what they share ---------------------------------------------------------------------------------------------

    def _shares(self, name: str, tensors: Sequence[Tensor], op: Any = ReduceOp.SUM) -> bool:
        """Whether the call goes through shared memory: as every rank gives the same kinds, all decide alike."""
        return (
            self.segment is not None
            and op in _REDUCE
            and all(t.is_cpu and t.dtype in _DTYPES and t.layout == torch.strided for t in tensors)
            and all(t.is_contiguous() for t in tensors)
        )

    def _gather(self, parts: Sequence[Tensor], whole: Tensor | None, tensor: Tensor) -> None:
        if whole is not None and whole.numel() != tensor.numel() * self.size():
            raise ValueError(
                f"bigkernels.distributed: all_gather: the output has {whole.numel()} elements, expected {self.size()} "
                f"times the {tensor.numel()} of the input"
            )
        self._run("all_gather", lambda s: _all_gather(s, parts, tensor.view(-1), self._timeout))

    def _run(self, name: str, collective: Callable[[Segment], None]) -> None:
        segment = self.segment
        assert segment is not None
        with self._lock, torch.no_grad():
            try:
                collective(segment)
            except BaseException as error:  # an interrupt as well: this rank is out of step
                if segment.broken is None:
                    segment.fail(f"{name}: {type(error).__name__}")
                raise


def _op_of(opts: Any) -> Any:
    """The reduction; of other kinds than the plain ones, None."""
    op = opts if opts is not None and not hasattr(opts, "reduceOp") else getattr(opts, "reduceOp", ReduceOp.SUM)
    return next((known for known in _REDUCE if op == known), None)


def _options(kind: Any, opts: Any, op: Any) -> Any:
    if opts is not None and hasattr(opts, "reduceOp"):
        return opts
    made = kind()
    made.reduceOp = opts if opts is not None else op
    return made


def _given(opts: Any) -> tuple:
    return () if opts is None else (opts,)


def _combine(parts: list[Tensor], out: Tensor, op: Any) -> None:
    """`parts` together, rank after rank; 16-bit values in float32, rounded once."""
    combine = _REDUCE[op]
    if out.dtype in _IN_FLOAT32 and (len(parts) > 2 or op == ReduceOp.AVG):  # torch rounds what it makes of two once
        total = parts[0].float()
        for part in parts[1:]:
            combine(total, part, out=total)
        out.copy_(total.div_(len(parts)) if op == ReduceOp.AVG else total)
        return
    if len(parts) == 1:
        out.copy_(parts[0])
    else:
        combine(parts[0], parts[1], out=out)
    for part in parts[2:]:
        combine(out, part, out=out)
    if op == ReduceOp.AVG:
        if out.dtype.is_floating_point:
            out.div_(len(parts))
        else:
            out.div_(len(parts), rounding_mode="trunc")


def _all_reduce(segment: Segment, t: Tensor, op: Any, timeout: timedelta) -> None:
    flat, size, ranks = t.view(-1), t.element_size(), segment.ranks
    most = CHUNK // size
    for turn, begin in enumerate(range(0, len(flat), most)):
        mine = flat[begin : begin + most]
        slots = [slot.view(t.dtype)[: len(mine)] for slot in segment.slots(turn)]
        slots[segment.rank].copy_(mine)
        segment.barrier("all_reduce", timeout)
        if ranks <= 2:
            _combine(slots[:ranks], mine, op)
            continue
        share = slice(len(mine) * segment.rank // ranks, len(mine) * (segment.rank + 1) // ranks)
        _combine([slot[share] for slot in slots[:-1]], slots[-1][share], op)
        segment.barrier("all_reduce", timeout)
        mine.copy_(slots[-1])
    # The next collective begins with the first turn, which somebody may still read.
    segment.barrier("all_reduce", timeout)


def _reduce_scatter(segment: Segment, out: Tensor, parts: Sequence[Tensor], op: Any, timeout: timedelta) -> None:
    most = CHUNK // out.element_size() // segment.ranks
    for turn, begin in enumerate(range(0, len(out), most)):
        mine = out[begin : begin + most]
        slots = [slot.view(out.dtype) for slot in segment.slots(turn)[:-1]]
        for r, part in enumerate(parts):
            slots[segment.rank][r * most : r * most + len(mine)].copy_(part[begin : begin + most])
        segment.barrier("reduce_scatter", timeout)
        at = segment.rank * most
        _combine([slot[at : at + len(mine)] for slot in slots], mine, op)
    segment.barrier("reduce_scatter", timeout)


def _all_gather(segment: Segment, parts: Sequence[Tensor], t: Tensor, timeout: timedelta) -> None:
    most = CHUNK // t.element_size()
    for turn, begin in enumerate(range(0, len(t), most)):
        mine = t[begin : begin + most]
        slots = [slot.view(t.dtype)[: len(mine)] for slot in segment.slots(turn)]
        slots[segment.rank].copy_(mine)
        segment.barrier("all_gather", timeout)
        for slot, part in zip(slots, parts, strict=False):
            part[begin : begin + most].copy_(slot)
    segment.barrier("all_gather", timeout)


def _broadcast(segment: Segment, t: Tensor, root: int, timeout: timedelta) -> None:
    most = CHUNK // t.element_size()
    for turn, begin in enumerate(range(0, len(t), most)):
        mine = t[begin : begin + most]
        slot = segment.slots(turn)[root].view(t.dtype)[: len(mine)]
        if segment.rank == root:
            slot.copy_(mine)
        segment.barrier("broadcast", timeout)
        if segment.rank != root:
            mine.copy_(slot)
    segment.barrier("broadcast", timeout)


_segments: weakref.WeakSet[Segment] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    for segment in list(_segments):
        segment.leave()


def register_backend() -> None:
    """Make "shared_memory" a backend of `torch.distributed`; importing `bigkernels.distributed` does."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, SharedMemoryGroup, devices=["cpu"])
