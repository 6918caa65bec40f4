"""What the attention operators share: options, visibility, the dropout mask and the reference for one dense call."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import autocast_dtype, check_same_device, check_same_dtype, check_tensor, own, type_name
from ._registry import compute_dtype

# Of the raw operators. `left` and `right` are the window's ends, -1 where there is none; causal is right = 0.
OPTIONS = "int left, int right, float scale, float softcap, float dropout_p"

_PHILOX = (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85)
_32 = 0xFFFFFFFF


def options(
    op: str, size: int, causal: bool, scale: float | None, window: tuple[int, int] | None, softcap: float | None,
    dropout_p: float,
) -> tuple[int, int, float, float, float]:  # fmt: skip
    """The raw operators' options (left, right, scale, softcap, dropout_p) for queries of `size` elements a head."""
    left, right = (-1, -1) if window is None else _window(op, window)
    if causal:
        right = 0
    if softcap is None:
        softcap = 0.0
    elif not 0 < softcap < float("inf"):
        raise ValueError(f"bigkernels.{op}: softcap is {softcap}, expected positive or None")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"bigkernels.{op}: dropout_p is {dropout_p}, expected in [0, 1)")
    return left, right, size**-0.5 if scale is None else scale, softcap, dropout_p


_UNLIMITED = 2**30  # keys; positions plus windows stay in 32 bits, which is what the kernels of GPUs count with


def _window(op, window):
    if isinstance(window, int) or len(window) != 2 or any(not isinstance(w, int) or w < -1 for w in window):
        raise ValueError(f"bigkernels.{op}: window is {window}, expected (left, right), each -1 (unlimited) or more")
    left, right = window
    return left if left < _UNLIMITED else -1, right if right < _UNLIMITED else -1


def integers(t: Tensor | None, copy: bool) -> Tensor | None:
    """Lengths as the kernels read them, int32; a copy where a backward pass reads them again (`own`)."""
    if t is not None and t.dtype == torch.int64:
        return t.clamp(-(2**31), 2**31 - 1).int()  # what does not fit must not wrap around to what does
    return own(t) if copy else t


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """The key of the dropout mask, from torch's generator of the device; drawn without waiting for it."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device) if dropout_p else None


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inside autocast the queries, keys and values get its dtype, as in `scaled_dot_product_attention`."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def like(x: Tensor, size: int) -> Tensor:
    """An output for queries, keys or values `x`: (B, H, S, size), tokens outside of heads in memory as in `x`.

    The kernels allocate in the same way.
    """
    batch, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, length, heads, size).transpose(1, 2)
    return x.new_empty(batch, heads, length, size)


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, heads: int, **others: Tensor | None) -> None:
    """Dtypes, devices, and that dimension `heads` and the sizes of q, k and v fit; dimensions are checked by then."""
    check_same_device(op, "q", q, k=k, v=v, **others)
    check_same_dtype(op, "q", q, k=k, v=v)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"bigkernels.{op}: k has heads of {k.shape[-1]} elements and q of {q.shape[-1]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"bigkernels.{op}: v has shape {tuple(v.shape)}, expected that of k, {tuple(k.shape)}, "
                         "but for the last dimension")  # fmt: skip
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"bigkernels.{op}: the heads of q, k and v must have at least one element")
    if k.shape[heads] == 0 or q.shape[heads] % k.shape[heads]:
        raise ValueError(f"bigkernels.{op}: q has {q.shape[heads]} heads, not a multiple of k's {k.shape[heads]}")


def check_vectors(op: str, heads: int, **vectors: Tensor | None) -> None:
    """One floating value a query head."""
    for name, value in vectors.items():
        check_tensor(op, name, value, optional=True)
        if value is not None and tuple(value.shape) != (heads,):
            raise ValueError(f"bigkernels.{op}: {name} has shape {tuple(value.shape)}, expected ({heads},), one value "
                             "a query head")  # fmt: skip


def check_integers(op: str, name: str, value: object, shape: tuple[int, ...], *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"bigkernels.{op}: {name} is {type_name(value)}; accepted are int32 and int64 tensors")
    if tuple(value.shape) != shape:
        raise ValueError(f"bigkernels.{op}: {name} has shape {tuple(value.shape)}, expected {shape}")


def visible(queries: int, keys: int, left: int, right: int, prefix: Tensor | None, device: torch.device) -> Tensor:
    """Which keys a query sees: (queries, keys), or (B, 1, queries, keys) with prefix lengths (B,)."""
    at = torch.arange(queries, device=device, dtype=torch.int64)[:, None] + (keys - queries)
    key = torch.arange(keys, device=device, dtype=torch.int64)[None, :]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        seen = seen & (key >= at - left)
    if right >= 0:
        seen = seen & (key <= at + right)
    return seen if prefix is None else seen | (key < prefix.view(-1, 1, 1, 1))


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


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, prefix: Tensor | None, keep: Tensor | None, left: int, right: int, scale: float,
    softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference, which holds all scores. q (B, H, Sq, D), k and v (B, Hk, Sk, D); (out, lse) in the wide dtype."""
    args = (q, k, v, bias, mask, alibi_slopes, sinks, prefix, keep, left, right, scale, softcap, dropout_p)
    if autocast_dtype(q.device) is None:
        return _attend(*args)
    with torch.autocast(q.device.type, enabled=False):  # it would lower the products
        return _attend(*args)


def _attend(q, k, v, bias, mask, alibi_slopes, sinks, prefix, keep, left, right, scale, softcap, dropout_p):
    wide = compute_dtype(q.dtype)
    batch, heads, queries, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    q = q.to(wide).reshape(batch, groups, heads // groups, queries, size)
    scores = (q @ k.to(wide).unsqueeze(2).transpose(-1, -2)).reshape(batch, heads, queries, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if alibi_slopes is not None:
        at = torch.arange(queries, device=q.device, dtype=torch.int64)[:, None] + (keys - queries)
        distance = (at - torch.arange(keys, device=q.device, dtype=torch.int64)).abs().to(wide)
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance
    seen = visible(queries, keys, left, right, prefix, q.device)
    if mask is not None:
        seen = seen & mask
    scores = scores.masked_fill(~seen, float("-inf"))
    # The shift cancels out, so it takes no part in the gradient. A row that sees nothing has none: its weights are 0.
    nothing = scores.new_full((batch, heads, queries, 1), float("-inf"))
    shift = scores.detach().amax(-1, keepdim=True) if keys else nothing
    if sinks is not None:
        sink = sinks.to(wide)[:, None, None]
        shift = torch.maximum(shift, sink.detach())
    shift = shift.masked_fill(shift == float("-inf"), 0.0)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - shift)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), torch.log(total) + shift)[..., 0]
    weights = weights / total
    if keep is not None:
        weights = torch.where(keep, weights / (1 - dropout_p), 0.0)
    weights = weights.reshape(batch, groups, heads // groups, queries, keys)
    out = (weights @ v.to(wide).unsqueeze(2)).reshape(batch, heads, queries, v.shape[-1])
    return out, lse
