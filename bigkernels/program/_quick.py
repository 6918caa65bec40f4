"""A call that is like the one before it but for its tokens, in one native call: csrc/cpu/ops/program_quick.cpp.

Whatever the program has to know of a call (`_forward.py`), of the model (`_watch.py`) and of the cache (`_cache.py`) is
written down once, as words of memory and as objects that have to be the same ones; the native function compares all of
that, runs the step and gives logits. What it does not know is left to them.
"""

# mypy: ignore-errors

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _hooks

from .._load import cpu_library
from .._look import describe_function
from .._torch_private import autocast_anywhere, dispatch_modes, function_modes, is_jit_tracing, transforms
from ..nn import QuantizedEmbedding
from ._cache import TYPES, Description
from ._embedding import Embed
from ._memory_words import Words, of_class, of_dict, of_list, of_tensor
from ._program import Program
from ._trace import Refused
from ._watch import Watch
from ._weights import coded

if TYPE_CHECKING:
    from ._state import Steps

# The keywords that it knows, in the order of `Name` in C.
_NAMES = tuple(
    map(
        sys.intern,
        (
            "input_ids",
            "attention_mask",
            "position_ids",
            "cache",
            "past_key_values",
            "use_cache",
            "return_dict",
            "logits_to_keep",
        ),
    )
)
# What has to be said around a call: no autocast, no modes, no tracing, no transform, no gradients.
_ASKED = (
    (autocast_anywhere, False),
    (function_modes, 0),
    (dispatch_modes, 0),
    (is_jit_tracing, False),
    (transforms, None),
    (torch.is_grad_enabled, False),
)
_GLOBAL_HOOKS = (_hooks._global_forward_hooks, _hooks._global_forward_pre_hooks)
_ROWS = 64
# `Interpreter` in C, before the function of DLPack.
_API = (
    "PyDict_Next",
    "PyObject_Call",
    "PyTuple_GetItem",
    "PyTuple_Pack",
    "PyLong_FromLongLong",
    "PyLong_AsLongLong",
    "Py_DecRef",
    "Py_IncRef",
    "PyErr_Clear",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
)
_METH_O = 8


class Quick:
    """Made by `of` after a call.

    Attributes:
        call: (keyword arguments) gives logits, or None where the call is another one.
        cache: its description.
    """

    def __init__(self, call: Callable[[dict[str, Any]], Tensor | None], known: tuple, died: weakref.ref) -> None:
        self.call, self._known, self._died = call, known, died
        self.cache: weakref.ref[Description] = weakref.ref(known[0])

    def is_of(self, described: Description, watch: Watch, program: Program) -> bool:
        return all(a is b for a, b in zip(self._known, _known(described, watch, program), strict=True))

    def renew(self, cache: Any) -> bool:
        """Whether its cache lost tokens alone, and is known again."""
        described = self._known[0]
        return not described.lease[0] and self._died() is cache is not None and described.renew(cache)

    @classmethod
    def of(cls, steps: Steps, described: Description, cache: Any, watch: Watch, program: Program) -> Quick | None:
        """None where something is not known by words of memory, or the model's own code has a part in each step."""
        tables = program._tables
        if not (
            watch.plain()
            and _makes()
            and not described.static
            and not described.others
            and tables.tabled
            and not program.lowered.calls
            and program.graph.padded
            and type(cache.layers) is list
        ):
            return None
        source = _Source.of(program)
        if source is None:
            return None
        found, codes = _words_of(cache, len(described.dynamic)), None
        if program.panels is not None:
            codes = program.panels.compared()
        if found is None or codes is None:
            return None
        first, second = found
        lines, addresses, words, pieces, sources = watch.compared()
        before, after = first + source.words[0] + codes[0], second + source.words[1] + codes[1]
        addresses = array("q", [a for a, _ in before]) + addresses + array("q", [a for a, _ in after])
        words = array("q", [w for _, w in before]) + words + array("q", [w for _, w in after])
        batch, vocabulary = described.batch, program.vocabulary
        hidden = torch.empty(_ROWS, source.width, dtype=program.dtype, device="cpu")
        options = {"dtype": steps.output.dtype, "device": torch.device("cpu")}
        asked = [id(f) for f, _ in _ASKED] + [id(said) for _, said in _ASKED]
        state = array(
            "q",
            [
                *map(id, _NAMES),
                id(None),
                id(True),
                id(False),
                id(Tensor),
                id(int),
                id(cache),
                id(()),
                0 if source.embed is None else id(source.embed),
                id(torch.empty),
                id(options),
                id(batch),
                id(vocabulary),
                *asked,
                *_array(lines),
                addresses.buffer_info()[0],
                words.buffer_info()[0],
                len(words),
                pieces.buffer_info()[0],
                sources.buffer_info()[0],
                len(pieces) // 3,
                len(sources) // 3,
                described.lease.buffer_info()[0],
                program.lowered.packed.data_ptr(),
                tables.rows.data_ptr(),
                tables.length,
                source.codes,
                source.address,
                source.rows,
                hidden.nbytes // _ROWS,
                TYPES[program.dtype],
                TYPES[steps.output.dtype],
                batch,
                vocabulary,
                steps.defaults.as_tuple,
                *program.graph.counted,
                hidden.data_ptr(),
            ],
        )
        known = _known(described, watch, program)
        held = (
            state.buffer_info()[0],
            state,
            lines,
            addresses,
            words,
            pieces,
            sources,
            options,
            batch,
            vocabulary,
            hidden,
            source,
            known,
        )
        program.hold()
        mine = weakref.ref(steps)
        return cls(_function(held), known, weakref.ref(cache, lambda _: _forget(mine, described)))


@dataclass(frozen=True)
class _Source:
    """Where hidden states come from: rows of a table of numbers or of codes, or what the model's own code gives.

    Attributes:
        words: of the tensors of a table.
        codes: the address of a Weight, or 0.
        address, rows: of a table of numbers.
        held: what these point to.
    """

    words: tuple[Words, Words]
    width: int
    embed: Callable | None = None
    codes: int = 0
    address: int = 0
    rows: int = 0
    held: tuple = ()

    @classmethod
    def of(cls, program: Program) -> _Source | None:
        embed, table = program.graph.embed, program._table
        width = program.graph.widths[program.graph.hidden]
        if table is not None:
            weight = table.weight
            if weight.dtype != program.dtype or not weight.is_contiguous() or weight.dim() != 2:
                return None
            words = of_tensor(weight)
            return words and cls(words, width, None, 0, weight.data_ptr(), weight.shape[0], (weight,))
        if type(embed) is Embed and embed.scale == 1.0 and not embed.positions:
            return cls._coded(embed.tokens, program, width) or cls(([], []), width, embed)
        return cls(([], []), width, embed)

    @classmethod
    def _coded(cls, table: nn.Module, program: Program, width: int) -> _Source | None:
        """Of a quantized embedding whose scales lie in its buffers."""
        if (
            type(table) is not QuantizedEmbedding
            or table.dtype != program.dtype
            or table.qweight.channel is not None
            or table.qweight.order is not None
        ):
            return None
        qweight = table.qweight
        operands = qweight.operands()
        stored = list(qweight.tensors.values())
        read = [t for t in operands[:4] if t is not None]
        words = [of_tensor(t) for t in read]
        if not all(any(t is s for s in stored) and w for t, w in zip(read, words, strict=True)):
            return None
        try:
            codes = coded(operands, qweight.shape[1])
        except Refused:
            return None
        first, second = ([w for part in words for w in part[i]] for i in range(2))
        held = codes, qweight, operands
        return cls((first, second), width, None, ctypes.addressof(codes), 0, codes.n, held)


def _known(described: Description, watch: Watch, program: Program) -> tuple:
    """Objects that are others when something of this is."""
    return described, watch._words, program.lowered, program._tables.made


def _forget(steps: weakref.ref[Steps], described: Description) -> None:
    """Its cache has gone, and another object may come to lie where that was."""
    described.end()
    steps = steps()
    if steps is not None and steps.quick is not None and steps.quick._known[0] is described:
        steps.quick = None


def _words_of(cache: Any, count: int) -> tuple[Words, Words] | None:
    """Of a cache's layers, but not of what these hold: other lengths and buffers end the lease. Where buffers of the
    first `count` lie, which `share_memory_` changes; and of hooks on all modules."""
    first, second = of_list(cache.layers)
    for layer in cache.layers[:count]:
        for name in layer._names:
            words = of_tensor(getattr(layer, name))
            if words is None:
                return None
            second += words[1]
    return of_class(cache) + of_dict(cache.__dict__) + [w for d in _GLOBAL_HOOKS for w in of_dict(d)] + first, second


def _array(numbers: array) -> tuple[int, int]:
    return numbers.buffer_info()


class _MethodDef(ctypes.Structure):
    """PyMethodDef"""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


@functools.cache
def _makes() -> _MethodDef | None:
    """The native function as the interpreter knows functions; None where there is none."""
    describe = describe_function()
    if describe is None or cpu_library().reason is not None or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    functions = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _API]
    library = ctypes.CDLL(str(cpu_library().path))
    library.bk_quick_setup.restype, library.bk_quick_setup.argtypes = None, (ctypes.c_void_p,)
    table = array("q", [*functions, describe])
    library.bk_quick_setup(table.buffer_info()[0])
    return _MethodDef(b"bk_quick", ctypes.cast(library.bk_quick, ctypes.c_void_p).value, _METH_O, None)


def _function(held: tuple) -> Callable[[dict[str, Any]], Tensor | None]:
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    return make(ctypes.addressof(_makes()), held, None)
