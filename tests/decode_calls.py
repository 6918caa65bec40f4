"""Arguments of the raw operator `decode_attention` for caches of any form, and the check of what it returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bigkernels._compare import compare
from bigkernels.ops import decode_attention as op


def paged(caches: list[Tensor | None], lengths: list[int], page: int) -> tuple[list[Tensor | None], Tensor]:
    """The tokens (B, N, ...) in pages in a random order, and the block table; the rest of the pages is NaN or 99."""
    used = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(used) + 2).tolist()
    table = torch.full((len(lengths), max(1, *used) + 1), -5, dtype=torch.int32)
    places = iter(order)
    for b in range(len(lengths)):
        for i in range(used[b]):
            table[b, i] = next(places)
    made = []
    for cache in caches:
        if cache is not None:
            hidden = 99 if cache.dtype == torch.int8 else float("nan")
            pages = cache.new_full((len(order), page, *cache.shape[2:]), hidden)
            for b, n in enumerate(lengths):
                for i in range(used[b]):
                    tokens = cache[b, i * page : min(n, (i + 1) * page)]
                    pages[table[b, i], : len(tokens)] = tokens
            cache = pages
        made.append(cache)
    return made, table


def decode_arguments(
    lengths: list[int],
    queries: int = 1,
    heads: int = 4,
    groups: int = 2,
    size: int = 32,
    value_size: int | None = None,
    *,
    page: int = 0,
    int8: bool = False,
    left: int = -1,
    softcap: float = 0.0,
    alibi: bool = False,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    capacity: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple:
    batch, capacity = len(lengths), max(lengths) if capacity is None else capacity
    q = torch.randn(batch, queries, heads, size).transpose(1, 2).to(device, dtype)
    caches, scales = [], []
    for n in (size, value_size or size):
        if int8:
            caches.append(torch.randint(-127, 128, (batch, capacity, groups, n), dtype=torch.int8))
            scales.append(torch.rand(batch, capacity, groups) / 40)
        else:
            caches.append(torch.randn(batch, capacity, groups, n).to(dtype))
            scales.append(None)
    table = None
    if page:
        (*caches, k_scale, v_scale), table = paged(caches + scales, lengths, page)
        scales = [k_scale, v_scale]
    vectors = [torch.rand(heads) * 0.1 if alibi else None, torch.randn(heads).to(dtype) if sinks else None]
    tensors = [*caches, torch.tensor(lengths, dtype=torch.int32), table, *scales, *vectors]
    return q, *(t if t is None else t.to(device) for t in tensors), left, size**-0.5, softcap


def check_decoded(found: tuple[Tensor, Tensor], args: tuple) -> None:
    def wide(t: object) -> object:
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    exact, plain = op._reference(*map(wide, args)), op._reference(*args)
    for name, ours, p, e in zip(("out", "lse"), found, plain, exact, strict=True):
        comparison = compare(ours, p.to(ours.dtype), e, scale="row")
        assert comparison.ok, f"{name}: {comparison}"


def append_twice(
    write: Callable[..., Tensor],
    lengths: list[int],
    new: int,
    *,
    page: int = 0,
    int8: bool = False,
    rotary: int = 0,
    interleaved: bool = False,
    size: int = 24,
    value_size: int = 20,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Tensor, Tensor], None] = lambda k, v: None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What `write`, a raw `append_kv_`, and the reference make of the same cache and new tokens, `change`d before."""
    batch, capacity, heads = len(lengths), max(*lengths, 1) + 3, 3
    q = torch.randn(batch, new, 2 * heads, size).to(dtype).transpose(1, 2)
    k, v = torch.randn(batch, heads, new, size).to(dtype), torch.randn(batch, new, heads, value_size).to(dtype)
    v = v.transpose(1, 2)
    change(k, v)
    kind = torch.int8 if int8 else dtype
    caches = [torch.randint(-99, 99, (batch, capacity, heads, n)).to(kind) for n in (size, value_size)]
    scales = [torch.rand(batch, capacity, heads) if int8 else None for _ in range(2)]
    table = None
    if page:
        used = batch * (capacity // page + 1)
        caches = [t.new_zeros(used + 20, page, heads, t.shape[-1]).random_(-99, 99) for t in caches]
        scales = [None if t is None else torch.rand(used + 20, page, heads) for t in scales]
        table = torch.randperm(used + 20)[:used].view(batch, -1).int()
    cos = sin = None
    if rotary:
        cos, sin = (torch.randn(1 if new == 2 else batch, new, rotary).to(dtype) for _ in range(2))
    results = []
    for append in (write, op._append_fallback):
        written = [t if t is None else t.clone() for t in (*caches, *scales)]
        rotated = append(
            q, k, v, *written[:2], torch.tensor(lengths, dtype=torch.int32), table, cos, sin, *written[2:], interleaved
        )
        assert rotated.stride() == op._append_fake(q).stride()
        results.append((rotated, *(t for t in written if t is not None)))
    return tuple(results)


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], *, rotated: bool = False) -> None:
    """Equal to the last bit; with `rotated` but for a rounding of the rotation, and what int8 makes of that."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        if not rotated:
            assert torch.equal(a.double().nan_to_num(7e3), b.double().nan_to_num(7e3))
        elif a.dtype == torch.int8:
            assert (a.int() - b.int()).abs().max() <= 1
        else:
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=eps, atol=4e-6, equal_nan=True)
