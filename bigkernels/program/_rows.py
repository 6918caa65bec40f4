"""The layouts in which models keep the rows of tokens, (B, S): each in front, one after the other, or behind heads."""

from __future__ import annotations

from torch import Tensor


def as_heads(t: Tensor, batch: int, length: int) -> Tensor | None:
    """(B, H, S, D) of a tensor in any of the layouts that models use."""
    if t.dim() == 4 and t.shape[0] == batch and t.shape[2] == length:
        return t
    if t.dim() == 4 and t.shape[:2] == (batch, length):
        return t.transpose(1, 2)
    if t.dim() == 3 and t.shape[1] == length and t.shape[0] % batch == 0:
        return t.unflatten(0, (batch, -1))
    if t.dim() == 5 and t.shape[0] == batch and t.shape[3] == length:
        return t.flatten(1, 2)
    return None


def from_heads(heads: Tensor, like: Tensor, batch: int, length: int) -> Tensor:
    if like.dim() == 4 and like.shape[0] == batch and like.shape[2] == length:
        return heads.reshape(like.shape)
    if like.dim() == 4:
        return heads.transpose(1, 2)
    return heads.reshape(like.shape)


def as_rows(t: Tensor, batch: int, length: int) -> Tensor | None:
    """(rows, width) of a tensor in any of the layouts that models use."""
    if t.dim() >= 3 and t.shape[:2] == (batch, length):
        return t.reshape(batch * length, -1)
    heads = as_heads(t, batch, length)
    if heads is not None:
        return heads.transpose(1, 2).reshape(batch * length, -1)
    if t.dim() >= 2 and t.shape[0] == batch * length:
        return t.reshape(batch * length, -1)
    return None


def from_rows(rows: Tensor, like: Tensor, batch: int, length: int) -> Tensor:
    """Rows in the layout of `like`."""
    if like.shape[:2] == (batch, length) or as_heads(like, batch, length) is None:
        return rows.reshape(like.shape)
    return from_heads(rows.view(batch, length, -1, like.shape[-1]).transpose(1, 2), like, batch, length)
