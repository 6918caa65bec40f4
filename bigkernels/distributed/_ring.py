"""Attention over a sequence whose tokens lie on several ranks: keys and values go round (Liu et al. 2023,
https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_private import disable_dynamo
from ..ops._derivatives import is_observed
from ..ops.arguments import own
from ..ops.attention import like
from ..ops.registry import compute_dtype
from . import _block
from ._block import Options
from ._call import Call, prepare
from ._group import Exchange, Group
from ._layout import Block, Placement, blocks, places, runs

_OP = "distributed.ring_attention"


@disable_dynamo
def ring_attention(
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

    In step t a rank computes with the keys and values of the rank t before it, while those of the next step are on
    their way; partial results are merged in float32. Backward does the same round, and sends the gradients of keys and
    values to the rank that holds these. Only keys that some query of a rank sees are sent to it: under a causal mask
    half of them, with a window those within it. A rank sends at most
    ``(N - 1) * B * S * Hk * (D + Dv)`` elements in forward, and twice as many in backward.

    Every rank of the group calls this with the same options, in the same order.

    Args:
        q, k, v: (B, H, S, D), (B, Hk, S, D) and (B, Hk, S, Dv) of this rank's S tokens, which may be of another number
            on each rank, or 0; packed (T, H, D) and so on.
        group: a process group, a device mesh of one dimension, or None: the default group.
        placement: "contiguous": rank r holds the r-th part of the sequence. "zigzag": it is cut into 2 N parts, of
            which rank r holds parts r and 2 N - 1 - r, one after the other (`shard_sequence`): causal attention is as
            much work for each rank then.
        lengths: the tokens of each rank. If they are given, ranks do not tell them each other first, and nothing checks
            that they agree; on GPUs the host then waits for nothing.
        bias, mask: as in `attention`, broadcastable to (B, H, S, all S): the rows are those of this rank, the columns
            the keys of the whole sequence in order. Gradients of `bias` and `sinks` are this rank's part: their sum
            over ranks is the gradient, as it is of the weights of layers.
        prefix_lengths: (B,), the same on all ranks; packed one a sequence.
        dropout_p: the mask is that of one process that drew the seed of the group's first rank. Attention with dropout
            runs in plain PyTorch, some rows at a time.
        cu_seqlens: (N + 1,), int32 or int64: where packed sequences end in all tokens of all ranks, with 0 before them.
            They may begin on one rank and end on another one. Takes no `bias` and no `mask`.
        causal, scale, window, softcap, alibi_slopes, sinks, return_lse: as in `attention`.

    Returns:
        out (B, H, S, Dv) of this rank's tokens, or packed (T, H, Dv); or (out, lse) with lse (B, H, S), packed (H, T).

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or options do not fit, or ranks differ in them (then on every rank).
        RuntimeError: there is no process group, a rank did not answer within the group's time-out, or a derivative of a
            gradient is asked for.
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
    if call.needs_grad:
        call = call._replace(mask=own(call.mask))
    plan = _Plan(call, placement)
    out, lse = _Ring.apply(call.q, call.k, call.v, call.bias, call.sinks, plan)
    if call.is_packed:
        out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


class _Plan:
    """Who sends what to whom, the same in forward and backward."""

    def __init__(self, call: Call, placement: str):
        self.group, self.rank, self.ranks = call.group, call.rank, call.ranks
        self.options: Options = call.block_options()
        left, right = call.options[:2]
        separate = not self.options.kernel or call.prefix_lengths is not None
        held = runs(call.lengths, placement)

        def between(q: int, k: int) -> list[Block]:
            return blocks(held[q], held[k], left, right, call.cu_seqlens, trim=self.options.trims, separate=separate)

        self.outside: Tensor | None = None  # this rank's tokens that are of no packed sequence
        ends = call.cu_seqlens
        if ends is not None and ends[-1] < sum(call.lengths):
            self.outside = places(held[self.rank], call.q.device) >= ends[-1]
        me = self.rank
        self.mine = [between(me, (me - t) % self.ranks) for t in range(self.ranks)]
        self.received = [_hull(found) for found in self.mine]  # of the keys of rank me - t
        self.sent = [_hull(between((me + t) % self.ranks, me)) for t in range(self.ranks)]  # of mine, to rank me + t


def attend_alone(call: Call, first_head: int, heads: int) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call whose tensors hold all tokens, for some of the heads of a call that has `heads`."""
    plan = _Plan(call._replace(rank=0, ranks=1, lengths=[call.q.shape[2]]), "contiguous")
    plan.options.first_head, plan.options.heads = first_head, heads
    return _Ring.apply(call.q, call.k, call.v, call.bias, call.sinks, plan)


def _hull(found: list[Block]) -> tuple[int, int] | None:
    """The least run of keys with those of all blocks."""
    return (min(b.k[0] for b in found), max(b.k[1] for b in found)) if found else None


def _pack(k: Tensor, v: Tensor, span: tuple[int, int]) -> Tensor:
    return torch.cat([t[:, :, slice(*span)].reshape(-1) for t in (k, v)])


class _Buffer:
    """Keys and values, or their gradients, of a span of a rank's tokens in one piece of memory."""

    def __init__(self, k: Tensor, v: Tensor, span: tuple[int, int], dtype: torch.dtype | None = None):
        shapes = [(*t.shape[:2], span[1] - span[0], t.shape[3]) for t in (k, v)]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self.flat = k.new_zeros(sum(sizes), dtype=dtype or k.dtype)
        self.k, self.v = (t.view(shape) for t, shape in zip(self.flat.split(sizes), shapes, strict=True))


class _Rotation:
    """Keys and values of the other ranks, one step ahead of who computes with them."""

    def __init__(self, plan: _Plan, k: Tensor, v: Tensor):
        self._plan, self._k, self._v = plan, k, v
        self._next = self._start(1)

    def _start(self, t: int) -> tuple[Exchange, _Buffer | None]:
        plan, exchange, buffer = self._plan, Exchange(self._plan.group), None
        if t < plan.ranks:
            sent, received = plan.sent[t], plan.received[t]
            if sent is not None:
                exchange.send(_pack(self._k, self._v, sent), (plan.rank + t) % plan.ranks)
            if received is not None:
                buffer = _Buffer(self._k, self._v, received)
                exchange.receive(buffer.flat, (plan.rank - t) % plan.ranks)
            exchange.start()
        return exchange, buffer

    def __iter__(self) -> Iterator[tuple[int, Any, Any, int]]:
        """(step, keys, values, the first token that they are of); None for keys of which this rank needs none."""
        yield 0, self._k, self._v, 0
        for t in range(1, self._plan.ranks):
            exchange, buffer = self._next
            exchange.wait()
            self._next = self._start(t + 1)
            span = self._plan.received[t]
            if buffer is None or span is None:
                yield t, None, None, 0
            else:
                yield t, buffer.k, buffer.v, span[0]


class _Return:
    """Gradients of keys and values on their way to the rank that holds these, which adds them up step by step."""

    def __init__(self, plan: _Plan, k: Tensor, v: Tensor, total: _Buffer):
        self._plan, self._k, self._v, self._total = plan, k, v, total
        self._exchange = Exchange(plan.group)
        self._buffer: _Buffer | None = None
        self._span: tuple[int, int] | None = None

    def step(self, t: int, made: _Buffer | None) -> None:
        """Send what was made in step t, and take what another rank made for this one."""
        self.finish()
        plan, self._exchange = self._plan, Exchange(self._plan.group)
        if made is not None:
            self._exchange.send(made.flat.to(self._k.dtype), (plan.rank - t) % plan.ranks)
        self._span = plan.sent[t]
        if self._span is not None:
            self._buffer = _Buffer(self._k, self._v, self._span)
            self._exchange.receive(self._buffer.flat, (plan.rank + t) % plan.ranks)
        self._exchange.start()

    def finish(self) -> None:
        self._exchange.wait()
        if self._buffer is not None and self._span is not None:
            self._total.k[:, :, slice(*self._span)] += self._buffer.k
            self._total.v[:, :, slice(*self._span)] += self._buffer.v
        self._buffer = None


def _moved(block: Block, first: int) -> Block:
    return block._replace(k=(block.k[0] - first, block.k[1] - first))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, plan):
        wide = compute_dtype(q.dtype)
        total = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide)
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=wide)
        for t, keys, values, first in _Rotation(plan, k, v):
            for block in plan.mine[t]:
                block = _moved(block, first)
                _block.add(total, lse, block, *_block.forward(block, q, keys, values, plan.options))
        if sinks is not None:
            with_sinks = torch.logaddexp(lse, sinks.to(wide)[:, None].expand_as(lse))
            if plan.outside is not None:
                with_sinks = with_sinks.masked_fill(plan.outside, float("-inf"))
            shift = torch.where(with_sinks == float("-inf"), 0.0, with_sinks)
            total.mul_(torch.exp(lse - shift)[..., None])
            lse = with_sinks
        out = like(q, v.shape[3]).copy_(total)
        ctx.save_for_backward(q, k, v, out, lse, bias, sinks)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        if is_observed(grad, grad_lse):
            raise RuntimeError(
                f"bigkernels.{_OP}: derivatives of its gradients are not supported (create_graph=True or a transform)"
            )
        q, k, v, out, lse, bias, sinks = ctx.saved_tensors
        plan = ctx.plan
        if grad is None:
            grad = torch.zeros_like(out)
        wide = compute_dtype(q.dtype)
        bias_grad = bias is not None and ctx.needs_input_grad[3]
        dq = q.new_zeros(q.shape, dtype=wide)
        dbias = bias.new_zeros(bias.shape, dtype=wide) if bias_grad else None
        total = _Buffer(k, v, (0, k.shape[2]), wide)
        back = _Return(plan, k, v, total)
        for t, keys, values, first in _Rotation(plan, k, v):
            span = plan.received[t]
            made = total if t == 0 else None if span is None else _Buffer(k, v, span, wide)
            for block in plan.mine[t]:
                assert made is not None
                block = _moved(block, first)
                parts = _block.backward(block, grad, grad_lse, q, keys, values, out, lse, plan.options, bias_grad)
                dq[:, :, slice(*block.q)] += parts[0]
                made.k[:, :, slice(*block.k)] += parts[1]
                made.v[:, :, slice(*block.k)] += parts[2]
                if (of_bias := _block.columns(dbias, block)) is not None and parts[3] is not None:
                    of_bias += parts[3]
            if t:
                back.step(t, made)
        back.finish()
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[4]:
            infinite = torch.where(lse == float("-inf"), float("inf"), lse)
            share = torch.exp(sinks.to(wide)[:, None] - infinite) * _block.delta(grad, out, grad_lse)
            dsinks = -share.double().sum((0, 2)).to(sinks.dtype)
        dbias = None if dbias is None else dbias.to(bias.dtype)
        return dq.to(q.dtype), total.k.to(k.dtype), total.v.to(v.dtype), dbias, dsinks, None
