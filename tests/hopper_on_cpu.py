"""Runs the kernels for Hopper (Gluon) on CPU tensors: their own Python, over a model of what the hardware does apart.

Triton's interpreter knows no Gluon. Here partitions of a program are threads of which one runs at a time, in an order
that a seed chooses. Copies of the tensor memory accelerator land when the order says so, and count their bytes on a
barrier; products of groups of warps read shared memory when they are started or when they are waited for. What
a GPU would do without a word is an error: memory that is read before it was filled or fenced, filled while something
still reads it, a result taken before it was waited for, a descriptor that is not aligned, partitions that wait for each
other. Layouts mean nothing here; the compiler checks those.
"""

from __future__ import annotations

import math
import random
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.runtime.jit import ConstexprFunction, JITFunction

_DTYPES = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float16}


class Fault(AssertionError):
    """What goes wrong silently on a GPU."""


class _Stop(BaseException):
    pass


class _Partition(threading.Thread):
    def __init__(self, program: _Program, function: Callable, args: tuple):
        super().__init__(daemon=True)
        self.program, self.function, self.given = program, function, args
        self.turn, self.error, self.done = threading.Semaphore(0), None, False
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[_Product] = []  # started and not waited for
        self.unfenced: list[_Range] = []  # written by threads, as the asynchronous units do not see yet
        self.lanes: list[tuple] = []  # copies by threads that no barrier was told of yet
        self.stores: list[tuple] = []  # copies to global memory that were started

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.function(*self.given)
            if self.products or self.stores:
                raise Fault("a partition ends before what it started")
        except BaseException as error:  # noqa: BLE001 - handed to the thread that drives
            self.error = error
        self.done = True
        self.program.control.release()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run until the program comes back, which it does once `ready`."""
        self.ready = ready
        self.program.control.release()
        self.turn.acquire()
        if self.program.stopped:
            raise _Stop


_Range = tuple[int, int, int]  # storage, first element, end


def _overlap(a: _Range, b: _Range) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


class _Program:
    """One program: its partitions and the copies on their way."""

    def __init__(self, order: random.Random):
        self.order, self.control, self.stopped = order, threading.Semaphore(0), False
        self.partitions: list[_Partition] = []
        self.copies: list[tuple[list[_Range], Callable, int]] = []  # where, what they do, not before which step
        self.step = 0
        self.alone = _Partition(self, lambda: None, ())  # code outside of partitions

    @property
    def current(self) -> _Partition:
        thread = threading.current_thread()
        return thread if isinstance(thread, _Partition) else self.alone

    def specialize(self, functions: list[tuple[Callable, tuple]]) -> None:
        self.partitions = [_Partition(self, f, args) for f, args in functions]
        for p in self.partitions:
            p.start()
        try:
            while not all(p.done for p in self.partitions):
                steps: list[Any] = [p for p in self.partitions if not p.done and p.ready()]
                steps = steps + [c for c in self.copies if c[2] <= self.step] or self.copies
                self.step += 1
                if not steps:
                    raise Fault("partitions wait for each other")
                step = self.order.choice(steps)
                if isinstance(step, _Partition):
                    step.turn.release()
                    self.control.acquire()
                    if step.error is not None:
                        raise step.error
                else:
                    self.copies.remove(step)
                    step[1]()
            if self.copies:
                raise Fault("copies are on their way when the program ends")
        finally:
            self.stopped = True
            for p in self.partitions:
                p.turn.release()

    def copy(self, ranges: list[_Range], land: Callable) -> None:
        self.copies.append((ranges, land, self.step + self.order.choice((0, 0, 5, 50))))

    def reads(self) -> Iterator[_Range]:
        for p in [*self.partitions, self.alone]:
            for product in p.products:
                yield from product.ranges
            yield from (where for where, _ in p.stores)


_program: _Program


class _Product:
    """A product that was started; its result is there once it was waited for."""

    def __init__(self, compute: Callable[[], Tensor], ranges: list[_Range]):
        self.compute, self.ranges, self.result, self.early = compute, ranges, None, None


class Pointer:
    def __init__(self, memory: Tensor, at: Any, dtype: torch.dtype):
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + more, self.dtype.element_ty)


def _pointer(t: Tensor) -> Pointer:
    memory = torch.empty(0, dtype=t.dtype, device="cpu").set_(t.untyped_storage())
    return Pointer(memory, t.storage_offset(), t.dtype)


class Shared:
    """Memory of a program: a view of a tensor that starts as NaN."""

    def __init__(self, data: Tensor):
        self.data = data

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)

    @property
    def range(self) -> _Range:
        first = self.data.storage_offset()
        return self.data.untyped_storage().data_ptr(), first, first + self.data.numel()

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def store(self, value: Tensor) -> None:
        if any(_overlap(self.range, r) for r in _program.reads()):
            raise Fault("written while something reads it")
        if value.dtype != self.dtype or value.shape != self.shape:
            raise Fault(f"{value.dtype} {value.shape} stored as {self.dtype} {self.shape}")
        self.data.copy_(value)
        _program.current.unfenced.append(self.range)

    def load(self, layout: Any) -> Tensor:
        self.check("loaded")
        return self.data.clone()

    def _reinterpret(self, dtype: torch.dtype, shape: list, layout: Any) -> Shared:
        assert dtype == self.dtype
        return Shared(self.data.view(shape))

    def check(self, what: str) -> _Range:
        if any(_overlap(self.range, r) for ranges, *_ in _program.copies for r in ranges):
            raise Fault(f"{what} before the copy that fills it has landed")
        return self.range

    def check_fenced(self, what: str) -> _Range:
        if any(_overlap(self.range, r) for p in [*_program.partitions, _program.alone] for r in p.unfenced):
            raise Fault(f"{what} without a fence after threads wrote it")
        return self.check(what)


class Barrier:
    def __init__(self) -> None:
        self.count, self.phase = 0, 0

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = 0

    def arrive(self, count: int = 1, bytes: int = 0) -> None:
        self.bytes += bytes
        self.pending -= count
        if self.pending < 0:
            raise Fault("more arrivals than a barrier counts")
        self._finish()

    def landed(self, bytes: int) -> None:
        self.bytes -= bytes
        self._finish()

    def _finish(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class _Barriers(list):
    def index(self, i: Any) -> Barrier:  # as of shared memory, not of lists
        return self[int(i)]


class _Descriptor:
    def __init__(self, base: Pointer, shape: list, strides: list, block: list, layout: Any):
        self.memory, self.at = base.memory, int(base.at)
        self.shape, self.strides, self.block = ([int(n) for n in ns] for ns in (shape, strides, block))
        size = self.memory.element_size()
        if (self.memory.data_ptr() + self.at * size) % 16 or any(n * size % 16 for n in self.strides[:-1]):
            raise Fault("a descriptor wants rows that start on 16 bytes")
        if min(self.shape) < 1:
            raise Fault("a descriptor of nothing")

    def box(self, coordinates: list) -> tuple[Tensor, int] | None:
        """The part of a block that is inside, as a view of memory."""
        *head, row, column = (int(c) for c in coordinates)
        assert column == 0 and self.block[-1] == self.shape[-1] and self.block[:-2] == [1] * len(head)
        there = min(self.shape[-2] - row, self.block[-2])
        if row < 0 or there <= 0 or head and not 0 <= head[0] < self.shape[0]:
            return None
        first = self.at + row * self.strides[-2] + sum(i * n for i, n in zip(head, self.strides, strict=False))
        return self.memory.as_strided((there, self.block[-1]), self.strides[-2:], first), there


def _load_copy(desc: _Descriptor, coordinates: list, barrier: Barrier, target: Shared) -> None:
    where = target.check_fenced("copied to")
    if any(_overlap(where, r) for r in _program.reads()):
        raise Fault("filled while something still reads it")
    if list(target.shape) != desc.block:
        raise Fault(f"a block of {desc.block} copied to {target.shape}")
    target.data.fill_(math.nan)

    def land() -> None:
        target.data.zero_()
        found = desc.box(coordinates)
        if found is not None:
            target.data.view(desc.block[-2:])[: found[1]] = found[0]
        barrier.landed(target.data.numel() * target.data.element_size())

    _program.copy([where], land)


def _store_copy(desc: _Descriptor, coordinates: list, source: Shared) -> None:
    where = source.check_fenced("copied from")

    def leave() -> None:
        found = desc.box(coordinates)
        if found is not None:
            found[0].copy_(source.data[: found[1]])

    _program.current.stores.append((where, leave))


def _store_wait(pendings: int) -> None:
    stores = _program.current.stores
    while len(stores) > pendings:
        stores.pop(0)[1]()


def _multiply(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    here = _program.current
    if isinstance(acc, _Product):
        if acc not in here.products:
            raise Fault("a product is added to one that is over")
    ranges = [x.check_fenced("multiplied") for x in (a, b) if isinstance(x, Shared)]
    if (a.shape[0], b.shape[1]) != tuple(acc.shape if isinstance(acc, Tensor) else (a.shape[0], b.shape[1])):
        raise Fault("shapes")

    def compute() -> Tensor:
        left = (a.data if isinstance(a, Shared) else a).float()
        product = left @ b.data.float()
        if not use_acc:
            return product
        return product + (acc.result if isinstance(acc, _Product) else acc)

    product = _Product(compute, ranges)
    here.products.append(product)
    if is_async:
        if _program.order.random() < 0.5:  # it may be as early as this
            product.early = compute()
        here.pause()
        return product
    return _multiply_wait(0, deps=(product,))


def _multiply_wait(outstanding: int = 0, deps: tuple = ()) -> Any:
    here = _program.current
    while len(here.products) > outstanding:
        first = here.products[0]
        first.result = first.compute() if first.early is None else first.early
        here.products.pop(0)
    if any(isinstance(d, _Product) and d.result is None for d in deps):
        raise Fault("a product is taken before it was waited for")
    found = tuple(d.result if isinstance(d, _Product) else d for d in deps)
    return found if len(found) > 1 else found[0]


def _lanes_copy(target: Shared, p: Pointer, mask: Any = None) -> None:
    """A copy by threads (cp.async), which lands in its own time and says so to the barrier that is named after it."""
    where = target.check("copied to")
    if any(_overlap(where, r) for r in _program.reads()):
        raise Fault("filled while something still reads it")
    target.data.fill_(math.nan)
    _program.current.lanes.append((where, lambda: target.data.copy_(_load(p, mask))))


def _lanes_arrive(barrier: Barrier, *, increment_count: bool) -> None:
    assert not increment_count
    begun, _program.current.lanes = _program.current.lanes, []

    def land() -> None:
        for _, copy in begun:
            copy()
        barrier.arrive(32)

    _program.copy([where for where, _ in begun], land)


def _wait(barrier: Barrier, phase: Any, pred: bool = True, deps: tuple = ()) -> None:
    _program.current.pause(lambda: barrier.phase & 1 != int(phase))


def _arrive(barrier: Barrier, *, count: int = 1) -> None:
    barrier.arrive(count)
    _program.current.pause()


def _fence(cluster: bool = False) -> None:
    _program.current.unfenced.clear()


def _allocate(dtype: Any, shape: list, layout: Any) -> Any:
    if layout == "barriers":
        return _Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full(tuple(shape), math.nan, dtype=dtype, device="cpu"))


def _gather(p: Pointer, mask: Any) -> tuple[Tensor, Tensor]:
    at = torch.as_tensor(p.at)
    mask = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    at, mask = torch.broadcast_tensors(at, mask)
    if mask.any() and not 0 <= int(at[mask].min()) <= int(at[mask].max()) < p.memory.numel():
        raise Fault("outside of memory")
    return at, mask


def _load(p: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    at, mask = _gather(p, mask)
    found = torch.full(at.shape, other, dtype=p.memory.dtype, device="cpu")
    found[mask] = p.memory[at[mask]]
    return found


def _store(p: Pointer, value: Any, mask: Any = None) -> None:
    at, mask = _gather(p, mask)
    p.memory[at[mask]] = torch.as_tensor(value).expand(at.shape)[mask].to(p.memory.dtype)


def _pairs(function: Callable) -> Callable:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _language() -> types.SimpleNamespace:
    """What kernels call `gl` or `tl`."""
    layouts = (
        "NVMMASharedLayout",
        "NVMMADistributedLayout",
        "SliceLayout",
        "DotOperandLayout",
        "BlockedLayout",
        "SwizzledSharedLayout",
    )
    return types.SimpleNamespace(
        **{name: lambda *args, **kwargs: "layout" for name in layouts},
        constexpr=lambda value: value,
        static_range=range,
        cdiv=lambda a, b: (a + b - 1) // b,
        program_id=lambda axis: torch.tensor(_program.id),
        load=_load,
        store=_store,
        allocate_shared_memory=_allocate,
        warp_specialize=lambda functions, warps, registers: _program.specialize(functions),
        int64=torch.int64,
        int32=torch.int32,
        float32=torch.float32,
        arange=lambda a, b, layout=None: torch.arange(a, b),
        convert_layout=lambda x, layout: x,
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype, device="cpu"),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype, device="cpu"),
        maximum=_pairs(torch.maximum),
        minimum=_pairs(torch.minimum),
        where=torch.where,
        abs=torch.abs,
        exp2=torch.exp2,
        log2=torch.log2,
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        expand_dims=torch.unsqueeze,
    )


_NAMES = {
    "gl": _language(),
    "tl": _language(),
    "fence_async_shared": _fence,
    "warpgroup_mma": _multiply,
    "warpgroup_mma_wait": _multiply_wait,
    "async_copy": types.SimpleNamespace(async_copy_global_to_shared=_lanes_copy, mbarrier_arrive=_lanes_arrive),
    "mbarrier": types.SimpleNamespace(
        init=lambda barrier, count: barrier.init(count),
        wait=_wait,
        arrive=_arrive,
        expect=lambda barrier, bytes: barrier.arrive(1, bytes),
        MBarrierLayout=lambda: "barriers",
    ),
    "tma": types.SimpleNamespace(
        make_tensor_descriptor=_Descriptor,
        async_copy_global_to_shared=_load_copy,
        async_copy_shared_to_global=_store_copy,
        store_wait=_store_wait,
    ),
}
_spaces: dict[int, tuple[dict, dict]] = {}  # by the id of a module's globals: these, and what they are here


def _simulated(value: Any, name: str = "") -> Any:
    if name in _NAMES:
        return _NAMES[name]
    if isinstance(value, (JITFunction, ConstexprFunction)):
        return types.FunctionType(value.fn.__code__, _space(value.fn.__globals__), name, value.fn.__defaults__)
    return value.value if isinstance(value, gl.constexpr) else value


def _space(around: dict) -> dict:
    """The globals of a module of kernels, as they are to functions that run here."""
    found = _spaces.get(id(around))
    if found is None:
        found = _spaces[id(around)] = (around, {})
        found[1].update({name: _simulated(value, name) for name, value in around.items()})
    return found[1]


def launch(kernel: JITFunction, grid: tuple[int], *args: Any, seed: int = 0, **named: Any) -> None:
    """Run every program of a launch, as `bigkernels.triton._launch.launch` is called."""
    global _program
    given = dict(zip(kernel.arg_names, args, strict=False)) | named
    values = {}
    for p in kernel.params:
        value = given[p.name]
        if isinstance(value, Tensor):
            value = _pointer(value)
        elif type(value) is int and not p.is_constexpr:
            value = torch.tensor(value)
        values[p.name] = value
    function, order = _simulated(kernel), random.Random(seed)
    for program in range(grid[0]):
        _program = _Program(order)
        _program.id = program
        function(**values)


@contextmanager
def hopper_on_cpu(seed: int = 0) -> Iterator[list[str]]:
    """The launchers of attention run their kernels here; yields the names of those that were launched."""
    from bigkernels.triton import _hopper, attention

    launched: list[str] = []

    def instead(
        kernel: JITFunction, grid: tuple[int], *args: Any, num_warps: int, maxnreg: Any = None, **named: Any
    ) -> None:
        launched.append(kernel.__name__)
        launch(kernel, grid, *args, seed=seed, **named)

    modules = (_hopper, attention)
    before = [m.launch for m in modules]
    for m in modules:
        m.launch = instead
    try:
        yield launched
    finally:
        for m, launch_before in zip(modules, before, strict=True):
            m.launch = launch_before
