"""A program against the modules that it stands for, before it is used."""

# mypy: ignore-errors

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _reference
from ._cache import describe
from ._program import Program
from ._trace import Refused
from .suspend import suspended

_TOKENS = (9, 1)  # a prompt, and a token after it
# Distances from what the graph gives in float32, relative to the largest logit. The program's may be at most twice that
# of the modules, four times where it rounds tokens to 8 bits; below these no model is told from another.
_ALLOWED = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_ROUNDED = 8e-2
_MODULES = 0.5  # of the modules themselves: they round after each operation, and a wrong graph is farther away


def cache_name(kind: type) -> str:
    """What a model's forward calls the cache."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def new_cache(module: nn.Module | None) -> Any:
    """An empty cache, as the model makes one where none is given."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache() if module is None else DynamicCache(config=module.config)


class Output(NamedTuple):
    """How a model returns logits and its cache."""

    kind: type
    cache: str  # the name of its field
    dtype: torch.dtype

    nothing: dict[str, None] = {}  # all fields of `kind`, if `quickly` makes the same object as the class does

    def make(self, logits: Tensor, cache: Any, as_tuple: bool) -> Any:
        if self.nothing and not as_tuple:
            return self.quickly(logits, cache)
        out = self.kind(logits=logits, **{self.cache: cache})
        return out.to_tuple() if as_tuple else out

    def quickly(self, logits: Tensor, cache: Any) -> Any:
        """Without the checks of transformers' `ModelOutput`, which cost more than all else here."""
        out = self.kind.__new__(self.kind)
        held = out.__dict__
        held.update(self.nothing)
        held["logits"] = logits
        OrderedDict.__setitem__(out, "logits", logits)
        if cache is not None:
            held[self.cache] = cache
            OrderedDict.__setitem__(out, self.cache, cache)
        return out

    def tried(self, logits: Tensor, cache: Any) -> Output:
        """With `nothing` where that holds."""
        try:
            quick = self._replace(nothing=dict.fromkeys(self.kind.__dataclass_fields__))
            for given in (cache, None):
                a, b = quick.quickly(logits, given), self.kind(logits=logits, **{self.cache: given})
                for x, y in ((vars(a), vars(b)), (dict(a.items()), dict(b.items()))):
                    if list(x) != list(y) or any(x[key] is not y[key] for key in x):
                        return self
        except Exception:  # noqa: BLE001  another version's class
            return self
        return quick


def verify(module: nn.Module, program: Program) -> Output:
    """
    Raises:
        Refused: the program gives other logits than the modules, or these return more than logits.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    batch, size = 2, getattr(module.get_input_embeddings(), "num_embeddings", program.vocabulary)
    ids = torch.randint(size, (batch, sum(_TOKENS)), generator=generator, dtype=torch.int64, device="cpu")
    mask = torch.ones_like(ids)
    if program.graph.padded:
        mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    if not program.graph.position_ids:  # the model counts places
        positions = torch.arange(ids.shape[1], dtype=torch.int64, device="cpu").expand_as(ids).contiguous()
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        with torch.no_grad(), suspended(module):
            theirs, output = _theirs(module, ids, mask, positions)
            ours = _ours(module, program, ids, mask, positions, output.dtype)
            exact = _exactly(module, program, ids, mask, positions)
    finally:
        for m in training:
            m.training = True
    seen = mask.bool()
    scale = exact[seen].abs().max().item()
    error, own = ((made[seen].float() - exact[seen]).abs().max().item() for made in (ours, theirs))
    least = _ROUNDED if program.rounds else _ALLOWED.get(program.dtype, 2e-4)
    if not (error <= max(least * scale, (4 if program.rounds else 2) * own) and own <= max(least, _MODULES) * scale):
        far, near = (x / scale if scale else x for x in (error, own))
        raise Refused(f"it gives other logits than the modules ({far:.1e} from those in float32, and they {near:.1e})")
    return output


def _theirs(module: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Output]:
    """The modules' logits for every token, and how they come."""
    name = cache_name(type(module))
    takes_positions = "position_ids" in inspect.signature(type(module).forward).parameters
    made, cache, seen = [], new_cache(module), 0
    for size in _TOKENS:
        end = seen + size
        given = {"position_ids": positions[:, seen:end]} if takes_positions else {}
        out = type(module).forward(
            module, input_ids=ids[:, seen:end], attention_mask=mask[:, :end], use_cache=True, **{name: cache}, **given
        )
        made.append(out.logits)
        seen = end
    kind = type(out)
    others = [key for key in out.keys() if key not in ("logits", name)] if hasattr(out, "keys") else [kind.__name__]
    if others or out[name] is not cache:
        raise Refused(f"its output has {', '.join(others) or 'another cache'}")
    return torch.cat(made, 1), Output(kind, name, made[0].dtype).tried(made[0], cache)


def _exactly(module: nn.Module, program: Program, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """The graph's logits in float32."""
    graph = program.graph
    hidden = graph.embed(ids, positions).float()
    starts = ids.shape[1] - mask.sum(1)
    ours = _reference.run(graph, hidden, positions, _reference.Cache(graph.layers, new_cache(module)), starts=starts)
    return ours.view(*ids.shape, -1)


def _ours(
    module: nn.Module, program: Program, ids: Tensor, mask: Tensor, positions: Tensor, dtype: torch.dtype
) -> Tensor:
    made, cache, seen = [], new_cache(module if program.graph.owned or program.graph.own_cache else None), 0
    starts = ids.shape[1] - mask.sum(1)
    for size in _TOKENS:
        part = positions[:, seen : seen + size].contiguous()
        hidden = program.graph.embed(ids[:, seen : seen + size], part)
        described = describe(cache, program.shapes, ids.shape[0], size, program.dtype)
        if isinstance(described, str):
            raise Refused(described)
        described.past = seen
        logits = torch.empty(ids.shape[0], size, program.vocabulary, dtype=dtype, device="cpu")
        program.run(hidden, part, starts, int(part.max()), described.packed, described.past, logits, cache)
        described.advance(size)
        made.append(logits)
        seen += size
    return torch.cat(made, 1)
