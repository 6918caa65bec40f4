"""The arguments of an encoder's layer: what they are, and others of the same form."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._forms import random
from ._padding import Refusal

_PLAIN = (bool, int, float, str, type(None))
HIDDEN_BELOW = -1e30  # scores of at most this hide a key: nothing that is added to them matters


class Form(NamedTuple):
    """What is told apart of a layer's arguments: names with "mask", "bias", "angles", "positions", or a plain value."""

    width: int
    dtype: torch.dtype
    parts: tuple[tuple[str, str, Any], ...]

    def names(self, kind: str) -> tuple[str, ...]:
        return tuple(name for name, k, _ in self.parts if k == kind)


@dataclass
class Given:
    """A call's hidden states, and what else the layer is given, by name.

    Attributes:
        said: what is known of masks among the others that nobody has built yet.
        form: of the call.
        like: the first layer of the call that is given the very same.
    """

    first: str
    hidden: Any
    others: dict[str, Any] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)
    form: Form | None = None
    like: int = 0

    @property
    def everything(self) -> dict[str, Any]:
        return {self.first: self.hidden, **self.others}


def resolve_arguments(layer: nn.Module, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Given:
    """
    Raises:
        Refusal: they are none of an encoder's layer.
    """
    if len(args) > len(names):
        raise Refusal("more arguments than it has names for")
    given = dict(zip(names, args, strict=False)) | kwargs
    first = names[0] if names else ""
    if first not in given:
        raise Refusal("no hidden states")
    hidden = given.pop(first)
    return Given(first, hidden, given)


def same_others(a: Given, b: Given) -> bool:
    """Whether two layers are given the very same."""
    mine, others = a.others, b.others
    if len(mine) != len(others):
        return False
    for name, value in mine.items():
        if name not in others or others[name] is not value:
            return False
    return True


def names_of(layer: nn.Module) -> tuple[str, ...]:
    parameters = inspect.signature(type(layer).forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in plain)[1:]


def form_of(given: Given) -> Form:
    """
    Raises:
        Refusal: there is something of which nobody knows what it says.
    """
    x = given.hidden
    batch, length, width = x.shape
    parts = []
    for name, value in given.others.items():
        if type(value) in _PLAIN:
            if name in ("output_attentions", "output_hidden_states") and value:
                raise Refusal(f"{name} is asked for")
            parts.append((name, "plain", value))
        elif name in given.said:
            bool_ = value.dtype == torch.bool
            parts.append((name, "mask", 1) if bool_ else (name, "bias", (1, value.dtype)))
        elif isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu":
            parts.append((name, *_kind(name, value, batch, length)))
        elif isinstance(value, tuple) and len(value) == 2 and all(type(t) is Tensor for t in value):
            cos, sin = value
            if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[:2] != (1, length) or cos.dtype != sin.dtype:
                raise Refusal(f"{name} are other angles for each text")
            parts.append((name, "angles", (cos.shape[2], cos.dtype)))
        else:
            raise Refusal(f"{name} is a {type(value).__name__}")
    return Form(width, x.dtype, tuple(parts))


def _kind(name: str, t: Tensor, batch: int, length: int) -> tuple[str, Any]:
    if t.dim() == 4 and t.shape[0] in (1, batch) and t.shape[2] in (1, length) and t.shape[3] == length:
        if t.dtype == torch.bool:
            return "mask", t.shape[1]
        if t.dtype in (torch.float32, torch.bfloat16, torch.float16):
            return "bias", (t.shape[1], t.dtype)
    if t.dim() == 2 and t.dtype == torch.int64 and t.shape[1] == length:
        return "positions", None
    raise Refusal(f"{name} is {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}")


def drawn(
    form: Form, given: Given, batch: int, length: int, seed: int, device: torch.device, exact: bool = True
) -> Given:
    """Other arguments of the same form: the last sequence has padding at its end, if there is a mask."""
    dtype = torch.float64 if exact else form.dtype
    made = Given(given.first, random(batch, length, form.width, seed=seed, device=device).to(dtype))
    seen = torch.ones(batch, length, dtype=torch.bool, device=device)
    seen[-1, length - 2 :] = False
    for i, (name, kind, what) in enumerate(form.parts):
        if kind == "plain":
            made.others[name] = what
        elif kind == "positions":
            made.others[name] = torch.arange(length, dtype=torch.int64, device=device).expand(1, -1).clone()
        elif kind == "mask":
            made.others[name] = seen[:, None, None].expand(batch, what, length, length).contiguous()
        elif kind == "bias":
            heads, kept = what
            # The first says what is seen; others are added.
            if i == min(j for j, part in enumerate(form.parts) if part[1] == "bias") and not form.names("mask"):
                t = torch.zeros(batch, heads, length, length, dtype=torch.float64, device=device)
                t = t.masked_fill(~seen[:, None, None], torch.finfo(kept).min)
                if heads > 1:
                    t = random(1, heads, length, length, seed=seed + 50 + i, device=device)
            else:
                t = random(1, heads, length, length, seed=seed + 50 + i, device=device)
            made.others[name] = t.to(kept)
        else:
            rotary, kept = what
            half = random(1, length, rotary, seed=seed + 90 + i, device=device)
            # As rotary modules give them: each angle twice, in whatever layout was seen.
            angle = _like_angles(half, given.others[name][0])
            made.others[name] = (angle.cos().to(kept), angle.sin().to(kept))
    return made


def _like_angles(t: Tensor, seen: Tensor) -> Tensor:
    """Random angles repeated as those of a real call are."""
    n = t.shape[-1]
    if n % 2 == 0:
        if torch.equal(seen[..., : n // 2], seen[..., n // 2 :]):
            return torch.cat((t[..., : n // 2],) * 2, -1)
        if torch.equal(seen[..., ::2], seen[..., 1::2]):
            return t[..., : n // 2].repeat_interleave(2, -1)
    return t


def collects() -> bool:
    """Whether transformers collects outputs of modules by its hooks in this call."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    return bool(collector is not None and collector.get())
