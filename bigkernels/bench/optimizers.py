"""Makes a case out of optimizers.

A step changes what it works on. So each candidate owns its parameters and states, and goes on from where it is when it
is timed; the gradients, which no step but a clipping one changes, are shared. The check is of the first steps of the
very parameters that are timed later: some of the tensors, of all sizes, are compared with those that the same number of
eager steps gives in float64.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from .._compare import Comparison, compare_all
from .._torch_private import foreach_mul_
from .case import BUILTIN, EAGER, OURS, Candidate, Case, Contest, Missing, Settings

# What the gradients are multiplied with in the steps that are checked: with the same ones in each, Adam's steps would
# be the same whatever its decays. Powers of two, so that they can be taken back exactly.
_FACTORS = (1.0, -1.0, -4.0)
_SCALES = {"start": 0.02, "gradients": 0.01}  # standard deviations; the first as in models
_SPREAD = 8  # tensors compared beside the first and last, the smallest and the largest


class Optimizer(Protocol):
    state: Mapping[Tensor, Mapping[str, object]]

    def step(self) -> object: ...


Build = Callable[[list[Tensor]], Optimizer]


class Problem:
    """Parameters at their start, and their gradients.

    Args:
        checked: which of them are compared.
    """

    def __init__(self, start: Sequence[Tensor], grads: Sequence[Tensor], checked: Sequence[int]):
        self.start, self.grads, self.checked = list(start), list(grads), list(checked)
        self.factor = 1.0

    @classmethod
    def drawn(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str, checked: Sequence[int]):
        generator = torch.Generator(device).manual_seed(0)

        def tensors(scale: float) -> list[Tensor]:
            return [
                torch.randn(s, generator=generator, device=device, dtype=torch.float32).mul_(scale).to(dtype)
                for s in shapes
            ]

        return cls(*map(tensors, _SCALES.values()), checked)

    def part(self, dtype: torch.dtype) -> Problem:
        """A copy of what is compared."""
        pairs = [(self.start[i], self.grads[i]) for i in self.checked]
        copies = ([t.to(dtype, copy=True) for t in tensors] for tensors in zip(*pairs, strict=True))
        return Problem(*copies, range(len(pairs)))

    def scale(self, factor: float) -> None:
        """Have the gradients be what they were drawn as, times `factor`."""
        if factor != self.factor:
            foreach_mul_(self.grads, factor / self.factor)
            self.factor = factor

    def norm(self) -> float:
        """Of all gradients together, as drawn."""
        return sum(g.double().square().sum().item() for g in self.grads) ** 0.5


class Training:
    """A candidate's parameters and what steps them.

    Args:
        states: the names of the optimizer's states that are compared too.
        changes: compare how the parameters changed, not what they are.
        clips: the steps change the gradients, so they work on a copy.
        reduced: only those of the parameters that are compared.
    """

    def __init__(
        self,
        build: Build,
        problem: Problem,
        *,
        states: Sequence[str] = (),
        changes: bool = False,
        clips: bool = False,
        reduced: bool = False,
    ):
        self.problem, self.states, self.changes = problem, states, changes
        self.copied = clips
        numbers = problem.checked if reduced else range(len(problem.start))
        self.params = {i: nn.Parameter(problem.start[i].clone()) for i in numbers}
        self.part = sum(p.numel() for p in self.params.values()) / sum(p.numel() for p in problem.start)
        for i, p in self.params.items():
            p.grad = problem.grads[i].clone() if clips else problem.grads[i]
        self.optimizer = build(list(self.params.values()))

    def step(self) -> None:
        self.optimizer.step()

    def results(self, factors: Sequence[float]) -> dict[str, Tensor]:
        """Take a step with the gradients times each of the factors; what is compared after the last."""
        for factor in factors:
            self._gradients(factor)
            self.optimizer.step()
        self._gradients(1.0)
        start = self.problem.start
        checked = [
            (start[i], self.params[i].detach(), self.optimizer.state[self.params[i]]) for i in self.problem.checked
        ]
        if self.changes:
            results = {"change": torch.cat([(p.double() - s.double()).flatten() for s, p, _ in checked])}
        else:
            results = {"parameters": torch.cat([p.flatten() for _, p, _ in checked])}
        return results | {key: torch.cat([state[key].flatten() for _, _, state in checked]) for key in self.states}

    def state_bytes(self) -> float:
        """What the optimizer keeps for a parameter, on average."""
        kept = (value for p in self.params.values() for value in self.optimizer.state[p].values())
        tensors = {id(t): t for t in kept if isinstance(t, Tensor)}  # some parameters may share one
        return sum(t.nbytes for t in tensors.values()) / sum(p.numel() for p in self.params.values())

    def _gradients(self, factor: float) -> None:
        self.problem.scale(factor)
        if self.copied:
            for i, p in self.params.items():
                p.grad.copy_(self.problem.grads[i])


def compare_norms(
    ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, roundings: float = 1.0
) -> dict[str, Comparison]:
    """The criterion by 2-norms of the errors instead of their maxima, with roundings of bfloat16.

    For states of 8 bits and for the products of Muon: the largest error of a single element says little about the step.
    An element far smaller than the largest of its block is stored to one bit, and steps in the right direction with
    hardly a digit right.
    """

    def difference(a: Tensor, b: Tensor) -> float:
        return (a.double() - b.double()).norm().nan_to_num(float("inf")).item()

    eps = torch.finfo(torch.bfloat16).eps
    return {
        name: Comparison(
            difference(ours[name], value),
            2 * difference(plain[name], value) + roundings * eps * value.double().norm().item(),
        )
        for name, value in exact.items()
    }


def some_of(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The tensors that are compared: the first and the last, the smallest and the largest, and some between."""
    by_size = sorted(range(len(shapes)), key=lambda i: torch.Size(shapes[i]).numel())
    between = range(0, len(shapes), -(-len(shapes) // _SPREAD))
    return sorted({len(shapes) - 1, by_size[0], by_size[-1], *between})


def optimizer_case(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    *,
    settings: Settings,
    ours: Build,
    reference: Build,
    eager: Build | None = None,
    builtin: Build | None = None,
    others: Mapping[str, Build] | None = None,
    peers: Mapping[str, Callable[[str], Build]] | None = None,
    states: Sequence[str] = (),
    norms: bool = False,
    max_norm: float | None = None,
    slow: Collection[str] = (),
    checked: Sequence[int] | None = None,
    factors: Sequence[float] = _FACTORS,
    roundings: float = 1.0,
    others_roundings: float = 16.0,
    bytes: int = 0,
    other_bytes: Mapping[str, int] | None = None,
    flops: int = 0,
    metric: str = "GB/s",
    products: str = "",
) -> Case:
    """A case whose candidates are optimizers of the same parameters.

    Args:
        reference: gives the exact results in float64, and those of PyTorch in `dtype`.
        eager, builtin, others, peers: as in `operator_case`.
        states: the names of the states that are compared beside the parameters.
        norms: compare how the parameters changed, by norms.
        max_norm: the candidates clip the gradients to this norm, all but the reference, which gets clipped ones; those
            that are not ours clip in place.
        slow: the candidates that are timed once, with the compared parameters only.
        checked: the numbers of the parameters that are compared; None: `some_of` them.
        factors: of the gradients, a step that is checked each.
        roundings, others_roundings: see `Contest`.
        bytes, other_bytes: moved by ours, and by candidates that move another number.
    """
    builds: dict[str, Callable[[], Build]] = {}
    if eager is not None:
        builds[EAGER] = lambda: eager
    if builtin is not None:
        builds[BUILTIN] = lambda: builtin
    builds |= {other: lambda build=build: build for other, build in (others or {}).items()}
    builds |= {peer: partial(load, settings.device) for peer, load in (peers or {}).items()}
    builds[OURS] = lambda: ours

    def prepare() -> Contest:
        problem = Problem.drawn(shapes, dtype, settings.device, some_of(shapes) if checked is None else checked)
        clipped = list(factors)
        if max_norm is not None:
            norm = problem.norm()
            clipped = [f * min(1.0, max_norm / (abs(f) * norm + 1e-6)) for f in factors]

        def by_reference(dtype: torch.dtype) -> dict[str, Tensor]:
            return Training(reference, problem.part(dtype), states=states, changes=norms).results(clipped)

        def candidate(name: str, build: Build) -> Candidate:
            training = Training(
                build,
                problem,
                states=states,
                changes=norms,
                reduced=name in slow,
                clips=max_norm is not None and name != OURS,
            )
            return Candidate(
                name,
                results=partial(training.results, factors),
                step=training.step,
                bytes=(other_bytes or {}).get(name, 0),
                part=training.part,
                slow=name in slow,
                state_bytes=training.state_bytes,
            )

        candidates, missing = [], {}
        for name, make in builds.items():
            try:
                candidates.append(candidate(name, make()))
            except Missing as reason:
                missing[name] = str(reason)
        return Contest(
            candidates,
            exact=lambda: by_reference(torch.float64),
            plain=lambda: by_reference(dtype),
            missing=missing,
            roundings=roundings,
            others=others_roundings,
            compare=compare_norms if norms else compare_all,
        )

    # Whatever is done on the host, for many tensors most of the time, is part of a step: no cold caches.
    return Case(
        "optimizers",
        name,
        settings.device,
        str(dtype).removeprefix("torch."),
        None,
        tuple(builds),
        prepare,
        metric=metric,
        bytes=bytes,
        flops=flops,
        cold=False,
        in_place=True,
        products=products,
    )
