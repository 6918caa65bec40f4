"""The dropout mask of attention weights: a function of a seed and of the element's place, on every device alike."""

from __future__ import annotations

import torch
from torch import Tensor

_PHILOX = (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85)
_32 = 0xFFFFFFFF


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """The key of the dropout mask, from torch's generator of the device; drawn without waiting for it."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device) if dropout_p else None


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32-bit product. In two parts: int64 would lose the sign bit."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b
    return (high + (low >> 16)) >> 16, (low + (high << 16)) & _32


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405): 32-bit words held in int64."""
    k0, k1 = seed & _32, (seed >> 32) & _32
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(_PHILOX[0], c0), _multiply(_PHILOX[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX[2]) & _32, (k1 + _PHILOX[3]) & _32
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """A random 32-bit word below this drops its element."""
    return min(int(p * 2**32), 2**32 - 1)


def keep_mask(seed: Tensor, batches: Tensor, heads: int, queries: int, keys: int, p: float) -> Tensor:
    """What dropout keeps: (len(batches), heads, queries, keys), a function of the seed and the element's place alone.

    Element (b, h, i, j) is word (j % 64) // 16 of Philox at counter (j // 64 * 16 + j % 16, i, b * heads + h, 0): one
    evaluation is for 4 rows of 16 neighbours, the width of a vector register.
    """
    device = seed.device
    j = torch.arange(keys, device=device, dtype=torch.int64)
    i = torch.arange(queries, device=device, dtype=torch.int64)[:, None]
    bh = (batches[:, None] * heads + torch.arange(heads, device=device, dtype=torch.int64))[..., None, None]
    shape = torch.broadcast_shapes(bh.shape, i.shape, j.shape)
    counters = (j // 64 * 16 + j % 16, i, bh, torch.zeros_like(bh))
    words = philox(seed, *(t.expand(shape) for t in counters))
    word = (j % 64 // 16).expand(shape)
    chosen = torch.stack(words, -1).gather(-1, word[..., None])[..., 0]
    return chosen >= dropout_threshold(p)
