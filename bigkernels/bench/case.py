"""What the engine runs: cases, and the candidates that compete in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from .._compare import Comparison, compare_all

EAGER = "eager"
BUILTIN = "builtin"
COMPILE = "compile"
OURS = "bigkernels"
OURS_COMPILED = "bigkernels + compile"


class Missing(Exception):
    """A candidate cannot run here; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What the user chose for a run.

    Attributes:
        device: "cpu" or "cuda".
        quick: small shapes and few rounds, without torch.compile: shows that everything runs, measures nothing well.
        compile: whether torch.compile competes.
        rounds: how often each candidate of a case is timed at least.
        seconds: how long the rounds of a case go on, at least.
        batch, length: of the model family's input.
        model: the folder of the generation family's model; "" is the demo's.
        baseline: a checkout of bigkernels that the generation family measures beside this one.
        candidates: of the generation family, those that compete; () is all of them.
        fresh_memory: let the process give freed memory back, so that large outputs pay for their page faults.
    """

    device: str = "cpu"
    quick: bool = False
    compile: bool = True
    rounds: int = 5
    seconds: float = 3.0
    batch: int = 1
    length: int = 1024
    model: str = ""
    baseline: str = ""
    candidates: tuple[str, ...] = ()
    fresh_memory: bool = False

    @classmethod
    def quickly(cls, device: str = "cpu") -> Settings:
        return cls(device, quick=True, compile=False, rounds=3, seconds=0.1, length=64)


@dataclass(frozen=True)
class Candidate:
    """One way to do the work of a case, on inputs of its own or shared ones.

    Attributes:
        results: does the work once and returns what it computed, by name, to be checked.
        step: does the work once; this is what is timed. It must not change what the other candidates see.
        timed: its step says itself how many seconds the part took that counts; its memory is not measured around it.
        bytes: that it reads and writes, where its formats make that another number than that of the case; else 0.
        part: of the work of the case, which is all that its step does; its times are scaled up to the whole.
        slow: its step takes so long that it is timed once, and its memory is not measured.
        state_bytes: for optimizers, what it keeps from one step to the next, in bytes a parameter.
        kept_bytes: for checkpoints, what it keeps between forward and backward.
        figures: what else is known of it after the timing, by name.
        remark: what has to be said of how it was measured, after the timing; "" is nothing.
    """

    name: str
    results: Callable[[], dict[str, Tensor]]
    step: Callable[[], object]
    bytes: int = 0
    part: float = 1.0
    slow: bool = False
    state_bytes: Callable[[], float] | None = None
    kept_bytes: Callable[[], int] | None = None
    timed: bool = False
    figures: Callable[[], dict[str, float]] | None = None
    remark: Callable[[], str] | None = None

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


@dataclass
class Contest:
    """A case made ready: allocated inputs and the candidates that work on them.

    Attributes:
        exact: the results in float64, made when called.
        plain: the results of the reference in the dtype of the case, made when called.
        missing: name and reason of each candidate that cannot run here.
        roundings: how many roundings the criterion allows ours beyond the error of eager.
        others: how many it allows the candidates of others: they have to compute the same thing, and may round after
            every operation.
        compare: the criterion, called like `compare_all`: by default at the scale of each tensor, as the candidates of
            others round what they add up.
    """

    candidates: list[Candidate]
    exact: Callable[[], dict[str, Tensor]]
    plain: Callable[[], dict[str, Tensor]]
    missing: dict[str, str] = field(default_factory=dict)
    roundings: float = 1.0
    others: float = 16.0
    compare: Callable[..., dict[str, Comparison]] = partial(compare_all, scale="tensor")


@dataclass(frozen=True)
class Case:
    """One line-up: what is computed, how much work that is, and how to make it ready.

    Attributes:
        backward: whether gradients are part of it; None where there are no directions, as in an optimizer's step.
        candidates: the names of those that compete, also of peers that may be missing.
        prepare: makes the case ready; raises `Missing` where none of it can run.
        metric: what the plots show: "GB/s", "TFLOP/s", "us" or "tokens/s".
        bytes: that any implementation has to read and write once: inputs, outputs and gradients.
        only_read: whether hardly any of them are written, so that the read bandwidth is the limit.
        in_place: whether most of them are written where they were read, so that the bandwidth of that is the limit.
        flops: of the matrix products in it; 0 for row operators.
        products: the dtype of those products, where it is not that of the case.
        tokens: processed by a step, for whole models.
        threads: that the case is about; 0 where those of the process are.
        cold: whether a GPU's cache is flushed between steps.
    """

    family: str
    name: str
    device: str
    dtype: str
    backward: bool | None
    candidates: tuple[str, ...]
    prepare: Callable[[], Contest]
    metric: str = "GB/s"
    bytes: int = 0
    flops: int = 0
    tokens: int = 0
    cold: bool = True
    only_read: bool = False
    in_place: bool = False
    products: str = ""
    threads: int = 0

    @property
    def direction(self) -> str:
        return direction(self.backward)

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}, {self.direction}"


def direction(backward: bool | None) -> str:
    if backward is None:
        return "step"
    return "forward + backward" if backward else "forward"
