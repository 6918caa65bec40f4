"""Words of CPython's and PyTorch's memory that change whenever an object does, found out by trying.

A dictionary counts its versions (PEP 509) up to CPython 3.12; a list's length and elements, a set's table, an object's
class and the fields of a tensor lie at fixed places. None of that is promised, so each kind is tried once a process,
and where a change is not seen in these words they are not used: callers then compare everything.
"""

# mypy: ignore-errors

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._load import cpu_library
from .._torch_private import without_modes

Words = list[tuple[int, int]]
"""Addresses and what is there."""

_TYPE, _SIZE, _VERSION, _ITEMS = 8, 16, 24, 24  # bytes into PyObject, PyVarObject, PyDictObject and PyListObject
_SET = (16, 24, 32, 40)  # fill, used, mask and table of PySetObject
_STORAGE, _FIELDS = 16, range(56, 168, 8)  # of a TensorImpl: its storage; its sizes, strides, offset and dtype
_MEMORY = (16, 24, 32)  # of a StorageImpl
_COUNTER, _COUNT = 40, 16  # of a TensorImpl, its counter of versions; of that, its count
_DIMENSIONS = 5  # whose sizes lie in the tensor itself


def word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def at(address: int, *offsets: int) -> Words:
    return [(address + offset, word(address + offset)) for offset in offsets]


def of_class(x: object) -> Words:
    return at(id(x), _TYPE)


def of_dict(x: dict) -> Words:
    return at(id(x), _VERSION)


def of_type(x: type) -> Words:
    """Of the attributes of a class and those that it inherits from."""
    dicts = (gc.get_referents(vars(c)) for c in x.__mro__ if c is not object)
    return [w for found in dicts for d in found if type(d) is dict for w in of_dict(d)]


def of_list(x: list) -> tuple[Words, Words]:
    """In these two orders: what the second words are of is there as long as the first are what they are."""
    (_, size), (_, items) = first = at(id(x), _SIZE, _ITEMS)
    return first, at(items, *range(0, 8 * size, 8))


def of_set(x: set) -> tuple[Words, Words]:
    first = at(id(x), *_SET)
    return first, at(first[3][1], *range(0, 16 * (first[2][1] + 1), 8))


def of_tensor(t: Tensor) -> tuple[Words, Words] | None:
    """Where it is, and how it lies; None where that is not known."""
    if t.dim() > _DIMENSIONS or type(t) not in (Tensor, nn.Parameter) or not knows_tensors():
        return None
    address = t._cdata
    return at(address, _STORAGE, *_FIELDS), at(word(address + _STORAGE), *_MEMORY)


def of_version(t: Tensor) -> tuple[Words, Words] | None:
    """Where it counts writes to its memory; None where that is not known."""
    if type(t) not in (Tensor, nn.Parameter) or not knows_versions():
        return None
    return at(t._cdata, _COUNTER), at(word(t._cdata + _COUNTER), _COUNT)


def differs(words: Words) -> bool:
    return any(word(address) != was for address, was in words)


@functools.cache
def same_words() -> Callable[[int, int, int, int], int] | None:
    """`bk_same_words` of csrc/cpu/look.cpp; None where there is no library, or an interpreter with other memory."""
    if cpu_library().reason is not None or not _knows_objects():
        return None
    function = ctypes.CDLL(str(cpu_library().path)).bk_same_words
    function.restype = ctypes.c_int64
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return function


@functools.cache
def same_bytes() -> Callable[[int, int], int] | None:
    if cpu_library().reason is not None:
        return None
    function = ctypes.CDLL(str(cpu_library().path)).bk_same_bytes
    function.restype, function.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_int64)
    return function


@functools.cache
def all_set() -> Callable[[int, int, int], int] | None:
    if cpu_library().reason is not None:
        return None
    function = ctypes.CDLL(str(cpu_library().path)).bk_all_set
    function.restype, function.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return function


def _seen(words: Callable[[], Words], *changes: Callable[[], object]) -> bool:
    """Whether each change shows in some word."""
    for change in changes:
        before = words()
        change()
        if not differs(before):
            return False
    return True


def _knows_objects() -> bool:
    if ctypes.sizeof(ctypes.c_void_p) != 8 or not hasattr(gc, "get_referents"):
        return False
    module, items, chosen, hook = nn.Linear(1, 1, device="cpu", dtype=torch.float32), [1, 2], {"a", "b"}, []
    held = module.__dict__
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float32, device="cpu"))

    class Base:
        pass

    class Other(Base):
        pass

    changed = Other()

    def listed() -> Words:
        first, second = of_list(items)
        return first + second

    def in_set() -> Words:
        first, second = of_set(chosen)
        return first + second

    return (
        _seen(
            lambda: of_dict(held),
            lambda: setattr(module, "x", 1.5),
            lambda: setattr(module, "x", 2.5),
            lambda: held.update(x=3.5),
            lambda: delattr(module, "x"),
            lambda: held.setdefault("y", 1),
            lambda: held.pop("y"),
            lambda: module.train(False),
        )
        and _seen(lambda: of_dict(module._parameters), lambda: setattr(module, "weight", weight))
        and _seen(
            lambda: of_dict(module._forward_hooks),
            lambda: hook.append(module.register_forward_hook(print)),
            lambda: hook[0].remove(),
        )
        and _seen(lambda: of_dict(module._modules), lambda: module._modules.update(a=None), module._modules.clear)
        and _seen(
            lambda: of_type(Other),
            lambda: setattr(Other, "forward", print),
            lambda: setattr(Base, "other", 1),
            lambda: delattr(Other, "forward"),
        )
        and _seen(lambda: of_class(changed), lambda: setattr(changed, "__class__", Base))
        and _seen(listed, lambda: items.__setitem__(1, 3), lambda: items.append(1), items.pop, items.clear)
        and _seen(in_set, lambda: chosen.add("c"), lambda: chosen.remove("a"), lambda: chosen.add("d"), chosen.clear)
    )


def _once(tries: Callable[[], bool]) -> Callable[[], bool]:
    """The answer counts for the process, whatever the first call stands in: fake tensors, say, or inference mode."""

    @functools.cache
    @functools.wraps(tries)
    def answer() -> bool:
        with without_modes(), torch.inference_mode(False):
            return tries()

    return answer


@_once
def knows_versions() -> bool:
    t = torch.zeros(3, 2, dtype=torch.float32, device="cpu")
    if not knows_tensors():
        return False
    try:
        # What may be no pointer is read through the system, which says so.
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(word(t._cdata + _COUNTER) + _COUNT)
            if int.from_bytes(memory.read(4), sys.byteorder) != t._version:
                return False
    except (OSError, OverflowError, ValueError):
        return False

    def words() -> Words:
        return at(t._cdata, _COUNTER) + at(word(t._cdata + _COUNTER), _COUNT)

    quiet = words()
    t.sum(), t.data.add_(1), t.numpy().fill(3)
    changes = (
        lambda: t.add_(1),
        lambda: t[1:].mul_(2),
        lambda: t.detach().zero_(),
        lambda: t.view(torch.int32).fill_(1),
    )
    return not differs(quiet) and _seen(words, *changes)


@_once
def knows_tensors() -> bool:
    options = {"dtype": torch.float32, "device": "cpu"}
    t = nn.Parameter(torch.zeros(13, 7, **options), requires_grad=False)
    if not hasattr(t, "_cdata") or word(t._cdata + _STORAGE) != t.untyped_storage()._cdata:
        return False

    def words() -> Words:
        return at(t._cdata, _STORAGE, *_FIELDS) + at(word(t._cdata + _STORAGE), *_MEMORY)

    def put(data: Tensor) -> Callable[[], None]:
        return lambda: setattr(t, "data", data)

    other = torch.zeros(13, 7, **options)
    others = (
        other,
        other.t(),
        other,
        other[1:8],
        other[:7],
        other.view(torch.int32)[:7],
        other.flatten(),
        other.to(torch.bfloat16),
        other,
    )
    quiet = words()
    t.add_(1), t.requires_grad_(), t.requires_grad_(False), t[1:].mul_(2)
    return not differs(quiet) and _seen(words, *map(put, others), lambda: other.untyped_storage().resize_(0))
