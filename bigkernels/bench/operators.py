"""Makes a case out of the functions that compute one operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .._samples import Draw, widen
from ..ops import use
from .case import BUILTIN, COMPILE, EAGER, OURS, OURS_COMPILED, Candidate, Case, Contest, Missing, Settings

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


class Call:
    """A function on given inputs, forward or forward and backward, ready to be repeated.

    The upstream gradients are made once: a scalar output gets 1, as from `loss.backward()`, others random values.
    """

    def __init__(
        self,
        function: Function,
        inputs: Mapping[str, Tensor],
        differentiable: tuple[str, ...],
        part: Callable[[Tensor], Tensor] = lambda result: result,
    ):
        self.function, self.part = function, part
        self.inputs = {k: t.detach().requires_grad_(k in differentiable) for k, t in inputs.items()}
        self.wanted = {k: self.inputs[k] for k in differentiable}
        self.leaves = tuple(self.wanted.values())
        self.upstream: list[Tensor] | None = None

    def outputs(self) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(bool(self.wanted)):
            out = self.function(**self.inputs)
        return out if isinstance(out, tuple) else (out,)

    def results(self) -> dict[str, Tensor]:
        outputs = self.outputs()
        results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
        if self.wanted:
            if self.upstream is None:
                self.upstream = upstream(outputs)
            grads = torch.autograd.grad(outputs, self.leaves, self.upstream)
            results |= {f"grad {name}": grad for name, grad in zip(self.wanted, grads, strict=True)}
        return {name: self.part(result) for name, result in results.items()}

    def forward(self) -> object:
        return self.function(**self.inputs)

    def forward_backward(self) -> object:
        out = self.function(**self.inputs)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), self.leaves, self.upstream)


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    draw = Draw(torch.bfloat16, outputs[0].device, seed=1)  # so that the dtypes get the same values
    return [
        torch.ones_like(out) if out.dim() == 0 else torch.empty_like(out).copy_(draw.normal(*out.shape))
        for out in outputs
    ]


def operator_case(
    family: str,
    name: str,
    *,
    settings: Settings,
    dtype: torch.dtype,
    inputs: Callable[[Draw], dict[str, Tensor]],
    ours: Function,
    eager: Function | None,
    builtin: Function | None = None,
    peers: Mapping[str, Callable[[str], Function]] | None = None,
    differentiable: tuple[str, ...] = (),
    compiled: bool = True,
    ours_compiled: bool = False,
    exact: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
    plain: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
    part: Callable[[Tensor], Tensor] = lambda result: result,
    bytes: int = 0,
    flops: int = 0,
    metric: str = "GB/s",
    cold: bool = True,
    only_read: bool = False,
) -> Case:
    """A case whose candidates are functions with the same tensor arguments.

    Args:
        inputs: draws the arguments, by name.
        ours: the public function; under `use("reference")` in float64 it gives the exact results.
        eager: as models write it; None where that takes too much memory.
        builtin: PyTorch's fused function.
        peers: name -> loader; the loader gets the device and returns a function or raises `Missing`.
        differentiable: the arguments that get gradients; none: forward only.
        compiled: whether torch.compile of `eager` competes, where the settings allow it.
        ours_compiled: whether torch.compile of `ours` does.
        exact, plain: make the results from the inputs, in float64 and in the dtype of the case, where calling `ours` as
            the reference would take too much memory or time.
        part: of each result, what is compared: what `exact` and `plain` give, if that is not all.
    """
    compiled = compiled and settings.compile and eager is not None
    peers = peers or {}
    functions: dict[str, Callable[[], Function]] = {EAGER: lambda: eager} if eager is not None else {}
    if builtin is not None:
        functions[BUILTIN] = lambda: builtin
    if compiled:
        functions[COMPILE] = lambda: cast(Any, torch.compile(eager, dynamic=False))
    functions |= {peer: partial(load, settings.device) for peer, load in peers.items()}
    functions[OURS] = lambda: ours
    if compiled and ours_compiled:
        functions[OURS_COMPILED] = lambda: torch.compile(ours, dynamic=False)

    def prepare() -> Contest:
        if compiled:
            torch.compiler.reset()  # else the second shape of a function is compiled for any shape
        sample = inputs(Draw(dtype, settings.device))

        def reference(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with use("reference"):
                return Call(ours, tensors, differentiable).results()

        candidates, missing = [], {}
        for name, make in functions.items():
            # Some peers write to their inputs, so they get copies.
            call_inputs = {k: t.clone() for k, t in sample.items()} if name in peers else sample
            try:
                call = Call(make(), call_inputs, differentiable, part)
            except Missing as reason:
                missing[name] = str(reason)
                continue
            candidates.append(Candidate(name, call.results, call.forward_backward if differentiable else call.forward))
        return Contest(
            candidates,
            exact=lambda: exact(sample) if exact else reference(widen(sample)),
            plain=lambda: plain(sample) if plain else reference(sample),
            missing=missing,
        )

    return Case(
        family,
        name,
        settings.device,
        str(dtype).removeprefix("torch."),
        bool(differentiable),
        tuple(functions),
        prepare,
        metric=metric,
        bytes=bytes,
        flops=flops,
        cold=cold,
        only_read=only_read,
    )
