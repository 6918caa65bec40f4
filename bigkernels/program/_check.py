"""A graph against the model's own code, both in float64."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _reference
from ._ir import Graph
from ._layers import products
from ._products import Drawn, Once
from ._record import Trace, _vocabulary, arguments, new_cache, record
from ._trace import Refused

_ERROR = 1e-5  # relative to the largest logit


def check(model: nn.Module, graph: Graph) -> None:
    """Prefill, a token and a few tokens, of sequences padded on the left where the model takes a mask.

    The weights of linear layers are read once, by the model's own code on the few tokens: a graph's product of the same
    layer and the same numbers is not computed again.

    Raises:
        Refused: they differ.
    """
    vocabulary = _vocabulary(model)
    device = next(p.device for p in model.parameters())
    generator = torch.Generator("cpu").manual_seed(11)

    def tokens(batch, length):
        low = min(8, vocabulary // 2)
        ids = torch.randint(low, vocabulary, (batch, length), generator=generator, dtype=torch.int64, device="cpu")
        return ids.to(device)

    drawn = Drawn()
    with torch.no_grad():
        if "mask" in arguments(model) and graph.padded:  # the second sequence has no padding
            starts = torch.tensor([4, 0], dtype=torch.int64, device=device)
            try:
                _steps(model, graph, [tokens(2, n) for n in (7, 1, 3)], starts, drawn)
            except Refused:
                graph.padded = False
        if "mask" not in arguments(model) or not graph.padded:
            _steps(model, graph, [tokens(2, n) for n in (9, 1, 3)], None, drawn)
        if graph.position_ids:
            pieces = [tokens(2, n) for n in (5, 1)]
            padded = "mask" in arguments(model) and graph.padded
            graph.counted = tuple(
                (s is None or padded) and _counted(model, graph, pieces, s, drawn)
                for s in (None, torch.tensor([3, 0], dtype=torch.int64, device=device))
            )


def _logits(trace: Trace) -> Tensor:
    return trace.recorder.steps[trace.logits.step].outs[trace.logits.number]


def _counted(model: nn.Module, graph: Graph, pieces: list[Tensor], starts: Tensor | None, drawn: Drawn) -> bool:
    """Whether tokens whose positions are not given have those of their places."""
    try:
        _steps(model, graph, pieces, starts, drawn, given=False)
    except Refused:
        return False
    return True


def _steps(
    model: nn.Module, graph: Graph, pieces: list[Tensor], starts: Tensor | None, drawn: Drawn, given: bool = True
) -> None:
    """Products of the first piece are the model's own, unless only positions are looked at (`given` is False); those of
    the others are drawn: their linear layers have other weights, in the model and in the graph.
    """
    cache, own = (new_cache(model if graph.own_cache else None) for _ in range(2))
    ours = _reference.Cache(graph.layers, own)
    past = 0
    for piece in pieces:
        batch, length = piece.shape
        positions = torch.arange(past, past + length, dtype=torch.int64, device=piece.device).expand(batch, -1)
        mask = None
        if starts is not None:
            if graph.position_ids and given:
                positions = (positions - starts[:, None]).clamp_min(0)
            mask = (torch.arange(past + length, dtype=torch.int64, device=piece.device)[None] >= starts[:, None]).long()
        seen = torch.ones(batch, length, dtype=torch.bool, device=piece.device)
        if starts is not None:
            seen = torch.arange(past, past + length, dtype=torch.int64, device=piece.device)[None] >= starts[:, None]
        with products(Once(seen) if given and piece is pieces[0] else drawn):
            theirs = _logits(record(model, piece, positions if given else None, cache, mask))
            hidden = graph.embed.exact(piece, positions)
            computed = _reference.run(graph, hidden, positions, ours, starts=starts)
        past += length
        error = (computed - theirs.view_as(computed)).abs()[seen].max().item()
        scale = theirs.view_as(computed)[seen].abs().max().item()
        if not error <= _ERROR * scale:
            what = "padded on the left" if starts is not None else f"{length} tokens after {past - length}"
            raise Refused(f"(model): what was found differs from the model by {error / scale:.1e}, {what}")
