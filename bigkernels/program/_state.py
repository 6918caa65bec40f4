"""What a model keeps of its program: made at first use, and again when the model is no longer what it was."""

# mypy: ignore-errors

from __future__ import annotations

import inspect
import os
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from .._load import cpu_library
from .._torch_private import KERNELS, LAZY, PROGRAMS, lacks
from ._cache import Description
from ._find import find
from ._ir import Graph
from ._program import Program
from ._quick import Quick
from ._trace import Refused
from ._verify import Output, verify
from ._watch import Snapshot, Watch
from .suspend import disturbance

KEY = "_bigkernels_program"
_KEPT = 3  # states of a model that are remembered: with and without adapters, say
_RANDOM = ("drop", "jitter", "noise")
_forward_ad = torch.autograd.forward_ad


class Defaults(NamedTuple):
    """What a call gets where nothing is given, by the model's configuration."""

    asks: str | None  # for what programs do not give
    use_cache: bool
    as_tuple: bool

    @classmethod
    def of(cls, module: nn.Module) -> Defaults:
        config = module.config
        names = ("output_attentions", "output_hidden_states")
        asks = next((name for name in names if getattr(config, name, False)), None)
        return cls(asks, bool(getattr(config, "use_cache", True)), getattr(config, "return_dict", None) is False)


class _Entry(NamedTuple):
    """One state of a model, and its program or the reason why there is none."""

    snapshot: Snapshot
    watch: Watch
    program: Program | None
    output: Output | None
    reason: str
    defaults: Defaults


class Steps:
    """The program of a causal language model, under `KEY` in the model's `__dict__`.

    Attributes:
        reason: why there is no program, after `ready` returned None.
        output: how logits are returned; `defaults`, and what else the configuration says.
        model: the name of the model's class, after the first call.
        taken, left: how many calls were answered by the program, and by the modules; `why` the last of these.
    """

    def __init__(self, integers: bool | None = None, stored: bool = False) -> None:
        self.integers, self.stored = integers, stored
        self.reason, self.output, self.defaults = "", None, None
        self.taken = self.left = 0
        self.why = self.model = ""
        self._entries: list[_Entry] = []  # the current one first
        self.quick: Quick | None = None  # for a cache that came twice
        self._last: weakref.ref[Description] | None = None  # the cache of the last call
        self._names: tuple[str, ...] = ()
        self._random: str | None = None  # why calls in training are the modules', as of `_mode_of`
        self._mode_of: tuple[Watch, int] | None = None
        self.lock = threading.RLock()
        _all.add(self)

    def __deepcopy__(self, memo: dict) -> Steps:
        return Steps(self.integers, self.stored)

    def __reduce__(self) -> tuple:
        return Steps, (self.integers, self.stored)

    def resolve_arguments(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        if not self._names:
            self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        return dict(zip(self._names, args, strict=False)) | kwargs

    def ready(self, module: nn.Module) -> Program | None:
        """The program of the model as it is now; None with a `reason` where there is none."""
        self.model = type(module).__qualname__
        entry = self._entries[0] if self._entries else None
        now = Watch.TOUCHED if entry is None else entry.watch.look()
        if now != Watch.SAME:
            self.quick = None
        if now != Watch.SAME or (entry.watch, entry.watch.forgiven) != self._mode_of:
            self._random = _random(module)
        if self._random:
            self.reason, self._mode_of = self._random, None
            return None
        if now == Watch.TOUCHED:
            entry = self._changed(module)
        elif now != Watch.SAME:
            entry = self._entries[0] = self._moved(module, entry, now == Watch.MOVED)
        self._mode_of = entry.watch, entry.watch.forgiven
        self.reason, self.output, self.defaults = entry.reason, entry.output, entry.defaults
        return entry.program

    def quickly(self, given: dict[str, Any]) -> Any:
        """What a call gets that is like the last one but for its tokens; None: this is another one."""
        with self.lock:
            quick = self.quick
            if quick is None or _forward_ad._current_level >= 0:
                return None
            cache = given["cache"] if "cache" in given else given.get("past_key_values")
            logits = quick.call(given)
            if logits is None and not (quick.renew(cache) and (logits := quick.call(given)) is not None):
                return None
            self.taken += 1
            self._last = quick.cache
        return self.output.quickly(logits, cache)

    def prepare(self, described: Description, cache: Any) -> None:
        """So that the next call is answered by `quickly`, after one that was answered by the program."""
        last, self._last = self._last, weakref.ref(described)
        if last is None or last() is not described or self.defaults.asks is not None or not self.output.nothing:
            return  # caches that come in turns are not prepared for
        entry, quick = self._entries[0], self.quick
        if quick is None or not quick.is_of(described, entry.watch, entry.program):
            self.quick = Quick.of(self, described, cache, entry.watch, entry.program)

    def release(self) -> None:
        """Let memory go that is replaced now, and copies of codes: the next call makes them again."""
        with self.lock:
            self.quick = None
            for entry in self._entries:
                if entry.program is not None:
                    entry.program.drop()

    def rest(self) -> None:
        """Let copies of codes go while the model trains."""
        entry = self._entries[0] if self._entries else None
        if entry is not None and entry.program is not None and entry.program.panels is not None:
            self.release()

    def status(self) -> str:
        """What is known, for reports."""
        if not self._entries:
            return "decode program, found at first use"
        entry = self._entries[0]
        return f"decode program: {entry.reason}" if entry.program is None else entry.program.describe()

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model or None,
            "state": self.status(),
            "nbytes": self.nbytes,
            "calls": self.taken,
            "by modules": self.left,
            "why": self.why or None,
        }

    @property
    def nbytes(self) -> int:
        """What programs take beside the model: records, tables, and what was made of weights."""
        return sum(e.program.nbytes for e in self._entries if e.program is not None)

    def _changed(self, module: nn.Module) -> _Entry:
        """Of a state that was not there a call ago."""
        snapshot = Snapshot(module.modules())
        known = next((e for e in self._entries if e.snapshot.alike(snapshot)), None)
        others = [e for e in self._entries if e is not known and e.program is not None]
        entry = self._made(module) if known is None else self._moved(module, known, True)
        # Of states that are gone, nothing is kept alive.
        held = {id(t) for t in (*module.parameters(), *module.buffers())}
        others = [e for e in others if held.issuperset(map(id, e.program.reads))]
        for e in others:
            e.program.drop()  # one copy of codes at a time
        self._entries = [entry, *others][:_KEPT]
        return entry

    def _moved(self, module: nn.Module, entry: _Entry, alike: bool) -> _Entry:
        """Of a state that was there before, with tensors elsewhere, or, without `alike`, that lie in another way."""
        program = entry.program
        if program is None:
            return self._made(module)
        try:
            dtype = _dtype(program.graph)
            if alike and dtype == program.dtype:
                program.lower()
                return _Entry(*self._watched(module, program), program, entry.output, "", Defaults.of(module))
            return self._checked(module, program.graph, dtype)
        except Exception:  # noqa: BLE001  the search says what is wrong
            return self._made(module)

    def _made(self, module: nn.Module) -> _Entry:
        reason = unsupported(module)
        if reason is None:
            try:
                graph = find(module)
                if not isinstance(graph, str):
                    return self._checked(module, graph, _dtype(graph))
                reason = graph
            except Refused as refusal:
                reason = str(refusal)
            except Exception as error:  # noqa: BLE001  a check must never break the user's program
                message = (str(error).splitlines() or [""])[0][:100]
                reason = f"the check failed: {type(error).__name__}: {message}"
        return _Entry(*self._watched(module, None), None, None, reason, Defaults.of(module))

    def _checked(self, module: nn.Module, graph: Graph, dtype: torch.dtype) -> _Entry:
        program = Program(graph, dtype, self.integers, self.stored)
        output = verify(module, program)
        return _Entry(*self._watched(module, program), program, output, "", Defaults.of(module))

    def _watched(self, module: nn.Module, program: Program | None) -> tuple[Snapshot, Watch]:
        snapshot = Snapshot(module.modules())
        if program is None:
            return snapshot, Watch(snapshot, list(module.parameters()))
        return snapshot, Watch(snapshot, program.reads, program.lowered.reads.sources)


def unsupported(module: nn.Module) -> str | None:
    """Why a model cannot have a program, as far as that is seen without running it."""
    if cpu_library().reason is not None:
        return f"there are no kernels: {cpu_library().reason}"
    missing = lacks(PROGRAMS) or lacks(LAZY) or lacks(KERNELS)
    if missing:
        return missing
    for t in module.parameters():
        if t.device.type != "cpu":
            return f"a parameter is on {t.device.type}"
    return disturbance(module)


def _dtype(graph: Graph) -> torch.dtype:
    """Of the hidden states that go in."""
    ids, positions = (torch.zeros(1, 1, dtype=torch.int64, device="cpu") for _ in range(2))
    with torch.no_grad():
        return graph.embed(ids, positions).dtype


def _random(module: nn.Module) -> str | None:
    """What draws random numbers in training; None in evaluation, and where nothing does."""
    if not module.training and not any(m.training for m in module.modules()):
        return None
    for m in module.modules():
        if m.training:
            for key, value in (*m.__dict__.items(), *vars(m.__dict__.get("config", m)).items()):
                named = any(part in key for part in _RANDOM) or (
                    key == "p" and isinstance(m, nn.modules.dropout._DropoutNd)
                )
                if named and isinstance(value, float) and value > 0:
                    return f"it is in training, with {key} {value}"
    return None


_all: weakref.WeakSet[Steps] = weakref.WeakSet()


def living() -> list[dict[str, Any]]:
    """The programs of all models of the process, in the order of their names."""
    return sorted((steps.as_dict() for steps in list(_all)), key=lambda found: (found["model"] or "", found["state"]))


def _in_child() -> None:
    for steps in _all:
        steps.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
