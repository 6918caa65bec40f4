"""`find`: the graph of a model, compared with the model's own code before anybody gets it."""

# mypy: ignore-errors

from __future__ import annotations

from torch import nn

from ._calls import enclosing
from ._check import check
from ._identify import Builder
from ._ir import Graph
from ._layers import products
from ._products import Drawn
from ._record import Trace, arguments, traced
from ._trace import ModuleCall, Refused
from .suspend import disturbance


def find(model: nn.Module) -> Graph | str:
    """What a causal language model computes, or why it has no program.

    The model's own code runs on a few tokens, in float64 where it matters; what it computed is told from the numbers
    and then compared with it on other tokens, lengths and paddings. Nothing is kept on the model, and no weight is
    copied.

    Args:
        model: takes `input_ids` and a cache, and gives `.logits`.
    """
    try:
        reason = disturbance(model)
        if reason is not None:
            raise Refused(reason)
        with products(Drawn()):  # what lies between products is looked for: any weights will do
            graph = _told(model)
        check(model, graph)
        return graph
    except Refused as refused:
        return str(refused)
    except Exception as error:  # noqa: BLE001  whatever a model does, it is left to its modules
        message = (str(error).splitlines() or [""])[0][:120]
        return f"(model): the search failed: {type(error).__name__}: {message}"


def _told(model: nn.Module) -> Graph:
    """A graph that nobody compared yet."""
    names = arguments(model)
    trace = traced(model)
    if trace.recorder.reads is not None:
        raise Refused(f"{trace.recorder.reads or '(model)'}: its code looks at numbers that it computed")
    graph = _built(trace)
    graph.layers = 1 + max((*(u.layer for u in trace.updates), *graph.owned), default=-1)
    graph.own_cache = trace.own_cache
    graph.position_ids = "positions" in names
    graph.modules = list(model.modules())
    return graph


def _built(trace: Trace) -> Graph:
    """The graph, with code that nobody knows as calls: of the innermost module that will do, or of recorded steps."""
    first = None
    for steps, cached in ((False, False), (True, False), (True, True)):
        opaque: list[ModuleCall] = []
        while True:
            try:
                return Builder(trace, opaque, steps).build()
            except Refused as refused:
                first = first or refused
                more = _more(trace, refused.step, opaque, cached)
                if not more:
                    break
                opaque += more
    raise first


def _more(trace: Trace, step: int | None, opaque: list[ModuleCall], cached: bool) -> list[ModuleCall]:
    """What else to leave to its own code, after a step that is not known."""
    if step is None:
        return []
    return (cached and enclosing(trace, step, opaque, True)) or enclosing(trace, step, opaque)
