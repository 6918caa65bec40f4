"""Samples of `decode_attention`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._sample import Draw, Sample, strided


def decode_sample(
    name: str,
    lengths: list[int],
    capacity: int | None = None,
    *,
    new: int = 1,
    heads: int = 4,
    groups: int = 2,
    size: int = 32,
    value_size: int | None = None,
    page: int | None = None,
    int8: bool = False,
    append: bool = False,
    rotary: int = 0,
    angles: int = 1,
    alibi: bool = False,
    sinks: bool = False,
    tokens_first: bool = True,
    indices: torch.dtype = torch.int32,
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
    **options: object,
) -> Sample:
    """Sequences of `lengths` in a cache for `capacity` tokens each, in pages of `page`; what is not valid is large."""
    batch, value_size = len(lengths), value_size or size
    capacity = max(lengths, default=0) if capacity is None else capacity
    interleaved = bool(options.get("interleaved"))

    def make(draw: Draw) -> dict[str, Tensor]:
        def tokens(count: int, length: int, width: int) -> Tensor:
            if tokens_first:
                return draw.normal(batch, length, count, width).transpose(1, 2)
            return draw.normal(batch, count, length, width)

        inputs = {"q": arrange(tokens(heads, new, size))}
        shape: tuple[int, ...] = (batch, capacity)
        valid = torch.arange(capacity, dtype=torch.int64, device="cpu")
        valid = valid < torch.tensor(lengths, dtype=torch.int64, device="cpu")[:, None]
        if page is not None:
            inputs["block_table"], valid = _pages(draw, lengths, capacity, page, indices)
            shape = tuple(valid.shape)
        valid = valid.to(draw.device)
        for which, width in (("k", size), ("v", value_size)):
            if int8:
                inputs[f"{which}_cache"] = (draw.integers(255, *shape, groups, width) - 127).to(torch.int8)
                inputs[f"{which}_scale"] = _hidden(draw.positive(*shape, groups).float() / 127, valid)
            else:
                inputs[f"{which}_cache"] = arrange(_hidden(draw.normal(*shape, groups, width), valid))
            if append:
                inputs[which] = arrange(tokens(groups, new, width))
        inputs["cache_seqlens"] = torch.tensor(lengths, dtype=indices, device=draw.device)
        if rotary:
            inputs["cos"], inputs["sin"] = draw.angles(angles, new, rotary, interleaved=interleaved)
        if alibi:
            inputs["alibi_slopes"] = draw.slopes(heads)
        if sinks:
            inputs["sinks"] = draw.normal(heads)
        return inputs

    written = ("k_cache", "v_cache", *(("k_scale", "v_scale") if int8 else ())) if append else ()
    # The weights are rounded before they are multiplied.
    return Sample("decode_attention", name, make, options, written=written, scale="row")


def _hidden(values: Tensor, valid: Tensor) -> Tensor:
    """Large where no sequence has a token: whoever reads it is far off. (NaN would not equal itself in checks.)"""
    return torch.where(valid.view(*valid.shape, *[1] * (values.dim() - 2)), values, 3e4)


def _pages(draw: Draw, lengths: list[int], capacity: int, page: int, indices: torch.dtype) -> tuple[Tensor, Tensor]:
    """(block_table, (pages, page): which tokens are valid): pages in a random order, one more than are used."""
    used = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(used) + 1, generator=draw.generator, dtype=torch.int64, device="cpu").tolist()
    valid = torch.zeros(len(order), page, dtype=torch.bool, device="cpu")
    table = torch.full((len(lengths), -(-capacity // page)), -7, dtype=indices, device="cpu")
    for b, length in enumerate(lengths):
        for i in range(used[b]):
            number = table[b, i] = order.pop()
            valid[number, : length - i * page] = True
    return table.to(draw.device), valid


DECODE_ATTENTION = [
    decode_sample("plain", [37, 20]),
    decode_sample("grouped heads", [130, 61], 160, heads=8, groups=2, size=64),
    decode_sample("one key head", [50], heads=7, groups=1, size=40, tokens_first=False),
    decode_sample("as many key heads", [33, 40], heads=3, groups=3, size=16),
    decode_sample("one key", [1, 1], 5),
    decode_sample("empty and full", [0, 1, 29, 30], 30, heads=6, groups=3),
    decode_sample("all empty", [0, 0], 4),
    decode_sample("no capacity", [0], 0, sinks=True, return_lse=True),
    decode_sample("no sequences", [], 1),
    decode_sample("no new tokens", [3], new=0),
    decode_sample("2 new tokens", [40, 2], new=2),
    decode_sample("5 new tokens", [77, 5, 0], new=5, heads=8, groups=2, size=64),
    decode_sample("16 new tokens", [90, 16], 100, new=16, heads=8, groups=1, size=64, return_lse=True, sinks=True),
    decode_sample("40 new tokens", [70, 40], new=40),
    decode_sample("pages of 1", [9, 0, 4], page=1),
    decode_sample("pages of 16", [33, 16, 0, 1], 80, page=16, size=64),
    decode_sample("pages of 17", [52, 35], page=17, new=2, indices=torch.int64),
    decode_sample("one page", [21, 13], page=64, size=128, value_size=64),
    decode_sample("long", [700, 1100], 1200, heads=4, groups=2, size=64),
    decode_sample("long, pages of 16", [700, 1100], 1200, heads=8, groups=2, size=128, page=16),
    decode_sample("head of 8", [40], size=8),
    decode_sample("head of 72", [40], size=72, value_size=80),
    decode_sample("head of 80", [40], size=80, value_size=72, new=3),
    decode_sample("head of 128", [113], size=128),
    decode_sample("head of 192, values of 128", [50], size=192, value_size=128),
    decode_sample("head of 576, values of 512", [70], size=576, value_size=512, heads=16, groups=1),
    decode_sample("odd head of 13, values of 5", [21, 22], size=13, value_size=5),
    decode_sample("scale", [37], scale=0.5),
    decode_sample("window", [150, 9], window=(20, 0)),
    decode_sample("window, pages of 16, 4 new tokens", [150, 9], window=(20, -1), page=16, new=4),
    decode_sample("window of one", [30], window=(0, 0), new=3),
    decode_sample("softcap", [37, 20], softcap=2.0),
    decode_sample("alibi", [37, 20], alibi=True, new=2),
    decode_sample("sinks", [37, 0], sinks=True, return_lse=True),
    decode_sample("lse", [37, 20], return_lse=True, new=2),
    decode_sample("int8", [37, 20], 40, int8=True, size=64),
    decode_sample("int8, pages of 16", [37, 20, 0], int8=True, size=72, value_size=40, page=16, new=5),
    decode_sample("append", [37, 0, 1], append=True),
    decode_sample("append 5", [37, 5], 60, append=True, new=5, tokens_first=False),
    decode_sample("append, rotated", [37, 20], append=True, rotary=32),
    decode_sample("append, partly rotated", [37, 20], append=True, rotary=16, angles=2, new=3, page=16),
    decode_sample("append, interleaved", [37, 20], append=True, rotary=24, interleaved=True, page=5, new=7),
    decode_sample("append to int8", [37, 20, 0], append=True, int8=True, size=64),
    decode_sample("append to int8, rotated", [37, 20], append=True, int8=True, rotary=32, page=16, new=3),
    decode_sample("strided elements", [37, 20], arrange=strided, append=True, new=2),
    decode_sample("everything", [150, 9, 0], append=True, rotary=32, angles=3, page=17, size=64, value_size=40, new=4,
                  heads=14, groups=2, window=(60, -1), softcap=3.0, alibi=True, sinks=True, return_lse=True),
]  # fmt: skip
