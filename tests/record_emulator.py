"""Records run in plain PyTorch, from the addresses that they hold: what `program_run` computes, slowly."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernels.ops.codes import KINDS, Operands
from bigkernels.program import _records as records

_TYPES = [torch.float32, torch.bfloat16, torch.float16]
_ACTS = {
    0: F.silu,
    1: F.gelu,
    2: lambda x: F.gelu(x, approximate="tanh"),
    3: F.relu,
    4: lambda x: F.relu(x).square(),
    5: torch.sigmoid,
    6: lambda x: x,
    7: torch.tanh,
}


def memory(address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> Tensor:
    """The tensor at an address."""
    if 0 in shape:
        return torch.zeros(shape, dtype=dtype)
    strides = strides or torch.empty(shape, device="meta").stride()
    count = 1 + sum((s - 1) * t for s, t in zip(shape, strides, strict=True))
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides)


def vector(v: records.Vector, size: int) -> Tensor | None:
    return memory(v.data, _TYPES[v.type], (size,)).float() if v.data else None


def weight(w: records.Weight) -> Tensor:
    if w.kind < 3:
        dtype = _TYPES[w.kind]
        row = w.code_row // dtype.itemsize
        if w.transposed:
            return memory(w.codes, dtype, (w.k, w.n), (row, 1)).T.float()
        return memory(w.codes, dtype, (w.n, w.k), (row, 1)).float()
    row = KINDS[w.kind]
    codes = memory(w.codes, row.codes, (w.n, (w.k * row.bits + 7) // 8), (w.code_row, 1))
    scale = memory(w.scale, row.scale, (w.n, w.groups) if row.blocked else (w.n,))
    zero = memory(w.zero, torch.float16, (w.n, w.groups)) if row.zero else None
    row_scale = memory(w.row_scale, torch.float32, (w.n,)) if row.row_scale else None
    book = memory(w.book, torch.float32, (row.book,)) if row.book else None
    return Operands(codes, scale, zero, row_scale, book, w.group, w.kind).decoded(w.k, torch.float32)


def norm(x: Tensor, of: records.NormOf, size: int) -> Tensor:
    if of.kind == 0:
        return x
    x = x.unflatten(-1, (-1, size))
    if of.kind == 2:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + of.eps)
    w, b = vector(of.weight, size), vector(of.bias, size)
    if w is not None:
        x = x * (w + of.offset)
    return (x if b is None else x + b).flatten(-2)


class Emulator:
    """`caches`: a `LayerCache` a layer. Values are (batch, tokens, width)."""

    def __init__(self, lowered) -> None:
        self.lowered = lowered

    def run(self, hidden: Tensor, run: records.Run, caches, threads: int = 1) -> Tensor:
        values = {self.lowered.hidden: hidden.float()}
        self.run_, self.caches, self.v = run, caches, values
        for record in self.lowered.records:
            getattr(self, "_" + _NAMES[record.op])(getattr(record, _NAMES[record.op]))
        return values[self.lowered.logits]

    def _norm(self, r):
        y = norm(self.v[r.x], r.norm, r.size) * r.scale
        self.v[r.out] = y if r.residual < 0 else y + r.residual_scale * self.v[r.residual]

    def _combine(self, r):
        total = 0.0
        for i in range(r.count):
            x = self.v[r.x[i]] * r.scale[i]
            channel = vector(r.channel[i], x.shape[-1])
            total = total + (x if channel is None else x * channel)
        self.v[r.out] = total

    def _activate(self, r):
        x = self.v[r.x][..., r.x_column : r.x_column + r.width]
        x = x.clamp(max=r.limit) if r.limit else x
        y = x * torch.sigmoid(r.alpha * x) if r.act == 8 else _ACTS[r.act](x)
        if r.up >= 0:
            up = self.v[r.up][..., r.up_column : r.up_column + r.width]
            y = y * ((up.clamp(-r.limit, r.limit) if r.limit else up) + r.up_offset)
        y = y * r.scale
        self.v[r.out] = r.softcap * torch.tanh(y / r.softcap) if r.softcap else y

    def _product(self, r):
        y = []
        for i in range(r.count):
            w = weight(r.weight[i])
            b = vector(r.bias[i], w.shape[0])
            y.append(F.linear(self.v[r.x][..., r.x_column : r.x_column + w.shape[1]], w, b))
        if r.gated:
            self.v[r.out[0]] = _ACTS[r.act](y[0]) * y[1]
            return
        for i in range(r.count):
            out = r.out_scale * _ACTS[r.act](y[i])
            self.v[r.out[i]] = out if r.residual < 0 else out + r.residual_scale * self.v[r.residual]

    def _split(self, of, d):
        columns = memory(of.column, torch.int32, (of.count,)).tolist()
        return torch.stack([self.v[of.x][..., c : c + d] for c in columns], 1)

    def _rotate(self, x, r, run):
        if r.angles < 0 or not r.rotary:
            return x
        table = run.angles[r.angles]
        tokens = x.shape[0], x.shape[2]
        if table.by_row:
            at = torch.arange(tokens[0] * tokens[1]).view(tokens)
        else:
            at = memory(run.positions, torch.int64, tokens)
        rows = int(at.max()) + 1
        cos, sin = (
            memory(a, _TYPES[table.type], (rows, r.rotary), (table.stride, 1)).float()[at].unsqueeze(1)
            for a in (table.cos, table.sin)
        )
        head, rest = x[..., : r.rotary], x[..., r.rotary :]
        if r.interleaved:
            turned = torch.stack((-head[..., 1::2], head[..., ::2]), -1).flatten(-2)
        else:
            a, b = head.chunk(2, -1)
            turned = torch.cat((-b, a), -1)
        return torch.cat((head * cos + turned * sin, rest), -1)

    def _heads(self, r):
        q = self._rotate(norm(self._split(r.q, r.d), r.q_norm, r.d), r, self.run_)
        self.v[r.out] = q.transpose(1, 2).flatten(2)
        if r.k.count:
            k = self._rotate(norm(self._split(r.k, r.d), r.k_norm, r.d), r, self.run_)
            v = self._split(r.v, r.dv)
            c, n = self.caches[r.layer], k.shape[2]
            for new, cached in zip((k, v), self._cached(c, k.shape[0], k.shape[1], n, r.d, r.dv), strict=True):
                cached[:, :, c.held :] = new.to(cached.dtype)

    def _cached(self, c, batch, heads, new, d, dv):
        length = c.held + new
        k = memory(c.k, _TYPES[c.type], (batch, heads, length, d), (c.k_batch, c.k_head, c.k_token, 1))
        return k, memory(c.v, _TYPES[c.type], (batch, heads, length, dv), (c.v_batch, c.v_head, c.v_token, 1))

    def _attend(self, r):
        q = self.v[r.q].unflatten(-1, (r.heads, r.d)).transpose(1, 2)
        c, new, run = self.caches[r.layer], q.shape[2], self.run_
        k, v = (
            t.float().repeat_interleave(r.heads // r.groups, 1)
            for t in self._cached(c, q.shape[0], r.groups, new, r.d, r.dv)
        )
        scores = q @ k.mT * r.scale
        if r.softcap:
            scores = r.softcap * torch.tanh(scores / r.softcap)
        key = torch.arange(k.shape[2])
        query = c.held + torch.arange(new)[:, None]
        if r.alibi:
            slopes = memory(r.alibi, torch.float32, (r.heads,))
            scores = scores + slopes[:, None, None] * (key - query)
        seen = key <= query
        if r.window:
            seen = seen & (key > query - r.window)
        seen = seen.expand(q.shape[0], 1, new, k.shape[2])
        if run.starts:
            starts = memory(run.starts, torch.int64, (q.shape[0],)) - (run.past - c.held)
            seen = seen & (key >= starts[:, None, None, None])
        scores = scores.masked_fill(~seen, float("-inf"))
        sinks = vector(r.sinks, r.heads)
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(q.shape[0], -1, new, 1)), -1)
        weights = scores.softmax(-1)[..., : k.shape[2]].nan_to_num()
        self.v[r.out] = (weights @ v).transpose(1, 2).flatten(2)

    def _keep(self, r):
        self.v[r.out] = self.v[r.x][:, self.v[r.x].shape[1] - self.run_.keep :]


_NAMES = ["norm", "combine", "activate", "product", "heads", "attend", "experts", "keep"]
