"""Step programs made by hand, and what they mean in float64."""

from __future__ import annotations

from ctypes import Structure, addressof, c_int32

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkernels.ops import program as raw
from bigkernels.program import _records as r

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Maker:
    """Collects records, and keeps what they point to."""

    def __init__(self, width: int) -> None:
        self.records: list[Structure] = []
        self.widths: list[int] = []
        self.kept: list[object] = []
        self.layers = 0
        self.hidden = self.value(width)

    def value(self, width: int) -> int:
        self.widths.append(width)
        return len(self.widths) - 1

    def vector(self, t: Tensor | None) -> r.Vector:
        if t is None:
            return r.Vector()
        self.kept.append(t)
        return r.Vector(data=t.data_ptr(), type=TYPES[t.dtype])

    def norm_of(self, kind: str | None, weight=None, bias=None, eps=1e-5, offset=0.0) -> r.NormOf:
        kind_number = r.NORMS[kind] if kind else 0
        return r.NormOf(kind=kind_number, eps=eps, offset=offset, weight=self.vector(weight), bias=self.vector(bias))

    def add(self, op: int, **of: Structure) -> None:
        record = r.Record(op=op)
        for name, value in of.items():
            setattr(record, name, value)
        self.records.append(record)

    def norm(self, x, kind="rms", weight=None, bias=None, residual=-1, size=0, scale=1.0, residual_scale=1.0, **more):
        out = self.value(self.widths[x])
        norm = self.norm_of(kind, weight, bias, **more)
        record = r.NormRecord(x=x, out=out, residual=residual, size=size or self.widths[x], norm=norm, scale=scale)
        record.residual_scale = residual_scale
        self.add(r.NORM, norm=record)
        return out

    def combine(self, *terms: tuple[int, float, Tensor | None]) -> int:
        out = self.value(self.widths[terms[0][0]])
        record = r.CombineRecord(out=out, count=len(terms))
        for i, (x, scale, channel) in enumerate(terms):
            record.x[i], record.scale[i], record.channel[i] = x, scale, self.vector(channel)
        self.add(r.COMBINE, combine=record)
        return out

    def activate(self, x, act, width=0, up=-1, **more) -> int:
        width = width or self.widths[x]
        out = self.value(width)
        more = {"scale": 1.0, "alpha": 1.702} | more
        self.add(r.ACTIVATE, activate=r.ActivateRecord(x=x, up=up, out=out, act=r.ACTS[act], width=width, **more))
        return out

    def product(
        self, x, *weights: Tensor, act="identity", gated=False, bias=None, residual=-1, scale=1.0, residual_scale=1.0
    ) -> list[int]:
        """Dense weights side by side, (N, K) each; a gated one is act(first) * second."""
        record = r.ProductRecord(x=x, count=len(weights), act=r.ACTS[act], gated=gated, residual=residual)
        record.out_scale, record.residual_scale = scale, residual_scale
        for i, weight in enumerate(weights):
            self.kept.append(weight)
            n, k = weight.shape
            record.weight[i] = r.Weight(
                n=n, k=k, kind=TYPES[weight.dtype], codes=weight.data_ptr(), code_row=weight.stride(0) * weight.itemsize
            )
            record.out[i] = -1 if gated and i else self.value(n)
            record.bias[i] = self.vector(bias[i] if bias else None)
        self.add(r.PRODUCT, product=record)
        return [record.out[i] for i in range(1 if gated else len(weights))]

    def heads(
        self, q: int, k: int, v: int, heads: int, groups: int, d: int, layer: int, norm: Tensor | None = None
    ) -> int:
        """Of values that hold heads of d columns side by side; all of a head is rotated, by table 0. `norm`: (d,), the
        weight of a norm of each query and key.
        """
        out = self.value(heads * d)
        columns = (c_int32 * heads)(*(h * d for h in range(heads)))
        self.kept.append(columns)
        of = [r.HeadsOf(x=x, count=n, column=addressof(columns)) for x, n in ((q, heads), (k, groups), (v, groups))]
        record = r.HeadsRecord(q=of[0], k=of[1], v=of[2], out=out, layer=layer, d=d, dv=d, angles=0, rotary=d)
        if norm is not None:
            record.q_norm = record.k_norm = self.norm_of("rms", norm)
        self.layers = max(self.layers, layer + 1)
        self.add(r.HEADS, heads=record)
        return out

    def attend(self, q: int, layer: int, heads: int, groups: int, d: int) -> int:
        out = self.value(heads * d)
        record = r.AttendRecord(q=q, out=out, layer=layer, heads=heads, groups=groups, d=d, dv=d, scale=d**-0.5)
        record.state = -1
        self.add(r.ATTEND, attend=record)
        return out

    def keep(self, x: int) -> int:
        out = self.value(self.widths[x])
        self.add(r.KEEP, keep=r.KeepRecord(x=x, out=out))
        return out

    def call(self, xs: list[int], widths: list[int]) -> list[int]:
        outs = [self.value(w) for w in widths]
        x, out = (c_int32 * len(xs))(*xs), (c_int32 * max(len(outs), 1))(*outs)
        self.kept += [x, out]
        record = r.CallRecord(reads=len(xs), writes=len(outs), x=addressof(x), out=addressof(out))
        self.add(r.CALL, call=record)
        return outs

    def program(self, logits: int, angles: int = 0) -> Tensor:
        return r.pack(self.records, self.widths, hidden=self.hidden, logits=logits, layers=self.layers, angles=angles)


def no_records(columns: int = 5) -> Tensor:
    return torch.empty(0, columns, dtype=torch.int64, device="cpu")


def run(
    program: Tensor, hidden: Tensor, width: int, keep: int = 1, past: int = 0, caches=None, angles=None, settle=True
) -> Tensor:
    batch, tokens, _ = hidden.shape
    logits = torch.empty(batch, keep, width, dtype=hidden.dtype, device="cpu")
    positions = (past + torch.arange(tokens, dtype=torch.int64, device="cpu")).expand(batch, tokens).contiguous()
    caches = no_records(15) if caches is None else caches
    angles = no_records() if angles is None else angles
    raw.run(program, hidden, positions, None, caches, angles, logits, past)
    if settle:  # what the program points to may be gone next
        raw.settle()
    return logits


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def norm(x: Tensor, kind: str, weight, bias, eps=1e-5, offset=0.0) -> Tensor:
    x = x.double()
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * (weight.double() + offset)
    return y if bias is None else y + bias.double()
