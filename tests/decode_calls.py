"""Arguments of the raw operator `decode_attention` for caches of any form, and the check of what it returns."""

from __future__ import annotations

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
    lengths: list[int], queries: int = 1, heads: int = 4, groups: int = 2, size: int = 32,
    value_size: int | None = None, *, page: int = 0, int8: bool = False, left: int = -1, softcap: float = 0.0,
    alibi: bool = False, sinks: bool = False, dtype: torch.dtype = torch.float32, capacity: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple:  # fmt: skip
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
        comparison = compare(ours, p.to(ours.dtype), e)
        assert comparison.ok, f"{name}: {comparison}"
