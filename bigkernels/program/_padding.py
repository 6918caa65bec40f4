"""Attention masks as a program knows them: causal, in windows, with padding before the first token of a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._memory_words import all_set

_INTEGERS = (torch.int64, torch.bool)


class Refusal(Exception):
    """Why a call is not the program's."""


def starts_of(mask: Any, batch: int, tokens: int, past: int, windows: Iterable[int]) -> Tensor | None:
    """(batch,) the first token of each sequence that is no padding; None where there is no padding.

    Args:
        mask: None; (B, past + tokens), zero where a token is padding; what transformers makes of that for caches of a
            fixed size, (B or 1, 1, tokens, slots), slot j being token j; or a mapping of kinds of layers to such.
        tokens: the new ones, after `past`.
        windows: of the program's layers: how many keys a token sees, 0 for all.

    Raises:
        Refusal: the mask says anything else.
    """
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        return _of_kinds(mask, batch, tokens, past, set(windows))
    if type(mask) is not Tensor or not mask.is_cpu:
        raise Refusal(f"the mask is a {type(mask).__name__}")
    if mask.dim() == 4:
        return _of_slots([(window, mask) for window in set(windows)], batch, tokens, past)
    if mask.dim() != 2 or mask.shape[1] != past + tokens or mask.shape[0] != batch:
        raise Refusal(f"the mask is {tuple(mask.shape)} for {past + tokens} tokens")
    if _all(mask):
        return None
    mask = mask.bool()
    if (mask[:, 1:] < mask[:, :-1]).any():
        raise Refusal("the mask hides others than the first tokens")
    return past + tokens - mask.sum(1)


def _all(mask: Tensor) -> bool:
    # An operator of torch costs twenty times as much where a step has just swept the caches.
    if mask.dtype in _INTEGERS and mask.is_contiguous() and (native := all_set()) is not None:
        return bool(native(mask.data_ptr(), mask.numel(), mask.itemsize))
    return bool(mask.all())


def _of_kinds(masks: Mapping, batch: int, tokens: int, past: int, windows: set[int]) -> Tensor | None:
    given = {"full_attention": {0}, "sliding_attention": windows - {0}}
    if not masks or not masks.keys() <= given.keys() or any(not given[kind] for kind in masks):
        raise Refusal(f"there are masks for {', '.join(map(str, masks)) or 'nothing'}")
    pairs = [(window, mask) for kind, mask in masks.items() for window in given[kind]]
    if {window for window, _ in pairs} != windows:
        raise Refusal("some layers have no mask")
    if all(mask is None for _, mask in pairs):
        return None
    if any(type(mask) is not Tensor or mask.dim() != 4 or not mask.is_cpu for _, mask in pairs):
        raise Refusal("masks of different kinds")
    return _of_slots(pairs, batch, tokens, past)


def _of_slots(pairs: list[tuple[int, Tensor]], batch: int, tokens: int, past: int) -> Tensor | None:
    """Of masks (B or 1, 1, tokens, slots) for windows: there have to be starts that give all of them."""
    seen = [(window, _visible(mask)) for window, mask in pairs]
    for _, mask in seen:
        if mask.shape[:3] not in ((batch, 1, tokens), (1, 1, tokens)) or mask.shape[3] < past + tokens:
            raise Refusal(f"a mask is {tuple(mask.shape)} for {past + tokens} tokens")
    starts = torch.zeros(1, dtype=torch.int64, device="cpu")
    query = torch.arange(past, past + tokens, dtype=torch.int64, device="cpu")
    for window, mask in seen:
        first = mask[:, 0].to(torch.uint8).argmax(2)  # key that each new token sees
        of_window = (query - window + 1).clamp_min(0) if window else torch.zeros_like(query)
        starts = torch.maximum(starts, torch.where(first > of_window, first, 0).amax(1))
    for window, mask in seen:
        if not torch.equal(mask, _expected(starts, query, window, mask.shape[3]).expand_as(mask)):
            raise Refusal("the mask is not causal with padding in front")
    return starts.expand(batch).contiguous() if starts.any() else None


def _visible(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise Refusal(f"a mask is {mask.dtype}")
    visible = mask == 0
    if not (visible | (mask <= torch.finfo(mask.dtype).min)).all():
        raise Refusal("a mask adds to the scores")
    return visible


def _expected(starts: Tensor, query: Tensor, window: int, slots: int) -> Tensor:
    """(B, 1, tokens, slots)"""
    key, query = torch.arange(slots, dtype=torch.int64, device="cpu"), query.unsqueeze(1)
    seen = (key <= query) & (key >= starts.view(-1, 1, 1))
    return (seen & (key > query - window) if window else seen).unsqueeze(1)
