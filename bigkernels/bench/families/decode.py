"""One new token a sequence over a cache of keys and values: contiguous, in pages, and in 8-bit integers.

A step goes through the caches of several layers, as a model does, so that together they do not fit the processor's:
one cache again and again would be read from there.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ..._samples import Draw
from ..case import Case, Settings
from ..operators import Function, operator_case
from ..peers import flash_attention, flex

HEADS, KEY_HEADS, SIZE = 32, 8, 128
_GROUP = HEADS // KEY_HEADS
_BYTES = 2**28  # of all layers' caches: more than the last cache of any processor that this is likely to run on
_PAGE = 16
REPEATED = "repeated heads"

Read = Callable[[Mapping[str, Tensor], int], tuple[Tensor, Tensor]]
"""Keys and values (B, Hk, N, D) of a layer, by views where the cache allows it."""


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As models write it: keys and values repeated for each query head, the softmax in float32."""
    k, v = (t.repeat_interleave(_GROUP, 1) for t in (k, v))
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(_GROUP, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def first_heads(result: Tensor) -> Tensor:
    """Of (B, H, 1, D): the query heads of the first key head, which the check computes."""
    return result[:, :_GROUP]


def quantize(cache: Tensor) -> tuple[Tensor, Tensor]:
    """(..., Hk, D) in 8-bit integers, and the scale (..., Hk) of each token and head."""
    wide = cache.float()
    scale = wide.abs().amax(-1) / 127
    return (wide / scale.unsqueeze(-1)).round().to(torch.int8), scale


def _contiguous(made: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    return made["k_cache"][layer].transpose(1, 2), made["v_cache"][layer].transpose(1, 2)


def _paged(made: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    k, v = (made[name][layer][made["block_table"]].flatten(1, 2).transpose(1, 2) for name in ("k_cache", "v_cache"))
    return k, v


def _int8(made: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    pairs = (("k_cache", "k_scale"), ("v_cache", "v_scale"))
    dtype = made["q"].dtype
    k, v = ((made[c][layer] * made[s][layer].unsqueeze(-1)).to(dtype).transpose(1, 2) for c, s in pairs)
    return k, v


_READS: dict[str, Read] = {"": _contiguous, f"pages of {_PAGE}": _paged, "int8": _int8}


def case(settings: Settings, batch: int, length: int, kind: str = "", *, with_flex: bool = False) -> Case:
    read = _READS[kind]
    itemsize = 1 if kind == "int8" else 2
    a_layer = 2 * batch * length * KEY_HEADS * (SIZE * itemsize + (4 if kind == "int8" else 0))
    layers = 2 if settings.quick else max(1, _BYTES // a_layer)

    def inputs(draw: Draw) -> dict[str, Tensor]:
        inputs = {"q": draw.normal(layers, batch, HEADS, 1, SIZE)}
        inputs["cache_seqlens"] = torch.full((batch,), length, dtype=torch.int32, device=draw.device)
        pages = batch * length // _PAGE
        for name in "kv":
            if read is _paged:
                cache = draw.normal(layers, pages, _PAGE, KEY_HEADS, SIZE)
            else:  # heads outside of tokens in memory: SDPA is twice as fast so, and ours as fast
                cache = draw.normal(layers, batch, KEY_HEADS, length, SIZE).transpose(2, 3)
            if read is _int8:
                cache, inputs[f"{name}_scale"] = quantize(cache)
            inputs[f"{name}_cache"] = cache
        if read is _paged:
            # As after many requests.
            order = torch.randperm(pages, generator=draw.generator, dtype=torch.int64, device="cpu")
            inputs["block_table"] = order.view(batch, -1).to(draw.device, torch.int32)
        return inputs

    def all_layers(attend: Function) -> Function:
        return lambda **made: tuple(attend(q, *read(made, layer)) for layer, q in enumerate(made["q"]))

    def ours(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        block_table: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        scales = [(None, None)] * layers if k_scale is None else list(zip(k_scale, v_scale, strict=True))
        return tuple(
            functional.decode_attention(*caches, cache_seqlens, block_table=block_table, k_scale=ks, v_scale=vs)
            for *caches, (ks, vs) in zip(q, k_cache, v_cache, scales, strict=True)
        )

    def checked(made: Mapping[str, Tensor], wide: torch.dtype) -> dict[str, Tensor]:
        """The first layer's, of the first key head."""
        one = {name: t[:1, :, :, :1] for name, t in made.items() if name[:2] in ("k_", "v_")}
        one["q"] = first_heads(made["q"][0])
        one = {name: t.to(wide) if t.is_floating_point() else t for name, t in one.items()}
        expected = eager(one["q"], *read(made | one, 0))
        return {"out0": expected if wide == torch.float64 else expected.to(made["q"].dtype)}

    def flash(peer) -> Function:
        def call(q, k_cache, v_cache, cache_seqlens, block_table=None):
            return tuple(
                peer.flash_attn_with_kvcache(
                    one.transpose(1, 2), k, v, cache_seqlens=cache_seqlens, block_table=block_table
                ).transpose(1, 2)
                for one, k, v in zip(q, k_cache, v_cache, strict=True)
            )

        return call

    peers = {REPEATED: lambda device: all_layers(repeated)}
    if read is _contiguous:
        peers |= flash_attention(flash)
    if with_flex:
        peers |= flex(settings, lambda flex: all_layers(lambda q, k, v: flex(q, k, v, enable_gqa=True)))
    return operator_case(
        "decode",
        f"batch {batch}, cache {length}" + (f", {kind}" if kind else ""),
        settings=settings,
        dtype=torch.bfloat16,
        inputs=inputs,
        ours=ours,
        eager=all_layers(eager),
        builtin=all_layers(grouped),
        peers=peers,
        compiled=False,
        exact=lambda made: checked(made, torch.float64),
        plain=lambda made: checked(made, torch.float32),
        part=first_heads,
        bytes=layers * (a_layer + 2 * batch * HEADS * SIZE * 2),
        flops=layers * 4 * batch * HEADS * length * SIZE,
        only_read=True,
    )


def cases(settings: Settings) -> list[Case]:
    length = 64 if settings.quick else 4096
    return [
        case(settings, batch, length, kind, with_flex=batch == 1 and not kind) for batch in (1, 8) for kind in _READS
    ]
