"""The keys and values that a layer of attention keeps while a model generates."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._deprecated import renamed_arguments
from ..ops.attention import attention
from ..ops.decode_attention import append_kv_, decode_attention
from ..ops.registry import needs_grad

_FEW = 16  # new tokens up to which splitting the work over the keys beats blocks of queries


class KVCache:
    """The keys and values of one attention layer, for B sequences of up to N tokens, allocated once.

    Sequences fill from the front and may differ in length. Prompts of different lengths are padded at the end and
    cut back after the prefill; causality hides the padding from what comes before it::

        cache = layer.make_cache(batch=2, length=1024)
        with torch.no_grad():
            layer(prompts, cache=cache)  # (2, S, E), any S, also in parts
            cache.truncate([9, 5])  # what the prompts really are
            layer(token, cache=cache)  # (2, 1, E), at positions 9 and 5

    It holds ``B * N * Hk * (D + Dv)`` elements, with `int8` a byte each and four bytes more a token and head for keys
    and for values; see `nbytes`.

    Args:
        batch: B.
        length: N; in pages, rounded up to whole ones.
        num_kv_heads: Hk.
        head_dim: D, of the keys.
        value_head_dim: Dv, of the values; D by default.
        page_size: tokens a page; by default the cache is contiguous.
        num_pages: how many pages there are, by default enough for all sequences at full length.
        block_table: (B, pages a sequence), int32: which pages each sequence fills, in order; by default each has pages
            of its own. It is used as it is given, so that a scheduler can write to it: sequences may share pages that
            none of them fills, and pages beyond a sequence's length are not looked at. With fewer pages than the
            default it must be given.
        int8: keep 8-bit integers and a scale a token and head, symmetric, rounded to the nearest.
        dtype: of the keys and values that come in, torch's default if not given.

    Attributes:
        keys, values: (B, N, Hk, D) and (B, N, Hk, Dv), or (pages, page_size, Hk, D) and (pages, page_size, Hk, Dv).
        key_scales, value_scales: (B, N, Hk) or (pages, page_size, Hk), float32, or None.
        lengths: (B,), int32, the tokens that each sequence holds; changed by the methods only.

    Raises:
        ValueError: sizes or the block table do not fit.
    """

    @renamed_arguments(
        "bigkernels.nn.KVCache",
        key_heads="num_kv_heads",
        head_size="head_dim",
        value_size="value_head_dim",
        pages="num_pages",
    )
    def __init__(
        self,
        batch: int,
        length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        block_table: Tensor | None = None,
        int8: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {
            "batch": batch,
            "length": length,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "value_head_dim": value_head_dim,
            "page_size": page_size,
            "num_pages": num_pages,
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"bigkernels.nn.KVCache: {name} is {value}, expected at least 1")
        if page_size is None:
            if num_pages is not None or block_table is not None:
                raise ValueError("bigkernels.nn.KVCache: num_pages and block_table need page_size")
            self.capacity, tokens = length, (batch, length)
        else:
            each = -(-length // page_size)
            num_pages = batch * each if num_pages is None else num_pages
            block_table = _table(batch, each, num_pages, block_table, device)
            self.capacity, tokens = each * page_size, (num_pages, page_size)
        self.dtype = dtype or torch.get_default_dtype()
        factory_kwargs = {"device": device, "dtype": torch.int8 if int8 else self.dtype}
        self.keys = torch.empty(*tokens, num_kv_heads, head_dim, **factory_kwargs)
        self.values = torch.empty(*tokens, num_kv_heads, value_head_dim or head_dim, **factory_kwargs)
        self.key_scales, self.value_scales = (
            torch.empty(*tokens, num_kv_heads, device=device, dtype=torch.float32) if int8 else None for _ in range(2)
        )
        self.block_table = block_table
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        # What `lengths` holds, known without waiting for a GPU: the longest, and whether there are shorter ones.
        self.longest, self.ragged = 0, False

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """The memory that it takes, in bytes."""
        tensors = (self.keys, self.values, self.key_scales, self.value_scales, self.block_table, self.lengths)
        return sum(t.nbytes for t in tensors if t is not None)

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.lengths.zero_()
        self.longest, self.ragged = 0, False

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep the first tokens of each sequence: as many of all, or (B,) of each. A tensor is read by the host.

        Raises:
            ValueError: a length is negative or more than the sequence has.
        """
        many = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        given = [many] * self.batch if isinstance(many, int) else list(many)
        now = self.lengths.tolist()
        if len(given) != len(now) or any(not 0 <= want <= have for want, have in zip(given, now, strict=True)):
            raise ValueError(f"bigkernels.nn.KVCache: cannot truncate sequences of {now} tokens to {given}")
        self.lengths.copy_(torch.tensor(given, dtype=torch.int32, device="cpu"))
        self.longest, self.ragged = max(given), min(given) < max(given)

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        q: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        interleaved: bool = False,
    ) -> Tensor | None:
        """Add n tokens to each sequence: k (B, Hk, n, D), v (B, Hk, n, Dv), with cos and sin (B or 1, n, R) rotated.

        Returns:
            `q` (B, H, n, D) rotated likewise, or None where none is given.

        Raises:
            RuntimeError: a gradient is wanted; a cache records none.
            ValueError: the shapes do not fit, or there is no room.
        """
        self._check(k, q, v)
        lengths = self.lengths + k.shape[2]
        rotated = append_kv_(
            k if q is None else q,
            self.keys,
            self.values,
            lengths,
            k,
            v,
            block_table=self.block_table,
            cos=cos,
            sin=sin,
            interleaved=interleaved,
            k_scale=self.key_scales,
            v_scale=self.value_scales,
        )
        self._advance(k.shape[2])
        return None if q is None else rotated

    def contents(self) -> tuple[Tensor, Tensor]:
        """Keys (B, Hk, L, D) and values (B, Hk, L, Dv), L being the longest sequence.

        Views of a contiguous cache; copies out of pages or of integers. What lies beyond a shorter sequence's length
        has no meaning.
        """
        pairs = ((self.keys, self.key_scales), (self.values, self.value_scales))
        keys, values = (self._read(stored, scales).transpose(1, 2) for stored, scales in pairs)
        return keys, values

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        interleaved: bool = False,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        scale: float | None = None,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Append n tokens as `append` does, and return the causal attention (B, H, n, Dv) of their queries over all.

        The options are those of `bigkernels.functional.attention`; `mask` and `bias` are broadcastable to
        (B, H, n, L + n), where all sequences hold L tokens. Many queries over pages or integers work on a copy of the
        keys and values in the dtype of `q`; where sequences differ in length, many queries take the slower way of few.

        Raises:
            RuntimeError: a gradient is wanted.
            ValueError: shapes do not fit, there is no room, or there is a mask or bias for sequences of different
                lengths.
        """
        options = {"scale": scale, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks}
        if mask is None and bias is None and (self.ragged or q.shape[2] <= _FEW):
            self._check(k, q, v)
            lengths = self.lengths + k.shape[2]
            out = decode_attention(
                q,
                self.keys,
                self.values,
                lengths,
                block_table=self.block_table,
                k=k,
                v=v,
                cos=cos,
                sin=sin,
                interleaved=interleaved,
                k_scale=self.key_scales,
                v_scale=self.value_scales,
                **options,
            )
            self._advance(k.shape[2])
            return out
        if self.ragged:
            raise ValueError("bigkernels.nn.KVCache: mask and bias need sequences of one length")
        q = self.append(k, v, q=q, cos=cos, sin=sin, interleaved=interleaved)
        return attention(q, *self.contents(), causal=True, mask=mask, bias=bias, **options)

    def _check(self, k, q, v):
        if needs_grad(k, q, v):
            raise RuntimeError("bigkernels.nn.KVCache: a cache records no gradients; call it under torch.no_grad()")
        if k.shape[0] != self.batch:
            raise ValueError(f"bigkernels.nn.KVCache: k has a batch of {k.shape[0]} and the cache of {self.batch}")
        if self.longest + k.shape[2] > self.capacity:
            raise ValueError(
                f"bigkernels.nn.KVCache: {self.longest} tokens and {k.shape[2]} more do not fit into {self.capacity}"
            )

    def _advance(self, tokens):
        self.lengths.add_(tokens)
        self.longest += tokens

    def _read(self, stored, scales):
        """(B, L, Hk, D)"""
        if self.block_table is None:
            stored = stored[:, : self.longest]
            scales = scales if scales is None else scales[:, : self.longest]
        else:
            used = self.block_table[:, : -(-self.longest // stored.shape[1])]
            stored = stored[used].flatten(1, 2)[:, : self.longest]
            scales = scales if scales is None else scales[used].flatten(1, 2)[:, : self.longest]
        return stored if scales is None else (stored * scales.unsqueeze(-1)).to(self.dtype)

    def __repr__(self) -> str:
        _, _, heads, size = self.keys.shape
        kind = "" if self.block_table is None else f", page_size={self.keys.shape[1]}"
        kind += ", int8" if self.key_scales is not None else ""
        return (
            f"KVCache({self.batch} x {self.capacity} tokens, {heads} heads of {size}{kind}, {self.dtype}, "
            f"{self.nbytes:,} bytes, {self.longest} tokens in use)"
        )


def _table(batch, each, pages, given, device):
    if given is None:
        if pages < batch * each:
            raise ValueError(
                f"bigkernels.nn.KVCache: {pages} pages are fewer than {batch} sequences of {each}; give "
                "block_table to say who has which"
            )
        return torch.arange(batch * each, dtype=torch.int32, device=device).view(batch, each)
    if given.dtype != torch.int32 or tuple(given.shape) != (batch, each):
        raise ValueError(
            f"bigkernels.nn.KVCache: block_table is {given.dtype} {tuple(given.shape)}, expected "
            f"torch.int32 {(batch, each)}"
        )
    return given
