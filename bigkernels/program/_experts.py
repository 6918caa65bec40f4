"""Routed experts whose weights lie in one tensor, and the router before them."""

# mypy: ignore-errors

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..nn.quantized_experts import QuantizedExperts
from ._calls import in_float64
from ._forms import close, plain, random
from ._ir import Experts, ExpertWeights
from ._reference import experts
from ._replay import replay
from ._trace import Ref, Refused, Step, leaves, mapped

if TYPE_CHECKING:
    from ._identify import Builder

_ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu")


def add_experts(b: Builder, number: int) -> None:
    """The operation for a step that is a call of an experts' module.

    Raises:
        Refused: nobody knows what it computes, or what its router does.
    """
    step = b.recorder.steps[number]
    where = b.path(Ref(number, 0))
    x, chosen, weights = _arguments(b, step, where)
    width, top = b._width(Ref(number, 0)), b._width(chosen)
    if b._width(x) != width or b._width(weights) != top:
        raise Refused(f"{where}: its experts take something else than rows, numbers and weights", number)
    key = ("experts", type(step.module), *_settings(step.module))
    if key not in b.memory:
        b.memory[key] = _identify(b, step, x, chosen, weights)
    known = b.memory[key]
    if known is None:
        raise Refused(f"{where}: what its experts compute is not known", number)
    stacked, act, limit, alpha, offset = known
    stacked = ExpertWeights(step.module, *stacked)
    count = _shape(step.module, stacked.down)[0]
    value = b.value(x)
    router = _router(b, weights, chosen, count, top)
    out = b.new(width)
    op = Experts(value, out, stacked, count, top, act, limit=limit, alpha=alpha, up_offset=offset, **router)
    b.values[Ref(number, 0)] = b.add(op, out)


def _arguments(b: Builder, step: Step, where: str) -> tuple[Ref, Ref, Ref]:
    """(rows, numbers of experts, weights)"""
    given = [v for v in leaves((step.args, step.kwargs)) if isinstance(v, Ref)]
    floats = [r for r in given if b.tensor(r).dtype.is_floating_point]
    whole = [r for r in given if not b.tensor(r).dtype.is_floating_point]
    if len(floats) != 2 or len(whole) != 1:
        raise Refused(f"{where}: its experts take something else than rows, numbers and weights", step.number)
    return floats[0], whole[0], floats[1]


def _settings(module: nn.Module) -> tuple:
    simple = (int, float, str, bool)
    held = sorted((k, v) for k, v in vars(module).items() if type(v) in simple)
    return tuple(held), tuple(_shape(module, name) for name in _names(module)), tuple(map(type, module.children()))


def _names(module: nn.Module) -> list[str]:
    named = [n for n, p in module._parameters.items() if p is not None]
    return named + [n for n, m in module._modules.items() if type(m) is QuantizedExperts]


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(getattr(module, name).shape)


def _identify(b: Builder, step: Step, x: Ref, chosen: Ref, weights: Ref) -> tuple | None:
    """The names and layout of the weights, the activation and its limits: what agrees with the module on a few rows."""
    module = step.module
    rows, width = b.rows(b.tensor(x)).shape
    top = b._width(chosen)
    count = _shape(module, next(n for n in _names(module) if len(_shape(module, n)) == 3))[0]
    probe = {
        x: 2 * b.unrows(b.sample(width, 1), b.tensor(x)),
        weights: b.unrows(b.sample(top, 2).abs(), b.tensor(weights)),
        chosen: (torch.arange(rows * top, dtype=torch.int64, device=b.device) % min(2, count)).view(
            b.tensor(chosen).shape
        ),
    }
    if top > 1:  # an expert once a row
        every = torch.arange(top, dtype=torch.int64, device=b.device).expand(rows, top)
        probe[chosen] = every.reshape(b.tensor(chosen).shape).contiguous()

    def fill(leaf):
        return probe.get(leaf, leaf) if isinstance(leaf, Ref) else leaf

    with torch.no_grad():
        calls = []
        for factor in (1, 1e4):  # far enough from zero that limits are met
            probe[x] = factor * probe[x]
            args, kwargs = mapped(fill, step.args), mapped(fill, step.kwargs)
            seeming = {id(t): b.recorder.seeming.get(id(b.tensor(r)), t.dtype) for r, t in probe.items()}
            want = b.rows(in_float64(module, args, kwargs, seeming))
            rows_of = {0: b.rows(probe[x])[None], 1: b.rows(probe[weights])[None]}
            calls.append((rows_of | {2: b.rows(probe[chosen])[None].double()}, want))
        floats = [v for v in vars(module).values() if isinstance(v, (int, float)) and type(v) is not bool]
        for stacked in _layouts(module, width):
            made = ExpertWeights(module, *stacked)
            for act, limit, alpha, offset in _acts(floats):
                options = {"limit": limit, "alpha": alpha, "up_offset": offset}
                op = Experts(0, 3, made, count, top, act, weights=1, chosen=2, **options)
                if all(close(experts(op, given)[0], want, 1e-6) for given, want in calls):
                    return stacked, act, limit, alpha, offset
    return None


def _acts(floats: list[float]) -> Iterator[tuple[str, float, float, float]]:
    for act in _ACTS:
        yield act, 0.0, 1.702, 0.0
    alphas = [f for f in floats if 0 < f < 4] or [1.702]
    for limit, alpha, offset in itertools.product([f for f in floats if f > 0], alphas, (0.0, 1.0)):
        yield "quick_gelu", float(limit), float(alpha), offset
        yield "silu", float(limit), 1.702, offset


def _layouts(module: nn.Module, width: int) -> Iterator[tuple]:
    """Fields of ExpertWeights that the shapes allow, the usual first."""
    names = _names(module)
    stacked = [n for n in names if len(_shape(module, n)) == 3]
    biases = [n for n in names if len(_shape(module, n)) == 2]
    for first, last in itertools.permutations(stacked, 2):
        a, z = _shape(module, first), _shape(module, last)
        for transposed in (False, True):
            both, k = (a[2], a[1]) if transposed else (a[1], a[2])
            inner, out = (z[1], z[2]) if transposed else (z[2], z[1])
            if k != width or out != width or both != 2 * inner:
                continue
            up_bias = next((n for n in biases if _shape(module, n)[1] == both and first in n), None)
            down_bias = next((n for n in biases if _shape(module, n)[1] == width and last in n), None)
            for interleaved, up_first in ((False, False), (True, False), (False, True), (True, True)):
                yield first, last, up_bias, down_bias, transposed, interleaved, up_first


def _router(b: Builder, weights: Ref, chosen: Ref, count: int, top: int) -> dict:
    """The fields of Experts that say who chooses."""
    if weights in b.values and chosen in b.values:
        return {"weights": b.values[weights], "chosen": b.values[chosen]}
    for source in b._sources(weights):
        rows = b.rows(b.tensor(source))
        if rows is None or rows.shape[1] != count or not b.tensor(source).dtype.is_floating_point:
            continue
        choice = _choice(b, source, weights, chosen, count, top)
        if choice is not None:
            return {"logits": b.value(source), **choice}
    raise Refused(f"{b.path(weights)}: what its router does is not known", weights.step)


def _choice(b: Builder, source: Ref, weights: Ref, chosen: Ref, count: int, top: int) -> dict | None:
    logits = 2 * random(b.trace.rows, count, seed=9, device=b.device)
    try:
        replayed = replay(b.recorder, [weights, chosen], {source: b.unrows(logits, b.tensor(source))})
    except Refused:
        return None
    got = _spread(*map(b.rows, replayed), count)
    for sigmoid, renormalize in itertools.product((False, True), repeat=2):
        probability = logits.sigmoid() if sigmoid else logits.softmax(-1)
        best, index = probability.topk(top)
        want = _spread(best / best.sum(-1, keepdim=True) if renormalize else best, index, count)
        scale = (got * want).sum().item() / want.square().sum().item()
        if scale and close(got, scale * want, 1e-7):
            return {"sigmoid": sigmoid, "renormalize": renormalize, "scale": plain(scale)}
    return None


def _spread(weights: Tensor, chosen: Tensor, count: int) -> Tensor:
    out = torch.zeros(weights.shape[0], count, dtype=torch.float64, device=weights.device)
    return out.scatter(1, chosen.long(), weights.double())
