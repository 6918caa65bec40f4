"""Steps inside the backward pass, and gradients added up in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from . import _norm
from ._optimizer import Optimizer, _scaled
from ._schedule import Schedule


class StepInBackward:
    """What `step_in_backward` returns.

    Attributes:
        divisor: divides the gradients of the steps that follow, as `Optimizer.step`'s argument: set it before backward.
    """

    def __init__(self, optimizer: Optimizer, clip: str | None):
        self.divisor: float | Tensor | None = None
        self._optimizer, self._clip = optimizer, clip
        self._schedules: dict[Tensor, Schedule] = {}
        self._squares: list[Tensor] = []
        self._last_norm: Tensor | None = None
        self._held = False
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._look_up()
        self._hooks = [p.register_post_accumulate_grad_hook(self._step) for p in self._places if p.requires_grad]
        optimizer._in_backward = self

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside the block only add up gradients: all but the last of a batch in parts."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def remove(self) -> None:
        """Let `optimizer.step()` take the steps again."""
        for hook in self._hooks:
            hook.remove()
        self._optimizer._in_backward = None

    @torch.no_grad()
    def _step(self, p: Tensor) -> None:
        optimizer, number = self._optimizer, self._number(p)
        if number is None:  # taken out of its group: its gradient stays, as that of any other tensor
            return
        # The first pass that is clipped has no norm to go by: its gradients wait for `step`, which knows them all.
        if self._held or (optimizer.max_grad_norm is not None and self._last_norm is None):
            return
        if optimizer.max_grad_norm is not None:
            self._squares.append(_norm.squares_of(cast(Tensor, p.grad)))
        schedule = self._schedules.get(p)
        if schedule is None or not schedule.holds(optimizer):
            schedule = self._schedules[p] = Schedule(optimizer, [(p, number)])
        optimizer._take(schedule, self.divisor, self._last_norm)
        p.grad = None

    def _look_up(self) -> None:
        groups = self._optimizer.param_groups
        self._places = {p: (n, i) for n, group in enumerate(groups) for i, p in enumerate(group["params"])}

    def _number(self, p: Tensor) -> int | None:
        """Of the group that has a parameter now; None where none does."""
        for again in (False, True):
            if again:
                self._look_up()
                self._schedules = {}
            number, place = self._places.get(p, (0, -1))
            groups = self._optimizer.param_groups
            if number < len(groups) and 0 <= place < len(groups[number]["params"]):
                if groups[number]["params"][place] is p:
                    return number
        return None

    def finish(self, divisor: float | Tensor | None) -> None:
        """`optimizer.step()`: the parameters whose gradients have waited, and the norm of this pass for the next."""
        optimizer, divisor = self._optimizer, self.divisor if divisor is None else divisor
        if hasattr(optimizer, "found_inf"):
            raise RuntimeError(
                "bigkernels.optim.step_in_backward: a GradScaler knows of infinities after the last step was taken; "
                "train in bfloat16, or without it"
            )
        left = [(p, number) for p, number in optimizer._all() if p.grad is not None]
        parts = self._squares
        if optimizer.max_grad_norm is not None:
            parts += [_norm.squares_of(cast(Tensor, p.grad)) for p, _ in left]
        if parts:
            self._last_norm = optimizer._grad_norm = _scaled(_norm.total(parts).sqrt(), None, divisor).float()
        self._squares = []
        if left:
            optimizer._take(Schedule(optimizer, left), divisor, self._last_norm)


def step_in_backward(model: nn.Module, optimizer: Optimizer, *, clip: str | None = None) -> StepInBackward:
    """Step each parameter as soon as its gradient is complete, and free the gradient: no two of them need be held.

    The training loop stays as it is: `optimizer.step()` then only steps what is left over and ends the step for
    schedulers. Works under `fully_shard`. A batch in parts needs `with handle.accumulate():` around all but the last
    backward pass.

    Args:
        model: the model that is trained.
        optimizer: of this package, over parameters of `model`.
        clip: "previous" clips by the norm of the step before, where the optimizer has a `max_grad_norm`: that of a step
            is not known until its last gradient. The first step is taken by `optimizer.step()`, with its own norm.

    Returns:
        A handle: `accumulate()`, `remove()`, and `divisor`, to be set to the number of tokens before backward.

    Raises:
        ValueError: the optimizer clips and `clip` does not say how; the model is wrapped by DistributedDataParallel,
            whose gradients are not yet averaged then; the optimizer has parameters that are not the model's; it steps
            in backward already.
        RuntimeError: at `optimizer.step()`, under a GradScaler.
    """
    name = "bigkernels.optim.step_in_backward"
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name}: optimizer is a {type(optimizer).__name__}; accepted are those of bigkernels.optim")
    if clip not in (None, "previous"):
        raise ValueError(f"{name}: clip is {clip!r}; accepted are 'previous' and None")
    if optimizer.max_grad_norm is not None and clip is None:
        raise ValueError(
            f"{name}: max_grad_norm needs the norm of all gradients, of which none is left at the end; "
            "clip='previous' clips by the norm of the step before"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(f"{name}: DistributedDataParallel averages gradients after they are complete; use fully_shard")
    own = {id(p) for p in model.parameters()}
    if any(id(p) not in own for p, _ in optimizer._all()):
        raise ValueError(f"{name}: the optimizer has parameters that are not the model's")
    if optimizer._in_backward is not None:
        raise ValueError(f"{name}: the optimizer steps in backward already")
    return StepInBackward(optimizer, clip)


def accumulate_in_float32(parameters: Iterable[Tensor]) -> None:
    """Let gradients of 16-bit parameters be float32: what several backward passes add up keeps its digits.

    Gradients then have the dtype that `Tensor.grad_dtype` names; the optimizers of this package read it as it is.
    Divide by the tokens of all passes in the step: `optimizer.step(divisor=tokens)`, of losses that are sums.

    Raises:
        RuntimeError: this torch has no `Tensor.grad_dtype` (2.10 has).
    """
    if not hasattr(Tensor, "grad_dtype"):
        name = "bigkernels.optim.accumulate_in_float32"
        raise RuntimeError(f"{name}: torch {torch.__version__} has no Tensor.grad_dtype")
    for p in parameters:
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16):
            p.grad_dtype = torch.float32


__all__ = ["StepInBackward", "accumulate_in_float32", "step_in_backward"]
