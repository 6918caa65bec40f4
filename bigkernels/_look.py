"""Where tensors are and how they lie: what a step looks at before it relies on an address."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._load import cpu_library


class Seen:
    """Tensors as they were when they were looked at last.

    Attributes:
        addresses: of their first elements; of what `look` was given last, whatever it found.
    """

    def __init__(self) -> None:
        self.addresses = array("q")
        self._hints = array("q")
        self._at: tuple[int, ...] = ()
        self._layouts: array[int] | list[tuple[Any, ...]] | None = None

    def record(self, tensors: list[Tensor]) -> None:
        """Raises whatever a tensor without an address raises, and for what is no tensor."""
        self._layouts, self.addresses = None, array("q", bytes(8 * len(tensors)))
        if (native := _native()) is None:
            rows = list(map(_described, tensors))
            self.addresses, self._layouts = array("q", [row[0] for row in rows]), [row[1:] for row in rows]
            return
        self._hints = array("q", self.addresses)
        layouts = array("q", bytes(8 * 6 * len(tensors)))
        words = native(tensors, *self._arrays(layouts), False)
        if words > len(layouts):
            layouts = array("q", bytes(8 * words))
            native(tensors, *self._arrays(layouts), False)
        self._layouts = layouts[:words]
        self._at = self._arrays(self._layouts)

    def _arrays(self, layouts: array) -> tuple[int, ...]:
        return (*(numbers.buffer_info()[0] for numbers in (self.addresses, self._hints, layouts)), len(layouts))

    def look(self, tensors: list[Tensor]) -> tuple[bool, bool]:
        """Whether dtypes, devices, shapes and strides are what they were, and whether addresses are, too.

        Neither where one has elements and no memory. Raises as `record`.
        """
        if self._layouts is None or len(tensors) != len(self.addresses):
            return False, False
        if isinstance(self._layouts, list):
            rows, before = list(map(_described, tensors)), self.addresses
            self.addresses = array("q", [row[0] for row in rows])
            alike = [row[1:] for row in rows] == self._layouts and all(row[0] or 0 in row[3] for row in rows)
            return alike, alike and before == self.addresses
        native = _native()
        assert native is not None  # as `record` had it
        looks = native(tensors, *self._at, True)
        return looks >= 1, looks == 3


def _described(t: Tensor) -> tuple:
    return t.data_ptr(), t.device, t.dtype, t.shape, t.stride()


@functools.cache
def describe_function() -> int | None:
    """The address of torch's C function that describes a tensor as a DLTensor; None where it has none."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if api is None or not hasattr(ctypes, "pythonapi"):
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    table = pointer(api, b"dlpack_exchange_api")
    # DLPackExchangeAPI: its version, an older table, and five functions, of which the fourth describes a tensor.
    return (ctypes.c_void_p * 6).from_address(table)[5] if ctypes.c_uint32.from_address(table).value == 1 else None


@functools.cache
def _native() -> Callable[..., int] | None:
    """`bk_look` of csrc/cpu/look.cpp; None where there is no such library, or a torch without DLPack's C functions."""
    describe = describe_function()
    if not describe or cpu_library().reason is not None:
        return None
    item = ctypes.cast(ctypes.pythonapi.PyList_GetItem, ctypes.c_void_p).value
    function = ctypes.PyDLL(str(cpu_library().path)).bk_look
    function.restype = ctypes.c_int64
    p, q = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (ctypes.py_object, q, p, p, p, p, p, q, ctypes.c_int)

    def look(tensors: list[Tensor], addresses: int, hints: int, layouts: int, room: int, compare: bool) -> int:
        return function(tensors, len(tensors), describe, item, addresses, hints, layouts, room, compare)

    return look
