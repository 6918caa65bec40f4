"""Attention over a sequence whose tokens lie on several ranks: each rank takes some heads of all tokens (Jacobs et al.
2023, https://arxiv.org/abs/2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_private import disable_dynamo
from ..ops import attention as dense
from ..ops import varlen_attention as packed
from ._call import Call, prepare
from ._exchange import ToHeads, ToTokens
from ._group import Group
from ._layout import Placement, places, runs
from ._ring import attend_alone

_OP = "distributed.all_to_all_attention"


@disable_dynamo
def all_to_all_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = None,
    placement: Placement = "contiguous",
    lengths: Sequence[int] | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`functional.attention` of a sequence that is cut over the ranks of a group, of which this rank holds a part.

    The ranks exchange tokens for heads, so that each has all tokens of some heads, calls `attention`, and exchange
    back. The heads of `k` and `v` that several ranks need go to each of them. The result of a head is what one process
    makes of it. A rank sends, with N ranks that hold as many tokens and heads, ``(N - 1) / N * B * S * (H * (D + Dv) +
    Hk' * (D + Dv))`` elements in forward, where ``Hk' = max(Hk, N)``, and as many in backward.

    Args:
        group, placement, lengths, bias, mask, dropout_p, cu_seqlens: as in `ring_attention`. A `bias` or `mask` that
            differs from query to query is exchanged as well: (S, all S) elements a head.
        q, k, v and all others: as in `ring_attention`. The gradient of `sinks` is that of this rank's heads, zero in
            the others: the sum over ranks is the gradient.

    Returns:
        out (B, H, S, Dv) of this rank's tokens, or packed (T, H, Dv); or (out, lse) with lse (B, H, S), packed (H, T).

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or options do not fit, `q` has fewer heads than there are ranks, or ranks differ in
            them (then on every rank).
        RuntimeError: there is no process group, or a rank did not answer within the group's time-out.
    """
    call = prepare(
        _OP,
        q,
        k,
        v,
        group=group,
        placement=placement,
        lengths=lengths,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        prefix_lengths=prefix_lengths,
        dropout_p=dropout_p,
        cu_seqlens=cu_seqlens,
    )
    heads, groups = call.q.shape[1], call.k.shape[1]
    if heads < call.ranks:
        raise ValueError(
            f"bigkernels.{_OP}: q has {heads} heads for {call.ranks} ranks, and each needs one; use ring_attention"
        )
    spans = [(heads * r // call.ranks, heads * (r + 1) // call.ranks) for r in range(call.ranks)]
    each = heads // groups
    of_keys = [(a // each, (b - 1) // each + 1) for a, b in spans]
    tensors, cuts = [call.q, call.k, call.v], [spans, of_keys, of_keys]
    for t in (call.bias, call.mask):
        if t is not None and t.shape[2] > 1:
            tensors.append(t.to(torch.uint8) if t.dtype == torch.bool else t)
            cuts.append(spans if t.shape[1] > 1 else [(0, 1)] * call.ranks)
    made = _exchange(tensors, cuts, call)
    q, k, v = made[:3]
    mine, rest = spans[call.rank], list(made[3:])
    bias, mask = (_of_all(t, mine, rest) for t in (call.bias, call.mask))
    k, v = (_for_heads(t, mine, of_keys[call.rank], each) for t in (k, v))
    order = None
    if placement != "contiguous":
        held = torch.cat([places(run, q.device) for run in runs(call.lengths, placement)])
        order = torch.argsort(held)
        q, k, v = (t.index_select(2, order) for t in (q, k, v))
        bias, mask = (t if t is None or t.shape[2] == 1 else t.index_select(2, order) for t in (bias, mask))
    vectors = [t if t is None else t[slice(*mine)] for t in (call.alibi_slopes, call.sinks)]
    out, lse = _attend(call, q, k, v, bias, mask, vectors[0], vectors[1], mine[0], return_lse)
    if order is not None:
        out = out.index_select(2, held)
        lse = None if lse is None else lse.index_select(2, held)
    (out,) = ToTokens.apply(call.lengths, [spans], call.group, out)
    if return_lse:
        (lse,) = ToTokens.apply(call.lengths, [spans], call.group, lse[..., None])
        lse = lse[..., 0]
    if call.is_packed:
        out, lse = out[0].transpose(0, 1), lse[0] if return_lse else None
    return (out, lse) if return_lse else out


def _exchange(tensors: list[Tensor], cuts: list, call: Call) -> list[Tensor]:
    """One exchange for the tensors of each dtype."""
    found: list = [None] * len(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chosen = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        made = ToHeads.apply(call.lengths, [cuts[i] for i in chosen], call.group, *(tensors[i] for i in chosen))
        for i, t in zip(chosen, made, strict=True):
            found[i] = t
    return found


def _of_all(t: Tensor | None, mine: tuple[int, int], exchanged: list[Tensor]) -> Tensor | None:
    """A bias or mask with the rows of all tokens, for the heads of this rank."""
    if t is None:
        return None
    if t.shape[2] == 1:
        return t[:, slice(*mine)] if t.shape[1] > 1 else t
    return exchanged.pop(0).to(t.dtype)


def _for_heads(t: Tensor, mine: tuple[int, int], of_keys: tuple[int, int], each: int) -> Tensor:
    """Keys or values for which query head h reads head ``h // (H // Hk)``: one a query head where none else fits."""
    count, groups = mine[1] - mine[0], of_keys[1] - of_keys[0]
    wanted = [h // each - of_keys[0] for h in range(*mine)]
    if count % groups == 0 and wanted == [h // (count // groups) for h in range(count)]:
        return t
    return t.index_select(1, torch.tensor(wanted, dtype=torch.int64, device=t.device))


def _attend(call, q, k, v, bias, mask, alibi_slopes, sinks, first_head, return_lse):
    """(out, lse or None) of all tokens for the heads of this rank."""
    left, right, scale, softcap, dropout_p = call.options
    options: dict[str, Any] = {
        "scale": scale,
        "window": (left, right),
        "softcap": softcap or None,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "prefix_lengths": call.prefix_lengths,
    }
    if dropout_p:
        given = {"q": q, "k": k, "v": v, "bias": bias, "mask": mask, "alibi_slopes": alibi_slopes, "sinks": sinks}
        return attend_alone(call._replace(**given), first_head, call.q.shape[1])
    if call.is_packed:
        ends = torch.tensor(call.cu_seqlens, dtype=torch.int32, device=q.device)
        most = max((b - a for a, b in zip(call.cu_seqlens, call.cu_seqlens[1:], strict=False)), default=0)
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        result: Any = packed.varlen_attention(q, k, v, ends, ends, most, most, return_lse=return_lse, **options)
        out, lse = result if return_lse else (result, None)
        return out.transpose(0, 1)[None], None if lse is None else lse[None]
    result = dense.attention(q, k, v, bias=bias, mask=mask, return_lse=return_lse, **options)
    return result if return_lse else (result, None)
