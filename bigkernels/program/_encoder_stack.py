"""What the layers of an encoder keep of their programs: found at first use, and again when they have changed."""

# mypy: ignore-errors

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._load import cpu_library
from ..ops.registry import log
from ._encoder_call import Form, Given, drawn, names_of
from ._encoder_identify import find_layer
from ._encoder_ir import LayerGraph
from ._encoder_program import EncoderProgram
from ._encoder_reference import run as run_exactly
from ._encoder_reference import scores_of
from ._padding import Refusal
from ._state import _random
from ._trace import Refused
from ._verify import _ALLOWED, _MODULES, _ROUNDED
from ._watch import Snapshot, Watch
from .suspend import disturbance, suspended

KEY = "_bigkernels_encoder"
_KEPT = 8  # forms of calls


class _Key(NamedTuple):
    """One form of a call of all layers."""

    forms: tuple[Form, ...]
    same_scores: tuple[int, ...]
    same_angles: tuple[int, ...]


class Stack:
    """The layers of one encoder, in their order.

    Attributes:
        taken, left: calls answered by a program, and by the modules; `why` the last of these.
    """

    def __init__(self, layers: Sequence[nn.Module] = (), integers: bool | None = None) -> None:
        self.layers, self.integers = list(layers), integers
        self.names = [names_of(layer) for layer in self.layers]
        self.taken = self.left = 0
        self.why = ""
        self.lock = threading.RLock()
        self._forget()
        _all.add(self)

    def _forget(self) -> None:
        self._graphs: dict[tuple[int, Form], LayerGraph | str] = {}
        self._programs: dict[_Key, EncoderProgram | str] = {}
        self._watch: Watch | None = None
        self._mode_of: tuple[Watch, int] | None = None
        self._random: str | None = None

    def __deepcopy__(self, memo: dict) -> Stack:
        import copy

        made = memo[id(self)] = Stack((), self.integers)
        made.layers = copy.deepcopy(self.layers, memo)
        made.names = list(self.names)
        return made

    def __reduce__(self) -> tuple:
        return Stack, (), {"layers": self.layers, "integers": self.integers, "names": self.names}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    # ---- before a call

    def same(self) -> bool:
        """Whether the layers are as they were when their programs were made; if not, these are gone."""
        now = Watch.TOUCHED if self._watch is None else self._watch.look()
        if now in (Watch.SAME,):
            return True
        if now == Watch.MOVED and self._lowered_again():
            return True
        programs, known = self._programs, self._watch is not None
        self._forget()
        for program in programs.values() if known else ():
            if isinstance(program, EncoderProgram):
                program.drop()
        reason = unsupported(self.layers)
        self._reason = reason
        self._watch_all()
        return False

    def _lowered_again(self) -> bool:
        try:
            for program in self._programs.values():
                if isinstance(program, EncoderProgram):
                    program.lower()
        except Exception:  # noqa: BLE001  the search says what is wrong
            return False
        self._watch_all()
        return True

    def _watch_all(self) -> None:
        modules = dict.fromkeys(m for layer in self.layers for m in layer.modules())
        held: dict[int, Tensor] = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
        sources: list[Tensor] = []
        for program in self._programs.values():
            if isinstance(program, EncoderProgram):
                held |= {id(t): t for t in program.reads}
                sources += program.lowered.reads.sources
        self._parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        self._watch = Watch(Snapshot(modules), list(held.values()), sources)

    def versions(self) -> list[int]:
        """How often the layers' parameters have been written to."""
        return [0 if p.is_inference() else p._version for p in self._parameters]

    def ready(self) -> None:
        """
        Raises:
            Refusal: the layers are such as no program may stand for now.
        """
        self.same()
        if self._reason is not None:
            raise Refusal(self._reason)
        if (self._watch, self._watch.forgiven) != self._mode_of:
            self._random = next((r for r in map(_random, self.layers) if r), None)
            self._mode_of = self._watch, self._watch.forgiven
        if self._random:
            raise Refusal(self._random)

    def graph(self, at: int, given: Given) -> LayerGraph:
        """What layer `at` computes of such a call.

        Raises:
            Refusal: nobody knows.
        """
        key = at, given.form
        if key not in self._graphs:
            if len(self._graphs) > _KEPT * len(self.layers):
                self._graphs.clear()
            self._graphs[key] = find_layer(self.layers[at], given.form, given)
        found = self._graphs[key]
        if isinstance(found, str):
            raise Refusal(found)
        return found

    # ---- a call

    def run(self, calls: list[Given]) -> Tensor:
        """What the last layer gives, of what each is given.

        Raises:
            Refusal: no program can.
        """
        hidden = calls[0].hidden
        key = _Key(tuple([given.form for given in calls]), *_patterns(calls))
        program = self._programs.get(key)
        if program is None:
            if len(self._programs) >= _KEPT:
                self._drop()
            program = self._programs[key] = self._made(key, calls)
            self._watch_all()
            self._mode_of = self._watch, self._watch.forgiven
        if isinstance(program, str):
            raise Refusal(program)
        program.refresh(hidden.shape[0] * hidden.shape[1])
        with torch.no_grad():
            out = program.run(calls)
        self.taken += 1
        return out

    def _made(self, key: _Key, calls: list[Given]) -> EncoderProgram | str:
        try:
            graphs = [self.graph(i, given) for i, given in enumerate(calls)]
            program = EncoderProgram(graphs, key.same_scores, key.same_angles, calls[0].hidden.dtype, self.integers)
            self._verify(program, key, calls)
            return program
        except (Refusal, Refused) as refusal:
            return str(refusal)
        except Exception as error:  # noqa: BLE001  a check must never break the user's program
            message = (str(error).splitlines() or [""])[0][:100]
            return f"the check failed: {type(error).__name__}: {message}"

    def _verify(self, program: EncoderProgram, key: _Key, calls: list[Given]) -> None:
        """
        Raises:
            Refused: the program gives other hidden states than the layers.
        """
        device = torch.device("cpu")
        for batch, length in ((3, 13), (1, 5)):
            given: list[Given] = []
            for form, seen in zip(key.forms, calls, strict=True):
                given.append(drawn(form, seen, batch, length, 17, device, exact=False))
            for same, kinds in ((key.same_scores, ("mask", "bias")), (key.same_angles, ("angles",))):
                for i, first in enumerate(same):
                    for name, kind, _ in key.forms[i].parts:
                        if kind in kinds and name in given[first].others:
                            given[i].others[name] = given[first].others[name]
            seen = (scores_of(program.graphs[0], given[0]) > -1).any(1).any(1).expand(batch, length)
            ours = program.run(given).float()
            theirs, exact = given[0].hidden, given[0].hidden.float()
            with torch.no_grad():
                for layer, graph, one in zip(self.layers, program.graphs, given, strict=True):
                    with suspended(layer):
                        out = layer(**Given(one.first, theirs, one.others).everything)
                    theirs = out if isinstance(out, Tensor) else out[0]
                    exact = run_exactly(graph, Given(one.first, exact, one.others)).float()
            scale = exact[seen].abs().max().item()
            error, own = ((t.float()[seen] - exact[seen]).abs().max().item() for t in (ours, theirs))
            least = _ROUNDED if program.rounds else _ALLOWED.get(program.dtype, 2e-4)
            most = max(least * scale, (4 if program.rounds else 2) * own)
            if not (error <= most and own <= max(least, _MODULES) * scale):
                far, near = (x / scale if scale else x for x in (error, own))
                raise Refused(
                    f"it gives other hidden states than the modules ({far:.1e} from those in float32, and "
                    f"they {near:.1e})"
                )

    def refused(self, refusal: Exception) -> None:
        self.left, self.why = self.left + 1, str(refusal)
        _log(type(self.layers[0]).__qualname__, self.why)

    # ---- around

    def _drop(self) -> None:
        for program in self._programs.values():
            if isinstance(program, EncoderProgram):
                program.drop()
        self._programs.clear()

    def release(self) -> None:
        """Let memory go that is replaced now, and copies of codes."""
        with self.lock:
            for program in self._programs.values():
                if isinstance(program, EncoderProgram):
                    program.drop()

    def status(self) -> str:
        found = [p for p in self._programs.values() if isinstance(p, EncoderProgram)]
        if found:
            return found[-1].describe()
        if self.why:
            return f"encoder program: {self.why}"
        return "encoder program, found at first use"

    def as_dict(self) -> dict[str, Any]:
        model = type(self.layers[0]).__qualname__ if self.layers else None
        return {
            "model": model,
            "state": self.status(),
            "nbytes": self.nbytes,
            "calls": self.taken,
            "by modules": self.left,
            "why": self.why or None,
        }

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self._programs.values() if isinstance(p, EncoderProgram))

    _reason: str | None = None
    _parameters: Sequence[Tensor] = ()


def _patterns(calls: list[Given]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each layer the first that is given the same scores, and the same angles: the very same tensors."""
    if all(given.like == 0 for given in calls):
        same = (0,) * len(calls)
        return same, same
    scores: dict[tuple, int] = {}
    angles: dict[tuple, int] = {}
    found: tuple[list[int], list[int]] = ([], [])
    for i, given in enumerate(calls):
        mine = [(n, id(t)) for n, t in given.others.items() if isinstance(t, Tensor)]
        rotations = [(n, *map(id, t)) for n, t in given.others.items() if isinstance(t, tuple)]
        found[0].append(scores.setdefault(tuple(mine), i))
        found[1].append(angles.setdefault(tuple(rotations), i))
    return tuple(found[0]), tuple(found[1])


def unsupported(layers: Sequence[nn.Module]) -> str | None:
    """Why layers cannot have a program, as far as that is seen without running them."""
    if cpu_library().reason is not None:
        return f"there are no kernels: {cpu_library().reason}"
    for layer in layers:
        for t in layer.parameters():
            if t.device.type != "cpu":
                return f"a parameter is on {t.device.type}"
        reason = disturbance(layer)
        if reason is not None:
            return reason
    return None


@functools.lru_cache(maxsize=1024)
def _log(name: str, reason: str) -> None:
    """Once for each reason."""
    log.info("encoder: %s runs its modules: %s", name, reason)


_all: weakref.WeakSet[Stack] = weakref.WeakSet()


def living() -> list[dict[str, Any]]:
    """The stacks of all models of the process."""
    found = [stack.as_dict() for stack in list(_all) if stack.layers]
    return sorted(found, key=lambda one: (one["model"] or "", one["state"]))


def _in_child() -> None:
    for stack in _all:
        stack.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
