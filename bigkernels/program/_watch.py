"""What the code of modules reads besides its inputs, and whether it is still what it was.

A program stands for modules whose code it does not run. Users edit modules between calls: attributes, children, hooks,
parameters, the configuration. A `Snapshot` holds all of that; a `Watch` tells before each call, in some ten
microseconds, whether anything was touched: it compares a word of memory for each dictionary, the version that CPython
counts in it (PEP 509), and looks closer only where that differs.
"""

from __future__ import annotations

import ctypes
import functools
import types
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._load import cpu_library
from .._look import Seen

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# What says nothing about the numbers of a step: `training` counts for what draws random numbers, which is asked apart.
_IGNORED = {"training", "generation_config", "_non_persistent_buffers_set", "_bigkernels_patch", "_bigkernels_program"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CAPTURING = "transformers.utils.output_capturing"  # its hooks do nothing where no outputs are asked for
_OPAQUE = (nn.Module, Tensor, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType,
           functools.partial)  # fmt: skip
_DEPTH = 4
_SMALL = 65536  # bytes of a buffer that are compared


class Snapshot:
    """Modules and what hangs on them: attributes, parameters, buffers, children, hooks, and containers and objects that
    attributes lead to.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._holders: dict[int, _Holder] = {}
        self.tensors: list[Tensor] = []  # small ones, whose contents are compared
        self.large: list[Tensor] = []
        for module in modules:
            self._module(module)
        self.contents = [t.detach().clone() for t in self.tensors]

    def _module(self, module: nn.Module) -> None:
        held = module.__dict__
        self._holders[id(module)] = _Module(module)
        self._holders[id(held)] = _Dict(held)
        for name in ("_parameters", "_buffers"):
            self._holders[id(held[name])] = _Tensors(held[name])
        self._holders[id(held["_modules"])] = _Dict(held["_modules"])
        for name in _HOOKS:
            self._holders[id(held[name])] = _Hooks(held[name])
        for key, value in held.items():
            if key not in _IGNORED and "hook" not in key:
                self._value(value, _DEPTH)
        for t in held["_buffers"].values():
            self._tensor(t)

    def _value(self, value: object, depth: int) -> None:
        if isinstance(value, _SIMPLE) or id(value) in self._holders or depth == 0:
            return
        if isinstance(value, dict):
            self._holders[id(value)] = _Dict(value)
            inner: Iterable = value.values()
        elif isinstance(value, list):
            self._holders[id(value)] = _List(value)
            inner = value
        elif isinstance(value, set):
            self._holders[id(value)] = _Set(value)
            return
        elif isinstance(value, tuple):
            inner = value
        elif isinstance(value, Tensor):
            return self._tensor(value)
        elif isinstance(value, _OPAQUE) or not isinstance(getattr(value, "__dict__", None), dict):
            return
        else:
            self._holders[id(value)] = _Module(value)
            return self._value(value.__dict__, depth)
        for v in tuple(inner):
            self._value(v, depth - 1)

    def _tensor(self, t: Tensor | None) -> None:
        if (
            t is None
            or type(t) not in (Tensor, nn.Parameter)
            or t.device.type != "cpu"
            or t.layout is not torch.strided
        ):
            return
        small = t.is_contiguous() and t.nbytes <= _SMALL
        (self.tensors if small else self.large).append(t)

    def holders(self) -> list[_Holder]:
        return list(self._holders.values())

    def alike(self, other: Snapshot) -> bool:
        """Whether the same objects hold the same; parameters and buffers may be others of the same kind."""
        mine, others = self._holders, other._holders
        return (
            mine.keys() == others.keys()
            and all(type(h) is type(others[key]) and h.kinds_alike(others[key].state) for key, h in mine.items())
            and len(self.contents) == len(other.contents)
            and all(map(_same_values, self.contents, other.contents))
        )

    def __deepcopy__(self, memo: dict) -> None:
        return None


class Watch:
    """Tells whether what a snapshot holds was touched, and whether tensors are where they were and lie as they did.

    Attributes:
        forgiven: how often something was touched and held the same, but for what snapshots leave out (`training`).
    """

    def __init__(self, snapshot: Snapshot, tensors: list[Tensor]) -> None:
        """
        Args:
            tensors: that are looked at besides those of the snapshot; their contents may change.
        """
        self.forgiven = 0
        self._snapshot = snapshot
        self._holders = snapshot.holders()
        self._owners: list[int] = []
        self._begins: list[int] = []
        self._addresses, self._words = array("q"), array("q")
        for i, holder in enumerate(self._holders):
            self._begins.append(len(self._words))
            for address, word in holder.words():
                self._owners.append(i)
                self._addresses.append(address)
                self._words.append(word)
        self._sets = [h for h in self._holders if isinstance(h, _Set)]
        self._tensors = [*tensors, *snapshot.tensors]
        self._seen: Seen | None = Seen()
        try:
            self._seen.record(self._tensors)
        except RuntimeError:  # one has no address, as on the meta device
            self._seen = None
        self._versions = [t._version if not t.is_inference() else 0 for t in snapshot.large]
        self._contents = _Words(snapshot.tensors)
        self._same = _same_words()
        self._at = self._addresses.buffer_info()[0], self._words.buffer_info()[0]

    def untouched(self) -> bool:
        """Whether modules are what they were; holders that were touched and hold the same are forgiven."""
        if self._same is None:
            return all(h.state_alike(h.take()) for h in self._holders)
        count, begin = len(self._words), 0
        while (at := self._same(*self._at, begin, count)) < count:
            holder = self._holders[self._owners[at]]
            self.forgiven += 1
            if not holder.state_alike(holder.take()):
                return False
            begin = self._begins[self._owners[at]]
            for i, (address, word) in enumerate(holder.words(), begin):
                self._addresses[i], self._words[i] = address, word
        return not self._sets or all(h.state_alike(h.take()) for h in self._sets)

    def tensors_untouched(self) -> tuple[bool, bool]:
        """Whether tensors lie as they did, and whether they are where they were, with the small ones' contents."""
        try:
            alike, there = (False, False) if self._seen is None else self._seen.look(self._tensors)
        except RuntimeError:
            alike, there = False, False
        if not there:
            return alike, False
        snapshot = self._snapshot
        if snapshot.large and [t._version if not t.is_inference() else 0 for t in snapshot.large] != self._versions:
            return False, False
        if self._contents.same(self._same) or all(map(_same_values, snapshot.tensors, snapshot.contents)):
            return True, True
        return False, False


class _Words:
    """The memory of tensors, as words."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._addresses, self._words = array("q"), array("q")
        for t in tensors:
            for i in range(-(-t.nbytes // 8)):
                self._addresses.append(t.data_ptr() + 8 * i)
                self._words.append(_word(t.data_ptr() + 8 * i))
        self._at = self._addresses.buffer_info()[0], self._words.buffer_info()[0]

    def same(self, same_words: Callable | None) -> bool:
        count = len(self._words)
        return same_words is not None and same_words(*self._at, 0, count) == count


# ---- what holds something --------------------------------------------------------------------------------------------


class _Holder:
    """An object, kept alive, and what it held."""

    def __init__(self, of: object) -> None:
        self.of = of
        self.state = self.take()

    def kinds_alike(self, other: Any) -> bool:
        return self.state_alike(other)


class _Module(_Holder):
    """An object's class."""

    def take(self) -> type:
        return type(self.of)

    def state_alike(self, other: type) -> bool:
        return self.state is other

    def words(self) -> list[tuple[int, int]]:
        return [_at(self.of, _TYPE)]


class _Dict(_Holder):
    def take(self) -> dict:
        return {key: value for key, value in self.of.items() if not isinstance(key, str) or key not in _IGNORED}

    def state_alike(self, other: dict) -> bool:
        mine = self.state
        if mine.keys() != other.keys():
            return False
        return all(_alike(value, other[key]) for key, value in mine.items())

    def words(self) -> list[tuple[int, int]]:
        return [_at(self.of, _VERSION)]


class _Tensors(_Dict):
    def kinds_alike(self, other: dict) -> bool:
        return self.state.keys() == other.keys() and all(_kind(t) == _kind(other[key]) for key, t in self.state.items())


class _Hooks(_Dict):
    def take(self) -> dict:
        return {key: hook for key, hook in self.of.items() if getattr(hook, "__module__", None) != _CAPTURING}


class _List(_Holder):
    def take(self) -> list:
        return list(self.of)

    def state_alike(self, other: list) -> bool:
        return len(self.state) == len(other) and all(map(_alike, self.state, other))

    def words(self) -> list[tuple[int, int]]:
        # Its length and where its elements are come first: these are not read where they were given back.
        size, items = _at(self.of, _SIZE), _at(self.of, _ITEMS)
        return [size, items, *((items[1] + 8 * i, _word(items[1] + 8 * i)) for i in range(size[1]))]


class _Set(_Holder):
    def take(self) -> set:
        return set(self.of)

    def state_alike(self, other: set) -> bool:
        return self.state == other

    def words(self) -> list[tuple[int, int]]:
        return []


def _alike(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _SIMPLE) and a == b) or (
        type(a) is type(b) is tuple and len(a) == len(b) and all(map(_alike, a, b)))  # fmt: skip


def _kind(t: Tensor | None) -> tuple | None:
    if t is None:
        return None
    return type(t) in (Tensor, nn.Parameter) or type(t), t.shape, t.dtype, t.device, t.layout


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# ---- CPython's memory ------------------------------------------------------------------------------------------------

_TYPE, _SIZE, _VERSION, _ITEMS = 8, 16, 24, 24  # bytes into PyObject, PyVarObject, PyDictObject and PyListObject


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _at(of: object, offset: int) -> tuple[int, int]:
    address = id(of) + offset
    return address, _word(address)


@functools.cache
def _same_words() -> Callable[[int, int, int, int], int] | None:
    """`bk_same_words` of csrc/cpu/look.cpp; None where there is no library, or an interpreter that counts no versions:
    then everything is compared at each call.
    """
    if cpu_library().reason is not None or not _counts_versions():
        return None
    function = ctypes.CDLL(str(cpu_library().path)).bk_same_words
    function.restype = ctypes.c_int64
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return function


def _counts_versions() -> bool:
    """Whether this interpreter has the words where they are looked for: tried on a module."""
    module = nn.Linear(1, 1, device="cpu", dtype=torch.float32)
    held, items = module.__dict__, [1, 2]

    def edit(change: Callable[[], object], of: object) -> bool:
        before = _at(of, _VERSION)[1]
        change()
        return _at(of, _VERSION)[1] != before

    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float32, device="cpu"))
    hook = []
    changes = (
        (lambda: setattr(module, "x", 1.5), held), (lambda: setattr(module, "x", 2.5), held),
        (lambda: held.update(x=3.5), held), (lambda: delattr(module, "x"), held),
        (lambda: held.setdefault("y", 1), held), (lambda: held.pop("y"), held), (lambda: module.train(False), held),
        (lambda: setattr(module, "weight", weight), module._parameters),
        (lambda: hook.append(module.register_forward_hook(print)), module._forward_hooks),
        (lambda: hook[0].remove(), module._forward_hooks),
        (lambda: module._modules.update(a=None), module._modules), (lambda: module._modules.clear(), module._modules),
    )  # fmt: skip
    if ctypes.sizeof(ctypes.c_void_p) != 8 or not all(edit(*change) for change in changes):
        return False
    listed = _word(_at(items, _ITEMS)[1] + 8) == id(items[1]) and _at(items, _SIZE)[1] == 2
    return listed and _at(module, _TYPE)[1] == id(nn.Linear)
