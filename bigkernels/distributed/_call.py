"""What the two forms of context parallel attention share: arguments, checked, and what ranks have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import attention as dense
from ..ops import varlen_attention as packed
from ..ops._dropout import draw_seed
from ..ops.arguments import check_tensor, own
from ..ops.registry import needs_grad
from ._block import Options
from ._group import Group, agree, resolve_group
from ._layout import check_placement

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AGREED = (
    "the batch",
    "the heads of q",
    "the heads of k",
    "the size of a head",
    "the size of a value",
    "the dtype",
    "causal or window: left",
    "causal or window: right",
    "packing",
    "the need of gradients",
)


class Call(NamedTuple):
    """One call on one rank; q, k and v are (B, H, S, D) views, B = 1 where sequences are packed."""

    group: dist.ProcessGroup
    rank: int
    ranks: int
    lengths: list[int]
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: list[int] | None
    bias: Tensor | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    prefix_lengths: Tensor | None
    seed: Tensor | None
    options: tuple[int, int, float, float, float]  # left, right, scale, softcap, dropout_p

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def needs_grad(self) -> bool:
        return needs_grad(self.q, self.k, self.v, self.bias, self.sinks)

    def block_options(self) -> Options:
        left, right, scale, softcap, dropout_p = self.options
        tensors = (self.q, self.k, self.v, self.bias, self.mask, self.alibi_slopes)
        operator = packed.OPERATOR if self.is_packed else dense.OPERATOR
        kernel = not dropout_p and operator.uses_kernel(*tensors) and dense.OPERATOR.uses_kernel(*tensors)
        return Options(
            left,
            right,
            scale,
            softcap,
            dropout_p,
            self.q.shape[1],
            bias=self.bias,
            mask=self.mask,
            alibi_slopes=self.alibi_slopes,
            prefix_lengths=self.prefix_lengths,
            seed=self.seed,
            kernel=kernel,
            packed=self.is_packed,
        )


def prepare(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    placement: str,
    lengths: Sequence[int] | None,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float | None,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    prefix_lengths: Tensor | None,
    dropout_p: float,
    cu_seqlens: Tensor | None,
) -> Call:
    """Check what this rank gives, then whether the ranks give what goes together; their lengths, and dropout's seed."""
    members = resolve_group(op, group)
    rank, ranks = dist.get_rank(members), dist.get_world_size(members)
    if rank < 0:
        raise ValueError(f"bigkernels.{op}: this rank is not in the group")
    check_placement(op, placement)
    q, k, v = _checked(op, q, k, v, cu_seqlens is not None)
    options = dense.raw_options(op, q.shape[-1], causal, scale, window, softcap, dropout_p)
    if needs_grad(alibi_slopes):
        raise ValueError(f"bigkernels.{op}: alibi_slopes get no gradient here; detach them")
    seed = draw_seed(q, dropout_p)
    gradient = needs_grad(q, k, v, bias, sinks)
    length = q.shape[2]
    if lengths is None:
        values = (
            q.shape[0],
            q.shape[1],
            k.shape[1],
            q.shape[3],
            v.shape[3],
            _DTYPES.index(q.dtype),
            *options[:2],
            cu_seqlens is not None,
            gradient,
        )
        seeds = 0 if seed is None else int(seed)
        said = agree(op, members, _AGREED, tuple(map(int, values)), q.device, (length, seeds))
        lengths = [n for n, _ in said]
        if seed is not None:
            seed.fill_(said[0][1])
    else:
        lengths = [int(n) for n in lengths]
        if len(lengths) != ranks or lengths[rank] != length:
            raise ValueError(
                f"bigkernels.{op}: lengths are {lengths}, expected one of each of the {ranks} ranks, and {length} "
                f"of rank {rank}"
            )
        if seed is not None:
            dist.broadcast(seed, group=members, group_src=0)
    total = sum(lengths)
    ends = _ends(op, cu_seqlens, total)
    for name, t in (("bias", bias), ("mask", mask)):
        if t is not None and ends is not None:
            raise ValueError(f"bigkernels.{op}: {name} does not go with cu_seqlens: packed sequences take none")
    dense._check(q, k[:, :, :0], v[:, :, :0], None, None, alibi_slopes, sinks, None)
    bias, mask = (_four(op, name, t, q, total) for name, t in (("bias", bias), ("mask", mask)))
    if bias is not None:
        check_tensor(op, "bias", bias)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"bigkernels.{op}: mask is {mask.dtype}; accepted is torch.bool (additive masks go to bias)")
    if prefix_lengths is not None:
        count = q.shape[0] if ends is None else len(ends) - 1
        dense.check_integers(op, "prefix_lengths", prefix_lengths, (count,))
        prefix_lengths = own(prefix_lengths)
    return Call(
        members, rank, ranks, lengths, q, k, v, ends, bias, mask, alibi_slopes, sinks, prefix_lengths, seed, options
    )


def _checked(op, q, k, v, is_packed):
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, t)
        if t.dim() != (3 if is_packed else 4):
            expected = "(T, H, D) with cu_seqlens" if is_packed else "(B, H, S, D)"
            raise ValueError(f"bigkernels.{op}: {name} has shape {tuple(t.shape)}, expected {expected}")
    q, k, v = dense.lowered(q, k, v)
    if is_packed:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    dense.check_heads(op, q, k, v, 1)
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"bigkernels.{op}: q has {q.shape[0]} sequences of {q.shape[2]} tokens and k {k.shape[0]} of {k.shape[2]}; "
            "a rank holds queries, keys and values of the same tokens"
        )
    return q, k, v


def _ends(op, cu_seqlens, total):
    if cu_seqlens is None:
        return None
    dense.check_integers(op, "cu_seqlens", cu_seqlens, tuple(getattr(cu_seqlens, "shape", ())))
    ends = cu_seqlens.tolist() if cu_seqlens.dim() == 1 else []
    if not ends or ends[0] != 0 or ends[-1] > total or any(b < a for a, b in zip(ends, ends[1:], strict=False)):
        raise ValueError(
            f"bigkernels.{op}: cu_seqlens must rise from 0 to at most {total}, the tokens of all ranks; it is "
            f"{ends[:4]}{'...' if len(ends) > 4 else ''} to {ends[-1:]}"
        )
    return ends


def _four(op, name, t, q, total):
    if t is None:
        return None
    if t.dim() < 4:
        t = t.reshape((1,) * (4 - t.dim()) + tuple(t.shape))
    scores = (*q.shape[:3], total)
    if t.dim() != 4 or any(a not in (1, b) for a, b in zip(t.shape, scores, strict=True)):
        raise ValueError(
            f"bigkernels.{op}: {name} has shape {tuple(t.shape)}, which does not broadcast to (B, H, S of this rank, "
            f"S of all ranks) = {scores}; its keys are those of the whole sequence, in order"
        )
    return t
