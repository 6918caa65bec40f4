"""Operations joined as the records have them: products of one input side by side, and what follows a product in it."""

# mypy: ignore-errors

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from ..nn.quantized_linear import QuantizedLinear
from ._ir import Activate, Combine, Norm, Operation, Product, Stored
from ._records import MAX_TERMS, MAX_WEIGHTS
from ._trace import Refused


@dataclass(frozen=True)
class Part:
    """Rows [begin, end) of a layer's weight; `end` None: all."""

    module: nn.Module
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Products:
    """out[i] = out_scale * act(part_i(x)) + residual_scale * residual; `gated`: out[0] = act(part_0(x)) * part_1(x)."""

    x: int
    outs: tuple[int, ...]
    parts: tuple[Part, ...]
    x_column: int = 0
    act: str = "identity"
    gated: bool = False
    residual: int | None = None
    out_scale: float = 1.0
    residual_scale: float = 1.0

    @property
    def bare(self) -> bool:
        return not self.gated and self.act == "identity" and self.residual is None and self.out_scale == 1.0


def reads(operation: Operation | Products) -> tuple[int, ...]:
    """The values that an operation reads, one for each time."""
    match operation:
        case Combine():
            return tuple(x for x, _, _ in operation.terms)
        case Products():
            return operation.x, *(() if operation.residual is None else (operation.residual,))
    given = (
        getattr(operation, name, None) for name in ("x", "residual", "up", "q", "k", "v", "logits", "weights", "chosen")
    )
    values = [g if isinstance(g, int) else g.x for g in given if g is not None]
    return (*values, *getattr(operation, "xs", ()))


def writes(operation: Operation | Products) -> tuple[int, ...]:
    if isinstance(operation, Products):
        return operation.outs
    return getattr(operation, "outs", None) or (operation.out,)


def fuse(operations: list[Operation], widths: list[int], kept: int) -> list[Operation | Products]:
    """The same values, `kept` among them, by fewer operations; those in between are not made any more. Values may be
    added to `widths`.
    """
    fused: list = []
    for o in operations:
        if isinstance(o, Product):
            x = o.x
            if isinstance(o.module, QuantizedLinear) and o.module.qweight.order is not None:
                raise Refused("a layer whose codes meet its inputs in another order")
            if isinstance(o.module, QuantizedLinear) and o.module.qweight.channel is not None:
                if o.x_column or widths[x] != o.module.in_features:
                    raise Refused("a layer with scaled inputs that reads a part of a value")
                x = len(widths)
                widths.append(widths[o.x])
                fused.append(Combine(x, ((o.x, 1.0, Stored(o.module, "channel")),)))
            o = Products(x, (o.out,), (Part(o.module),), o.x_column)
        fused.append(o)
    for step in (_activations, _flat_sums, _sums, _residual_norms):
        fused = step(fused, widths, kept)
    return list(_side_by_side(fused))


class _Places:
    """Where values are made, and how often they are read."""

    def __init__(self, operations: list, kept: int) -> None:
        self.made = {v: i for i, o in enumerate(operations) for v in writes(o)}
        self.count = Counter(v for o in operations for v in reads(o))
        self.count[kept] += 1

    def producer(self, operations: list, value: int, kind: type) -> int | None:
        """Where the operation of a kind stands that makes a value which one other reads, once."""
        at = self.made.get(value)
        return at if at is not None and self.count[value] == 1 and isinstance(operations[at], kind) else None


def _activations(operations: list, widths: list[int], kept: int) -> list:
    places = _Places(operations, kept)
    made: list = list(operations)
    for i, o in enumerate(operations):
        if (
            not isinstance(o, Activate)
            or o.softcap
            or o.limit
            or o.up_offset
            or (o.act == "quick_gelu" and o.alpha != 1.702)
        ):
            continue
        if o.up is None:
            at = places.producer(operations, o.x, Products)
            if at is not None and made[at].bare and o.x_column == 0 and o.width == widths[o.x]:
                made[at] = replace(made[at], outs=(o.out,), act=o.act, out_scale=o.scale)
                made[i] = None
        elif o.scale == 1.0:
            if o.up == o.x:
                at = places.made.get(o.x)
                two = at is not None and places.count[o.x] == 2 and isinstance(made[at], Products) and made[at].bare
                if two:
                    module = made[at].parts[0].module
                    parts = (
                        Part(module, o.x_column, o.x_column + o.width),
                        Part(module, o.up_column, o.up_column + o.width),
                    )
                    made[at] = replace(made[at], outs=(o.out,), parts=parts, act=o.act, gated=True)
                    made[i] = None
                continue
            first, second = (places.producer(operations, v, Products) for v in (o.x, o.up))
            if first is None or second is None or o.x_column or o.up_column:
                continue
            if not o.width == widths[o.x] == widths[o.up]:
                continue
            gate, up = made[first], made[second]
            if gate.bare and up.bare and (gate.x, gate.x_column) == (up.x, up.x_column):
                later, earlier = max(first, second), min(first, second)
                made[later] = replace(gate, outs=(o.out,), parts=gate.parts + up.parts, act=o.act, gated=True)
                made[earlier] = made[i] = None
    return [o for o in made if o is not None]


def _flat_sums(operations: list, widths: list[int], kept: int) -> list:
    """A sum of sums is one, as far as there is room for its terms."""
    places = _Places(operations, kept)
    made: list = list(operations)
    for i, o in enumerate(operations):
        if not isinstance(o, Combine):
            continue
        terms = list(o.terms)
        for term in o.terms:
            value, scale, channel = term
            at = places.producer(operations, value, Combine) if channel is None else None
            if at is not None and len(terms) - 1 + len(made[at].terms) <= MAX_TERMS:
                terms.remove(term)
                terms += [(x, scale * s, c) for x, s, c in made[at].terms]
                made[at] = None
        made[i] = Combine(o.out, tuple(terms))
    return [o for o in made if o is not None]


def _sums(operations: list, widths: list[int], kept: int) -> list:
    """Sums go into the product of their last term; of more than two terms, the others are a sum of their own."""
    again = True
    while again:
        again = False
        places = _Places(operations, kept)
        for i, o in enumerate(operations):
            if not isinstance(o, Combine) or len(o.terms) < 2 or any(channel is not None for *_, channel in o.terms):
                continue
            last = max(o.terms, key=lambda term: places.made.get(term[0], -1))
            at = places.producer(operations, last[0], Products)
            rest = tuple(term for term in o.terms if term is not last)
            if at is None or not _takes_residual(operations[at]) or widths[o.out] != widths[last[0]]:
                continue
            before: list = []
            if len(rest) == 1:
                ((value, scale, _),) = rest
            else:
                value, scale = len(widths), 1.0
                widths.append(widths[o.out])
                before.append(Combine(value, rest))
            p = operations[at]
            fused = replace(p, outs=(o.out,), out_scale=p.out_scale * last[1], residual=value, residual_scale=scale)
            operations = [*operations[:at], *before, fused, *operations[at + 1 : i], *operations[i + 1 :]]
            again = True
            break
    return operations


def _takes_residual(p: Products) -> bool:
    return p.residual is None and not p.gated and len(p.outs) == 1


def _residual_norms(operations: list, widths: list[int], kept: int) -> list:
    places = _Places(operations, kept)
    made: list = list(operations)
    for i, o in enumerate(operations):
        if not isinstance(o, Combine) or len(o.terms) != 2 or any(channel is not None for *_, channel in o.terms):
            continue
        for (value, scale, _), (other, other_scale, _) in (o.terms, o.terms[::-1]):
            at = places.producer(operations, value, Norm)
            if (
                at is not None
                and made[at] is not None
                and made[at].residual is None
                and places.made.get(other, -1) < at
            ):
                made[at] = replace(
                    made[at], out=o.out, scale=made[at].scale * scale, residual=other, residual_scale=other_scale
                )
                made[i] = None
                break
    return [o for o in made if o is not None]


def _side_by_side(operations: list) -> Iterator:
    """Products of one input that nothing is joined to, up to four in one record where the first of them stands."""
    taken: set[int] = set()
    for i, o in enumerate(operations):
        if i in taken:
            continue
        if isinstance(o, Products) and o.bare:
            group = [
                (j, p)
                for j, p in enumerate(operations[i:], i)
                if isinstance(p, Products) and p.bare and (p.x, p.x_column) == (o.x, o.x_column) and j not in taken
            ][:MAX_WEIGHTS]
            taken.update(j for j, _ in group)
            o = replace(o, outs=tuple(p.outs[0] for _, p in group), parts=tuple(p.parts[0] for _, p in group))
        yield o
