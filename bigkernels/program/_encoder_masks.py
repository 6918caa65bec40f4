"""What masks and biases of a call say: which tokens are padding, and what is left to say of scores."""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _records as records
from ._encoder_call import HIDDEN_BELOW, Given
from ._padding import Refusal
from ._weights import TYPES


@dataclass(frozen=True)
class Scores:
    """Of one layer: a query sees the keys of `seen` (B, S; None: all) that are at most `left` before and `right` after
    it (-1: all), and of which `mask` is True; `bias` is added.
    """

    seen: Tensor | None = None
    left: int = -1
    right: int = -1
    mask: Tensor | None = None
    bias: Tensor | None = None

    def table(self) -> records.ScoresTable:
        made = records.ScoresTable(left=self.left, right=self.right)
        if self.mask is not None:
            made.mask = self.mask.data_ptr()
            made.mask_batch, made.mask_head, made.mask_query, made.mask_key = _steps(self.mask)
        if self.bias is not None:
            made.bias, made.type = self.bias.data_ptr(), TYPES[self.bias.dtype]
            made.bias_batch, made.bias_head, made.bias_query, made.bias_key = _steps(self.bias)
        return made


def _steps(t: Tensor) -> tuple[int, ...]:
    return tuple(step if size > 1 else 0 for size, step in zip(t.shape, t.stride(), strict=True))


def scores_of(names: tuple[str, ...], given: Given) -> Scores:
    """What the arguments `names` say.

    Raises:
        Refusal: a query sees no key, of which every way to write attention makes something else.
    """
    found = Scores()
    for name in names:
        found = _both(found, _checked(given.said[name]) if name in given.said else _look(given.others[name]))
    return found


def _both(a: Scores, b: Scores) -> Scores:
    if b == Scores():
        return a
    if a == Scores():
        return b
    bias = b.bias if a.bias is None else a.bias if b.bias is None else a.bias.float() + b.bias.float()
    only_bias = [s for s in (a, b) if replace(s, bias=None) == Scores()]
    if only_bias:
        other = b if only_bias[0] is a else a
        return replace(other, bias=bias)
    raise Refusal("two masks")


def _look(t: Tensor) -> Scores:
    if t.dtype != torch.bool:
        hidden = t <= HIDDEN_BELOW
        if bool((hidden | (t == 0)).all()):
            t = ~hidden
        elif bool(hidden.any()):
            _check_rows(~hidden)
            return Scores(bias=t)
        else:
            return Scores(bias=t)
    if t.shape[1] > 1 and t.stride(1) != 0:
        _check_rows(t)
        return Scores(mask=t)
    plane = t[:, 0]  # (B, Q, S)
    if plane.shape[1] == 1 or plane.stride(1) == 0:
        keys = plane[:, 0]
        _check_rows(keys)
        return Scores(seen=None if bool(keys.all()) else keys)
    keys = plane.any(1)
    _check_rows(keys)
    seen = None if bool(keys.all()) else keys
    if torch.equal(plane, keys[:, None].expand_as(plane)):
        return Scores(seen=seen)
    length = plane.shape[2]
    at = torch.arange(length, dtype=torch.int64, device=t.device)
    offset = at - at[:, None]
    used = offset[plane.any(0)]
    left, right = -int(used.min()), int(used.max())
    band = (offset <= right) & (offset >= -left)
    if left >= 0 and right >= 0 and torch.equal(plane, band & keys[:, None]):
        return Scores(seen, -1 if left >= length - 1 else left, -1 if right >= length - 1 else right)
    _check_rows(plane)
    return Scores(mask=t)


def _checked(s: Scores) -> Scores:
    if s.seen is not None:
        _check_rows(s.seen)
    return s


def _check_rows(t: Tensor) -> None:
    if not bool(t.any(-1).all()):
        raise Refusal("a token sees no other and not itself")


@dataclass(frozen=True)
class Texts:
    """`sequences`: (n, 3) as `program_encode` takes them, and the scores of each layer among them; `padded`: whether
    tokens are left out."""

    sequences: Tensor
    scores: list[Scores]
    padded: bool


def texts(scores: list[Scores], batch: int, length: int) -> Texts:
    """Without padding where it is at the ends of the texts; else all of their tokens, with masks.

    Raises:
        Refusal: as of `scores_of`.
    """
    seen = next((s.seen for s in scores if s.seen is not None), None)
    whole = torch.empty(batch, 3, dtype=torch.int64, device="cpu")
    whole[:, 0] = torch.arange(batch, dtype=torch.int64, device="cpu")
    whole[:, 1], whole[:, 2] = 0, length
    if seen is None:
        return Texts(whole, scores, False)
    seen = seen.expand(batch, length)
    lengths = seen.sum(1)
    at = torch.arange(length, dtype=torch.int64, device="cpu")
    ends = torch.equal(seen, at < lengths[:, None])
    # A layer that sees all tokens, or is given a mask of its own, reads padding, too.
    alike = all(s.mask is None and s.seen is not None and torch.equal(s.seen.expand_as(seen), seen) for s in scores)
    if ends and alike:
        whole[:, 2] = lengths
        return Texts(whole, scores, True)
    return Texts(whole, [_as_mask(s, length) for s in scores], False)


def _as_mask(s: Scores, length: int) -> Scores:
    if s.seen is None:
        return s
    at = torch.arange(length, dtype=torch.int64, device="cpu")
    offset = at - at[:, None]
    band = torch.ones(length, length, dtype=torch.bool, device="cpu")
    if s.left >= 0:
        band = band & (offset >= -s.left)
    if s.right >= 0:
        band = band & (offset <= s.right)
    mask = (band & s.seen[:, None]).unsqueeze(1)
    _check_rows(mask)
    return replace(s, seen=None, left=-1, right=-1, mask=mask)
