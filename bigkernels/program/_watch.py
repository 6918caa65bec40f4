"""What the code of modules reads besides its inputs, and whether it is still what it was.

A program stands for modules whose code it does not run. Users edit modules between calls: attributes, children, hooks,
parameters, the configuration. A `Snapshot` holds all of that; a `Watch` tells before each call, in some ten
microseconds, whether anything was touched: it compares a word of memory for each dictionary, the version that CPython
counts in it (PEP 509), and looks closer only where that differs.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import sys
import types
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._look import Seen
from ..nn._steps import count_steps
from ..nn.quantized import Quantized
from ..quantization._weight import QuantizedWeight
from ._memory_words import Words, of_class, of_dict, of_list, of_set, of_tensor, of_type, same_bytes, same_words
from .suspend import idle

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# What says nothing about the numbers of a step: `training` counts for what draws random numbers, which is asked apart.
_IGNORED = {
    "_qweight",  # made of buffers, and kept
    "_weight",
    "training",
    "generation_config",
    "_previous_max_cache_length",
    "_non_persistent_buffers_set",
    "_bigkernels_patch",
    "_bigkernels_program",
    "_bigkernels_encoder",
}
_OWN = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type, functools.partial)
_OPAQUE = (
    nn.Module,
    Tensor,
    type,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.ModuleType,
    functools.partial,
    QuantizedWeight,
)  # codes and scales are read at each use
# Besides the files of the modules' classes: where functions are that these call, or look up at each call.
_FILES = ("torch.nn.functional", "transformers.masking_utils", "transformers.integrations.sdpa_attention")
_STEADY = ("torch", "bigkernels", "builtins", "__main__")  # or, the last, a script, whose variables come and go
_DEPTH = 4
_SMALL = 65536  # bytes of a buffer that are compared


class Snapshot:
    """Modules and what hangs on them: attributes, parameters, buffers, children, hooks, and containers and objects that
    attributes lead to; and the functions that the files of their classes know.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._holders: dict[int, _Holder] = {}
        self.tensors: list[Tensor] = []  # small ones, whose contents are compared
        self.large: list[Tensor] = []
        files: set[str] = set()
        for module in modules:
            self._module(module)
            files.update(c.__module__ for c in type(module).__mro__)
        for name in [*_FILES, *sorted(f for f in files if f.partition(".")[0] not in _STEADY)]:
            if name in sys.modules:
                self._file(vars(sys.modules[name]))
        self.contents = [t.detach().clone() for t in self.tensors]

    def _module(self, module: nn.Module) -> None:
        held = module.__dict__
        self._holders[id(module)] = _Object(module)
        self._holders.setdefault(id(type(module)), _Class(type(module)))
        self._holders[id(held)] = _Dict(held)
        for name in _OWN[:2]:
            self._holders[id(held[name])] = _Tensors(held[name])
        self._holders[id(held["_modules"])] = _Dict(held["_modules"])
        if type(module) in (nn.Linear, nn.Embedding):  # whose code knows of no others
            for name in _OWN[1:]:
                if not held[name]:
                    del self._holders[id(held[name])]
        for name in _HOOKS:
            self._holders[id(held[name])] = _Hooks(held[name])
        for key, value in held.items():
            if key not in _IGNORED and key not in _OWN and "hook" not in key:
                self._value(value, _DEPTH)
        if not isinstance(module, Quantized):  # whose codes are read at each use
            for t in held["_buffers"].values():
                self._tensor(t)

    def _file(self, names: dict[str, Any]) -> None:
        """The names of a file, and what is registered where it looks attention up."""
        self._holders[id(names)] = _File(names)
        for value in tuple(names.values()):
            shared = getattr(type(value), "_global_mapping", None)
            for held in (shared, value._local_mapping) if isinstance(shared, dict) else ():
                self._holders[id(held)] = _Dict(held)

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
            self._holders[id(value)] = _Object(value)
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
    """Tells what became of a snapshot, and of tensors that programs point to.

    Attributes:
        forgiven: how often something was touched and held the same, but for what snapshots leave out (`training`).
    """

    SAME, TOUCHED, MOVED, CHANGED = range(4)

    def __init__(self, snapshot: Snapshot, tensors: list[Tensor], sources: Sequence[Tensor] = ()) -> None:
        """
        Args:
            tensors: that are looked at besides those of the snapshot; their contents may change.
            sources: those of them whose contents may not, contiguous.
        """
        count_steps()
        self.forgiven = 0
        self._snapshot, self._holders = snapshot, snapshot.holders()
        self._tensors = [*tensors, *snapshot.tensors]
        self._seen: Seen | None = Seen()
        try:
            self._seen.record(self._tensors)
        except RuntimeError:  # one has no address, as on the meta device
            self._seen = None
        self._versions = _versions(snapshot.large)
        self._contents = _Copies(snapshot.tensors if self._seen else ())
        self._sources = _Copies(sources if self._seen else ())
        self._native = same_words()
        self._arm()

    def _arm(self) -> None:
        first, second = [], []
        self._knows_tensors = self._seen is not None
        for holder in self._holders:
            a, b = holder.words()
            first += a
            second += b
        for t in self._tensors if self._knows_tensors else ():
            words = of_tensor(t)
            if words is None:
                self._knows_tensors = False
                break
            first += words[0]
            second += words[1]
        # By address, which is the order in which memory is best read; the second are there if the first are the same.
        words = sorted(first) + sorted(second)
        self._addresses, self._words = (array("q", column) for column in zip(*words, strict=True))
        self._at = self._addresses.buffer_info()[0], self._words.buffer_info()[0], 0, len(words)
        self.lines: array | None = None

    def plain(self) -> bool:
        """Whether words of memory and copies of contents tell all that `look` does."""
        return self._native is not None and self._knows_tensors and not self._snapshot.large

    def compared(self) -> tuple[array, array, array, array, array]:
        """Where that is so: the cache lines of all words in their order, their addresses, what was there, and pieces of
        contents as `bk_same_bytes` takes them. As long as nothing was touched these are the same objects."""
        if self.lines is None:
            self.lines = array("q", dict.fromkeys(address & ~63 for address in self._addresses))
        return self.lines, self._addresses, self._words, self._contents.pieces, self._sources.pieces

    def look(self) -> int:
        """SAME; TOUCHED: modules are not what they were; MOVED: tensors are elsewhere, or have other contents where
        these count; CHANGED: they lie in another way, too, or a small one of the modules' own has other contents.
        """
        native = self._native
        if native is not None and native(*self._at) == self._at[3]:
            if self._knows_tensors and not self._snapshot.large and self._sources.same() and self._contents.same():
                return self.SAME
            return self._tensors_now()
        if not all(h.state_alike(h.take()) for h in self._holders):
            return self.TOUCHED
        self.forgiven += 1
        now = self._tensors_now()
        if now == self.SAME and native is not None:
            self._arm()
        return now

    def _tensors_now(self) -> int:
        try:
            alike, there = (False, False) if self._seen is None else self._seen.look(self._tensors)
        except RuntimeError:
            alike, there = False, False
        if not there:
            return self.MOVED if alike else self.CHANGED
        if _versions(self._snapshot.large) != self._versions or not self._contents.same():
            return self.CHANGED
        return self.SAME if self._sources.same() else self.MOVED


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


class _Copies:
    """Tensors whose contents are compared with copies of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._copies = [t.detach().clone() for t in tensors]
        pieces = zip(tensors, self._copies, strict=True)
        self.pieces = array("q", [n for t, c in pieces for n in (t.data_ptr(), c.data_ptr(), t.nbytes)])
        self._native = same_bytes()

    def same(self) -> bool:
        """Where each of them is must have been looked at."""
        if not self._tensors:
            return True
        if self._native is None:
            return all(map(_same_values, self._tensors, self._copies))
        return bool(self._native(self.pieces.buffer_info()[0], len(self._tensors)))


# ---- what holds something --------------------------------------------------------------------------------------------


class _Holder:
    """An object, kept alive, and what it held."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self.state = self.take()

    def take(self) -> Any:
        raise NotImplementedError

    def state_alike(self, other: Any) -> bool:
        raise NotImplementedError

    def kinds_alike(self, other: Any) -> bool:
        """Whether another state is alike for those who read tensors at each use."""
        return self.state_alike(other)

    def words(self) -> tuple[Words, Words]:
        """Some of these change with the object; the second may be read where the first have not."""
        raise NotImplementedError


class _Object(_Holder):
    """An object's class."""

    def take(self) -> type:
        return type(self.of)

    def state_alike(self, other: type) -> bool:
        return self.state is other

    def words(self) -> tuple[Words, Words]:
        return of_class(self.of), []


class _Class(_Holder):
    """The functions of a class of modules that a call goes through."""

    def take(self) -> tuple:
        return tuple(getattr(self.of, name, None) for name in ("forward", "__call__", "_call_impl"))

    def state_alike(self, other: tuple) -> bool:
        return all(a is b for a, b in zip(self.state, other, strict=True))

    def words(self) -> tuple[Words, Words]:
        return of_type(self.of), []


class _Dict(_Holder):
    def take(self) -> dict:
        return {key: value for key, value in self.of.items() if not isinstance(key, str) or key not in _IGNORED}

    def state_alike(self, other: dict) -> bool:
        mine = self.state
        return mine.keys() == other.keys() and all(_alike(value, other[key]) for key, value in mine.items())

    def words(self) -> tuple[Words, Words]:
        return of_dict(self.of), []


class _File(_Dict):
    """Functions, but for what the interpreter and compilers put there."""

    def take(self) -> dict:
        return {key: f for key, f in self.of.items() if isinstance(f, _FUNCTIONS) and not key.startswith("__")}


class _Tensors(_Dict):
    def kinds_alike(self, other: dict) -> bool:
        return self.state.keys() == other.keys() and all(_kind(t) == _kind(other[key]) for key, t in self.state.items())


class _Hooks(_Dict):
    def take(self) -> dict:
        return {key: hook for key, hook in self.of.items() if not idle(hook)}


class _List(_Holder):
    def take(self) -> list:
        return list(self.of)

    def state_alike(self, other: list) -> bool:
        return len(self.state) == len(other) and all(map(_alike, self.state, other))

    def words(self) -> tuple[Words, Words]:
        return of_list(self.of)


class _Set(_Holder):
    def take(self) -> set:
        return set(self.of)

    def state_alike(self, other: set) -> bool:
        return self.state == other

    def words(self) -> tuple[Words, Words]:
        return of_set(self.of)


def _alike(a: object, b: object) -> bool:
    return (
        a is b
        or (type(a) is type(b) and isinstance(a, _SIMPLE) and a == b)
        or (type(a) is type(b) is tuple and len(a) == len(b) and all(map(_alike, a, b)))
    )


def _kind(t: Tensor | None) -> tuple | None:
    if t is None:
        return None
    return type(t) in (Tensor, nn.Parameter) or type(t), t.shape, t.dtype, t.device, t.layout


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
