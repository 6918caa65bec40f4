"""What a launcher does for one layout of its arguments: steps, written out as one function of Python.

A function that is written for its steps allocates, launches and returns; nothing in it looks at what kind a step is.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton

from .._torch_private import below_autograd, cuda_device, empty_cpu, empty_cuda


def _driver() -> Any:
    return triton.runtime.driver.active


class Value(NamedTuple):
    """A tensor in a tape: an argument, or what a step made."""

    index: int


class New(NamedTuple):
    """An allocation."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """A call of an operator of torch, whose result, if any, is the next value."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    several: bool  # whether it returns a tuple
    made: int  # tensors that it returns


class Launched(NamedTuple):
    """A launch: the kernel as it was compiled, its grid and its arguments; at `pointers` (place, value, offset)."""

    run: Callable
    grid: tuple[int, int, int]
    function: int
    metadata: Any
    args: list
    pointers: tuple[tuple[int, int, int], ...]


@dataclass
class Tape:
    """The steps of a launcher, and which values it returns. Value i is argument i, as far as there are arguments.

    Attributes:
        tensors: which arguments are tensors.
        play: the launcher's result, of its arguments and after them the pointers of those that are tensors.
    """

    steps: list[New | Call | Launched]
    results: tuple[int, ...]
    several: bool
    device: int
    arguments: int
    tensors: tuple[int, ...]
    play: Callable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.play = _Writer(self).function()


class Source:
    """Lines of a function, and the objects that they name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.objects: dict[str, Any] = {}

    def named(self, value: Any) -> str:
        """An expression for an object: what it is written as, or a name."""
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = f"o{len(self.objects)}"
        self.objects[name] = value
        return name

    def function(self, parameters: list[str], name: str) -> Callable:
        text = "\n    ".join([f"def {name}({', '.join(parameters)}):", *self.lines])
        exec(compile(text, f"<bigkernels: {name}>", "exec"), self.objects)
        return self.objects[name]


class _Writer(Source):
    """Writes the function of a tape: value i is v<i>, its pointer p<i>."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.pointers = set(tape.tensors)  # of the values whose pointers have been read
        self.read = {value for step in tape.steps if type(step) is Launched for _, value, _ in step.pointers}

    def function(self) -> Callable:
        tape = self.tape
        values, pointers = [f"v{i}" for i in range(tape.arguments)], [f"p{i}" for i in tape.tensors]
        if tape.device >= 0:
            device = self.named(torch.cuda.device)
            self.lines += [
                f"if {self.named(cuda_device)}() != {tape.device}:",
                f"    with {device}({tape.device}):",
                f"        return play({', '.join(values + pointers)})",
            ]
        if any(type(step) is Launched for step in tape.steps):
            self.lines.append(f"stream = {self.named(_driver)}().get_current_stream({max(tape.device, 0)})")
        made = tape.arguments
        for step in tape.steps:
            if type(step) is New:
                self._allocate(step, made)
                made += 1
            elif type(step) is Launched:
                self._launch(step)
            else:
                self._call(step, made)
                made += step.made
        results = ", ".join(f"v{i}" for i in tape.results)
        self.lines.append(f"return ({results},)" if tape.several else f"return {results}")
        return super().function(values + pointers, "play")

    def _allocate(self, step: New, value: int) -> None:
        empty = self.named(empty_cuda if self.tape.device >= 0 else empty_cpu)
        self.lines.append(f"v{value} = {empty}({', '.join(self.named(part) for part in step)})")
        self._point(value)

    def _point(self, value: int) -> None:
        if value in self.read and value not in self.pointers:
            self.pointers.add(value)
            self.lines.append(f"p{value} = v{value}.data_ptr()")

    def _launch(self, step: Launched) -> None:
        args = [self.named(a) for a in step.args]
        for place, value, offset in step.pointers:
            args[place] = f"p{value} + {offset}" if offset else f"p{value}"
        first = [*map(str, step.grid), "stream", self.named(step.function), self.named(step.metadata), *["None"] * 3]
        self.lines.append(f"{self.named(step.run)}({', '.join(first + args)})")

    def _call(self, step: Call, value: int) -> None:
        """An operator of torch, called as below the dispatcher's call of the launcher."""
        args = [self._template(a) for a in step.args]
        args += [f"{name}={self._template(a)}" for name, a in step.kwargs.items()]
        made = ", ".join(f"v{value + i}" for i in range(step.made))
        self.lines += [
            f"with {self.named(below_autograd)}():",
            f"    {made}{',' if step.several else ''} = {self.named(step.function)}({', '.join(args)})",
        ]
        for i in range(step.made):
            self._point(value + i)

    def _template(self, a: Any) -> str:
        if type(a) is Value:
            return f"v{a.index}"
        return f"[{', '.join(map(self._template, a))}]" if isinstance(a, list) else self.named(a)


def reads(step: New | Call | Launched) -> set[int]:
    """The values that a step reads."""
    if type(step) is Launched:
        return {value for _, value, _ in step.pointers}
    return {v.index for v in _values(step.args) + _values(step.kwargs.values())} if type(step) is Call else set()


def _values(args: Any) -> list[Value]:
    found = []
    for a in args:
        found += [a] if type(a) is Value else _values(a) if isinstance(a, list) else []
    return found


def renumbered(step: New | Call | Launched, places: dict[int, int]) -> Any:
    def moved(a: Any) -> Any:
        return Value(places[a.index]) if type(a) is Value else [*map(moved, a)] if isinstance(a, list) else a

    if type(step) is Launched:
        return step._replace(pointers=tuple((place, places[v], offset) for place, v, offset in step.pointers))
    if type(step) is Call:
        return step._replace(args=tuple(map(moved, step.args)), kwargs={n: moved(a) for n, a in step.kwargs.items()})
    return step
