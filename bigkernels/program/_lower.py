"""From a graph to records: weights by address, values by number."""

# mypy: ignore-errors

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch

from ..nn.quantized_experts import QuantizedExperts
from . import _records as records
from ._fuse import Products, fuse
from ._ir import Activate, Attend, Call, Combine, Experts, Graph, Heads, HeadsOf, Keep, Norm, NormSpec
from ._lower_experts import experts_record
from ._trace import Refused
from ._weights import TYPES, Operand, Reads, rows_of

OPS = {
    "norm": records.NORM,
    "combine": records.COMBINE,
    "activate": records.ACTIVATE,
    "product": records.PRODUCT,
    "heads": records.HEADS,
    "attend": records.ATTEND,
    "experts": records.EXPERTS,
    "keep": records.KEEP,
    "call": records.CALL,
}


class Lowered:
    """The records of a graph.

    Attributes:
        records: their list; `packed`, the same for the operator.
        widths: of the values.
        calls: the model's own code in the middle, by the number of the record where the others stop.
        keeps: the number of the record after which there are rows of logits alone, or None.
        reads: the tensors that they have addresses of.
        products: how many weights are multiplied with.
        rounds: whether tokens are rounded for some of them.
        hidden, logits: the values that go in and come out.
    """

    def __init__(self, graph: Graph, dtype: torch.dtype, integers: bool | None = None) -> None:
        """
        Args:
            dtype: of the hidden states of the model.
            integers: whether 4- and 8-bit codes are multiplied as integers, with tokens rounded to 8 bits a block of
                32; by default where the model computes in 16 bits.

        Raises:
            Refused: with what records cannot hold.
        """
        self.reads, self.products, self.rounds = Reads(), 0, False
        self._integers = dtype in (torch.bfloat16, torch.float16) if integers is None else integers
        self._dtype, self._widths = dtype, list(graph.widths)
        self.records: list[records.Record] = []
        self.calls: dict[int, Call] = {}
        for operation in fuse(graph.operations, self._widths, graph.logits):
            self._add(operation)
        self._compact(graph)

    def _add(self, operation: object) -> None:
        lower = _LOWER.get(type(operation))
        if lower is None:
            where = getattr(operation, "path", "")
            raise Refused(f"{type(operation).__name__.lower()} {where}".strip() + " has no records")
        name, lowered = lower(self, operation)
        record = records.Record(op=OPS[name])
        setattr(record, name, lowered)
        self.records.append(record)

    # ---- one kind each

    def _norm_of(self, spec: NormSpec | None) -> records.NormOf:
        if spec is None:
            return records.NormOf()
        parts = (
            self.reads.vector(v, spec.size, f"a norm's {n}") for n, v in (("weight", spec.weight), ("bias", spec.bias))
        )
        return records.NormOf(records.NORMS[spec.kind], spec.eps, spec.offset, 0, *parts)

    def _norm(self, o: Norm) -> tuple[str, records.NormRecord]:
        return "norm", records.NormRecord(
            o.x, o.out, _or_none(o.residual), 0, o.spec.size, self._norm_of(o.spec), o.scale, o.residual_scale
        )

    def _combine(self, o: Combine) -> tuple[str, records.CombineRecord]:
        if len(o.terms) > records.MAX_TERMS:
            raise Refused(f"a sum of {len(o.terms)} terms")
        record = records.CombineRecord(o.out, len(o.terms))
        for i, (x, scale, channel) in enumerate(o.terms):
            record.x[i], record.scale[i] = x, scale
            record.channel[i] = self.reads.vector(channel, self._widths[o.out], "a channel scale")
        return "combine", record

    def _activate(self, o: Activate) -> tuple[str, records.ActivateRecord]:
        return "activate", records.ActivateRecord(
            o.x,
            _or_none(o.up),
            o.out,
            records.ACTS[o.act],
            o.x_column,
            o.up_column,
            o.width,
            o.scale,
            o.softcap,
            o.limit,
            o.alpha,
            o.up_offset,
        )

    def _product(self, o: Products) -> tuple[str, records.ProductRecord]:
        operands = [self.reads.weight(part.module) for part in o.parts]
        self.products += len(operands)
        record = records.ProductRecord(
            x=o.x,
            count=len(operands),
            act=records.ACTS[o.act],
            gated=o.gated,
            residual=_or_none(o.residual),
            out_scale=o.out_scale,
            residual_scale=o.residual_scale,
            x_column=o.x_column,
            integers=self._rounding(all(operand.rounds for operand in operands)),
        )
        self.rounds |= record.integers == 1 and any(w.weight.kind not in TYPES.values() for w in operands)
        for i in range(records.MAX_WEIGHTS):
            record.out[i] = -1
        for i, (part, operand) in enumerate(zip(o.parts, operands, strict=True)):
            begin, end = part.begin, operand.weight.n if part.end is None else part.end
            record.out[i] = o.outs[min(i, len(o.outs) - 1)]
            record.weight[i] = (
                operand.weight if end - begin == operand.weight.n else rows_of(operand.weight, begin, end)
            )
            record.bias[i] = self._bias(operand, begin, end)
        return "product", record

    def _rounding(self, dynamic: bool) -> int:
        """What becomes of tokens that meet codes; `dynamic`: the format rounds them by itself."""
        return 1 if dynamic or self._integers else 2 if self._dtype == torch.bfloat16 else 0

    def _bias(self, operand: Operand, begin: int, end: int) -> records.Vector:
        vector = self.reads.vector(operand.bias, operand.weight.n, "a bias")
        if vector.data and begin:
            vector.data += begin * operand.bias.itemsize
        return vector

    def _heads_of(self, of: HeadsOf | None) -> records.HeadsOf:
        if of is None:
            return records.HeadsOf(-1, 0, None)
        columns = (ctypes.c_int32 * len(of.columns))(*of.columns)
        self.reads.made.append(columns)
        return records.HeadsOf(of.x, len(of.columns), ctypes.addressof(columns))

    def _heads(self, o: Heads) -> tuple[str, records.HeadsRecord]:
        d, dv = o.q.d, o.q.d if o.v is None else o.v.d
        return "heads", records.HeadsRecord(
            self._heads_of(o.q),
            self._heads_of(o.k),
            self._heads_of(o.v),
            o.out,
            o.layer,
            d,
            dv,
            self._norm_of(o.q_norm),
            self._norm_of(o.k_norm),
            _or_none(o.angles),
            o.rotary,
            o.interleaved,
        )

    def _attend(self, o: Attend) -> tuple[str, records.AttendRecord]:
        alibi = None if o.alibi is None else (ctypes.c_float * len(o.alibi))(*o.alibi)
        self.reads.made.append(alibi)
        return "attend", records.AttendRecord(
            o.q,
            o.out,
            o.layer,
            o.heads,
            o.groups,
            o.d,
            o.dv,
            o.scale,
            o.softcap,
            0,
            o.window,
            self.reads.vector(o.sinks, o.heads, "sinks"),
            None if alibi is None else ctypes.addressof(alibi),
            -1,
        )

    def _experts(self, o: Experts) -> tuple[str, records.ExpertsRecord]:
        record = experts_record(o, self.reads, self._new, self._rounding(False))
        self.products += 3
        held = (getattr(o.stacked.module, name) for name in (o.stacked.gate_up, o.stacked.down))
        self.rounds |= record.integers == 1 and any(isinstance(weights, QuantizedExperts) for weights in held)
        return "experts", record

    def _new(self, width: int) -> int:
        self._widths.append(width)
        return len(self._widths) - 1

    def _keep(self, o: Keep) -> tuple[str, records.KeepRecord]:
        return "keep", records.KeepRecord(o.x, o.out)

    def _call(self, o: Call) -> tuple[str, records.CallRecord]:
        x, out = ((ctypes.c_int32 * len(values))(*values) for values in (o.xs, o.outs))
        self.reads.made += [x, out]
        self.calls[len(self.records)] = o
        return "call", records.CallRecord(len(o.xs), len(o.outs), ctypes.addressof(x), ctypes.addressof(out))

    # ---- the list

    def _compact(self, graph: Graph) -> None:
        """Numbers the values that are left and puts the records in one list."""
        numbers: dict[int, int] = {}

        def number(v: int) -> int:
            return v if v < 0 else numbers.setdefault(v, len(numbers))

        self.hidden = number(graph.hidden)
        for record in self.records:
            _renumber(record, number)
        self.logits = number(graph.logits)
        self.calls = {
            at: replace(o, xs=tuple(map(number, o.xs)), outs=tuple(map(number, o.outs))) for at, o in self.calls.items()
        }
        self.keeps = next((i for i, record in enumerate(self.records) if record.op == records.KEEP), None)
        self.widths = [self._widths[v] for v in numbers]
        self.packed = records.pack(
            self.records,
            self.widths,
            hidden=self.hidden,
            logits=self.logits,
            layers=graph.layers,
            angles=len(graph.angles),
            scores=len(getattr(graph, "scores", ())),
        )


_LOWER = {
    Norm: Lowered._norm,
    Combine: Lowered._combine,
    Activate: Lowered._activate,
    Products: Lowered._product,
    Heads: Lowered._heads,
    Attend: Lowered._attend,
    Experts: Lowered._experts,
    Keep: Lowered._keep,
    Call: Lowered._call,
}
_VALUES = {
    "norm": ("x", "out", "residual"),
    "activate": ("x", "up", "out"),
    "keep": ("x", "out"),
    "attend": ("q", "out", "state"),
    "experts": ("x", "out", "logits", "weights", "chosen", "hidden", "residual"),
}


def _renumber(record: records.Record, number) -> None:
    name = next(name for name, op in OPS.items() if op == record.op)
    made = getattr(record, name)
    if name == "combine":
        for i in range(made.count):
            made.x[i] = number(made.x[i])
        made.out = number(made.out)
    elif name == "product":
        made.x, made.residual = number(made.x), number(made.residual)
        for i in range(made.count):
            made.out[i] = number(made.out[i])
    elif name == "call":
        for values, count in ((made.x, made.reads), (made.out, made.writes)):
            listed = (ctypes.c_int32 * count).from_address(values)
            listed[:] = [*map(number, listed)]
    elif name in ("heads", "mix", "turn"):
        for of in (made.x,) if name == "turn" else (made.q, made.k, made.v):
            of.x = number(of.x)
        made.out = number(made.out)
    else:
        for field in _VALUES[name]:
            setattr(made, field, number(getattr(made, field)))


def _or_none(value: int | None) -> int:
    return -1 if value is None else value
