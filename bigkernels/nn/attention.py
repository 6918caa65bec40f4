"""Multi-head attention as a module: projections, rotary embedding, attention, and a cache for generation."""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._deprecated import renamed_members
from ..ops.attention import attention, raw_options
from ..ops.rope import rope as rotate
from ..ops.varlen_attention import varlen_attention
from ._constants import KeepsConstants
from .cache import KVCache
from .rms_norm import RMSNorm
from .rope import RotaryEmbedding


@renamed_members(
    "bigkernels.nn.Attention", dim="hidden_size", heads="num_heads", key_heads="num_kv_heads", head_size="head_dim"
)
class Attention(KeepsConstants):
    """``o_proj(attention(q_proj(x), k_proj(x), v_proj(x)))`` with grouped heads, RoPE and a cache.

    The names of the weights are those of Llama, Qwen and Mistral checkpoints (`q_proj`, `k_proj`, `v_proj`, `o_proj`,
    `q_norm`, `k_norm`) and of gpt-oss (`sinks`): the part of a state dict below ``self_attn.`` loads as it is.

    Args:
        hidden_size: E, of the input and the output.
        num_heads: H, of the queries.
        num_kv_heads: Hk, of the keys and values; divides H. H by default; 1 is multi-query attention.
        head_dim: D; ``hidden_size // num_heads`` by default.
        bias: whether the projections of queries, keys and values have biases.
        out_bias: whether the output projection has one; as `bias` by default.
        rope: a `RotaryEmbedding`, which layers may share, or the base theta of one for whole heads.
        causal, window, softcap, scale: as in `bigkernels.functional.attention`.
        sinks: whether each head has a learned logit that takes weight and gives no value.
        qk_norm: an RMSNorm of each head of the queries and of the keys, with weights (D,), before RoPE (Qwen 3).
        alibi: subtract distances times the slopes of Press et al. 2022 (https://arxiv.org/abs/2108.12409).
        dropout: of the attention weights, in training.

    Raises:
        ValueError: sizes or options do not fit.
    """

    alibi_slopes: Tensor | None

    _context: Any = None  # where tokens lie on several ranks (`bigkernels.distributed.context_parallel`): its handle

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        rope: RotaryEmbedding | float | None = None,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        qk_norm: bool = False,
        alibi: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"bigkernels.nn.Attention: num_heads is {num_heads}, not a multiple of num_kv_heads {num_kv_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"bigkernels.nn.Attention: hidden_size is {hidden_size}, not a multiple of num_heads "
                    f"{num_heads}; give head_dim"
                )
            head_dim = hidden_size // num_heads
        raw_options("nn.Attention", head_dim, causal, scale, window, softcap, dropout)  # raises on wrong values
        if rope is not None and not isinstance(rope, nn.Module):
            rope = RotaryEmbedding(head_dim, rope, device=device)
        if rope is not None and rope.rotary_dim > head_dim:
            raise ValueError(f"bigkernels.nn.Attention: rope rotates {rope.rotary_dim} elements of heads of {head_dim}")
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.causal, self.window, self.softcap, self.scale, self.dropout = causal, window, softcap, scale, dropout
        factory_kwargs = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias, **factory_kwargs)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, **factory_kwargs)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, **factory_kwargs)
        self.o_proj = nn.Linear(
            num_heads * head_dim, hidden_size, bias=bias if out_bias is None else out_bias, **factory_kwargs
        )
        self.q_norm = RMSNorm(head_dim, **factory_kwargs) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, **factory_kwargs) if qk_norm else None
        self.rope = rope
        self.register_parameter("sinks", nn.Parameter(torch.zeros(num_heads, **factory_kwargs)) if sinks else None)
        slopes = torch.tensor(alibi_slopes(num_heads), device=device, dtype=torch.float32) if alibi else None
        self.register_buffer("alibi_slopes", slopes, persistent=False)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attention of x (B, S, E) over itself, over the cache and itself, or within each of its packed sequences.

        Args:
            x: (B, S, E); packed (T, E).
            positions: for RoPE, integers (B, S) or (S,), packed (T,). By default tokens count from 0, with a cache
                from its lengths, packed from 0 in each sequence.
            angles: what ``self.rope.angles(positions)`` gives, in its place: layers that share it need not compute it
                again.
            mask: boolean, broadcastable to (B, H, S, S): True lets a key be seen. With a cache that holds L tokens a
                sequence, to (B, H, S, L + S).
            bias: floating, broadcastable likewise: added to the scores. Differentiable.
            cache: keys and values so far; those of x are added to it. It records no gradients, needs `causal`, and
                leaves dropout out, so it is refused in training with dropout.
            cu_seqlens: (N + 1,), int32 or int64, from 0 to T: x holds N sequences, one after the other.
            max_seqlen: at least the longest of them; T by default, which on a GPU is slower.

        Returns:
            (B, S, E), packed (T, E).

        Raises:
            TypeError, ValueError: shapes do not fit, or the arguments do not go together.
            RuntimeError: a cache is given where a gradient is wanted.
        """
        packed = cu_seqlens is not None
        self._check(x, mask, bias, cache, packed, max_seqlen)
        if packed:
            x = x.unsqueeze(0)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        attend, attend_packed = attention, varlen_attention
        if self._context is not None:
            attend, attend_packed = self._over_ranks(cache)
        if self.rope is not None and angles is None:
            angles = self.rope.angles(self._positions(x, cache, cu_seqlens) if positions is None else positions)
        options = {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }
        if cache is not None:
            cos, sin = angles or (None, None)
            out = cache.attend(
                q, k, v, cos=cos, sin=sin, interleaved=self._interleaved, mask=mask, bias=bias, **options
            )
            return self.o_proj(out.transpose(1, 2).flatten(2))
        options |= {"causal": self.causal, "dropout_p": self.dropout if self.training else 0.0}
        if angles is not None:
            q, k = rotate(q, k, *angles, interleaved=self._interleaved)
        if packed:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
            most = x.shape[1] if max_seqlen is None else max_seqlen
            out = attend_packed(q, k, v, cu_seqlens, cu_seqlens, most, most, **options)
            return self.o_proj(out.flatten(1))
        out = attend(q, k, v, mask=mask, bias=bias, **options)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def make_cache(self, batch: int, length: int, **options: object) -> KVCache:
        """A `KVCache` for this layer's heads, in the dtype and on the device of its weights.

        Args:
            options: `page_size`, `num_pages`, `block_table`, `int8`; and `dtype`, which inside autocast is to be its
                dtype.
        """
        factory_kwargs = {"device": self.k_proj.weight.device, "dtype": self.k_proj.weight.dtype}
        return KVCache(batch, length, self.num_kv_heads, self.head_dim, **factory_kwargs | options)

    @property
    def _interleaved(self) -> bool:
        return self.rope is not None and self.rope.interleaved

    def _over_ranks(self, cache):
        """What takes the place of `attention` and `varlen_attention` where the tokens lie on several ranks."""
        if cache is not None:
            raise ValueError("bigkernels.nn.Attention: a cache does not go with context_parallel")
        whole = self._context.attend_own

        def packed(q, k, v, cu_seqlens, *_, **options):
            return whole(q, k, v, cu_seqlens=cu_seqlens, **options)

        return whole, packed

    def _positions(self, x, cache, cu_seqlens):
        if self._context is not None:
            at = self._context.positions(x.device)
        else:
            at = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)
        if cache is not None:
            return cache.lengths[:, None] + at
        if cu_seqlens is not None:
            return at - cu_seqlens[torch.searchsorted(cu_seqlens, at.to(cu_seqlens.dtype), right=True) - 1]
        return at

    def _check(self, x, mask, bias, cache, packed, max_seqlen):
        accepted = "(T, hidden_size)" if packed else "(B, S, hidden_size)"
        if x.dim() != (2 if packed else 3) or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"bigkernels.nn.Attention: x has shape {tuple(x.shape)}, expected {accepted} with "
                f"hidden_size {self.hidden_size}"
            )
        if packed and not (mask is bias is cache is None):
            raise ValueError("bigkernels.nn.Attention: packed sequences (cu_seqlens) take no mask, bias or cache")
        if max_seqlen is not None and not packed:
            raise ValueError("bigkernels.nn.Attention: max_seqlen is given without cu_seqlens")
        if cache is not None and not self.causal:
            raise ValueError("bigkernels.nn.Attention: a cache needs causal=True")
        if cache is not None and self.training and self.dropout:
            raise ValueError("bigkernels.nn.Attention: dropout does not go with a cache; call eval() first")

    def extra_repr(self) -> str:
        options = {
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "scale": self.scale,
            "dropout": self.dropout or None,
            "alibi": self.alibi_slopes is not None or None,
            "sinks": self.sinks is not None or None,
        }
        given = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}{given}"


def alibi_slopes(num_heads: int) -> list[float]:
    """A geometric series for a power of two; other counts take every second slope of the next one (Press et al.)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-8 * (i + 0.5) / power) for i in range(num_heads - power)]
