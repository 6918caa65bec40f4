"""From a recorded call to operations: what each piece between two products computes, told from its numbers."""

# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from . import _layers
from ._attention import attention_between, spelled_out
from ._calls import add_call, window_in, with_window
from ._covered import check_covered
from ._experts import add_experts
from ._forms import as_activation, as_norm, as_softcap, close, constant, plain, random
from ._heads import Rotations, heads_between
from ._ir import (
    Activate,
    Attend,
    Call,
    Combine,
    Graph,
    Heads,
    Norm,
    Product,
    Stored,
    StoredLinear,
)
from ._keep import keep_last
from ._masks import far_windows, hints, is_softmax
from ._record import Trace
from ._replay import between, dominators, replay
from ._rows import as_rows, from_rows
from ._steps import add_steps
from ._trace import ModuleCall, Ref, Refused, Step, leaves

_FAR = 40  # how many tensors before a value are tried as what it was made from
_PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "addmm"}


class Builder:
    """Makes a graph of a trace."""

    def __init__(self, trace: Trace, opaque: Collection[ModuleCall] = (), steps: bool = False):
        self.trace, self.recorder = trace, trace.recorder
        self.graph = Graph()
        self.values: dict[Ref, int] = {}
        self.rotations = Rotations(self)
        self.appended: dict[int, Ref] = {}  # layer of the cache: the step that its keys come from
        self.device = trace.tokens.device
        self.steps = steps  # whether recorded steps may stand for code that nobody knows
        self.needed: set[int] = set()
        self.refused: Refused | None = None  # the first of an attempt that failed inside
        self.memory: dict[tuple, object] = {}  # what was found of modules of a kind
        self.opaque = {c.begin: c for c in sorted(opaque, key=lambda c: c.begin - c.end)}
        self.samples: dict[tuple[int, int], Tensor] = {}  # by width and seed
        self.made: dict[int, object] = {}  # the operation that makes a value

    # ---- rows --------------------------------------------------------------------------------------------------------

    def tensor(self, ref: Ref) -> Tensor:
        return self.recorder.steps[ref.step].outs[ref.number]

    def path(self, ref: Ref) -> str:
        return self.recorder.steps[ref.step].path or "(model)"

    def rows(self, t: Tensor) -> Tensor | None:
        return as_rows(t, *self.trace.tokens.shape)

    def unrows(self, rows: Tensor, like: Tensor) -> Tensor:
        return from_rows(rows, like, *self.trace.tokens.shape)

    def function(self, ref: Ref, source: Ref) -> Callable[[Tensor], Tensor]:
        """Rows of `ref` from rows of `source`."""
        like = self.tensor(source)

        def compute(x: Tensor) -> Tensor:
            (out,) = replay(self.recorder, [ref], {source: self.unrows(x, like)})
            rows = self.rows(out)
            if rows is None:
                raise Refused(f"{self.path(ref)}: has no row for each token")
            return rows

        return compute

    def sample(self, width: int, seed: int = 0) -> Tensor:
        if (width, seed) not in self.samples:
            self.samples[width, seed] = random(self.trace.rows, width, seed=seed, device=self.device)
        return self.samples[width, seed]

    def vectors(self, ref: Ref, known: Collection[Ref]) -> list[Stored]:
        """The parameters and buffers that the steps up to `ref` read, themselves or what was made of them."""
        found: dict[Stored, None] = {}
        for number in between(self.recorder, ref, known):
            for leaf in self._constants(self.recorder.steps[number]):
                found[leaf] = None
        return list(found)

    def _constants(self, step: Step):
        for leaf in leaves((step.args, step.kwargs)):
            if isinstance(leaf, Ref):
                other = self.recorder.steps[leaf.step]
                if not other.depends:
                    yield from self._constants(other)
            elif isinstance(leaf, Tensor) and id(leaf) in self.trace.stored:
                yield self.trace.stored[id(leaf)]

    def own_layers(self, call: ModuleCall, layer: int, masked: bool) -> None:
        """A call keeps a layer of the cache. Only `masked`, it can be told of padding."""
        if any(u.layer == layer and not call.begin <= u.step < call.end for u in self.trace.updates):
            raise Refused(f"{call.path}: others write to its layer of the cache")
        if not masked and any(call.begin <= u.step < call.end for u in self.trace.updates):
            raise Refused(f"{call.path}: its attention has no mask")
        self.graph.owned.add(layer)
        self.graph.padded = self.graph.padded and masked

    # ---- values ------------------------------------------------------------------------------------------------------

    def add(self, op: object, out: int) -> int:
        self.graph.operations.append(op)
        self.made[out] = op
        return out

    def new(self, width: int) -> int:
        return self.graph.value(width)

    def value(self, ref: Ref) -> int:
        """The number of the value that has the rows of `ref`; operations that make it are added.

        Raises:
            Refused: nobody knows how.
        """
        if ref in self.values:
            return self.values[ref]
        value = self._same(ref)
        if value is None:
            attempts = (self._norm, self._activation, self._gated, self._combination)
            for attempt in (*attempts, *([functools.partial(add_steps, self)] if self.steps else [])):
                value = self._tried(attempt, ref)
                if value is not None:
                    break
        if value is None:
            refused, self.refused = self.refused, None
            raise refused or Refused(f"{self.path(ref)}: what it computes is not known", ref.step)
        self.refused = None
        self.values[ref] = value
        return value

    def _tried(self, attempt: Callable, ref: Ref) -> int | None:
        """What an attempt finds; one that fails on the way leaves nothing behind."""
        count, known = len(self.graph.operations), dict(self.values)
        try:
            return attempt(ref)
        except Refused as refused:
            self.refused = self.refused or refused
            del self.graph.operations[count:]
            self.values = known
            return None

    def part(self, ref: Ref) -> tuple[int, int]:
        """(value, column) of rows that may be columns of a value."""
        if ref in self.values:
            return self.values[ref], 0
        rows = self.rows(self.tensor(ref))
        for source in self._sources(ref):
            wide = self.rows(self.tensor(source))
            if wide is None or rows is None or wide.shape[1] <= rows.shape[1]:
                continue
            column = self._column(ref, source, wide.shape[1], rows.shape[1])
            if column is not None:
                value, before = self.part(source)
                return value, before + column
            break
        return self.value(ref), 0

    def _column(self, ref: Ref, source: Ref, wide: int, width: int) -> int | None:
        numbers = torch.arange(1, wide + 1, dtype=torch.float64, device=self.device).expand(self.trace.rows, -1)
        try:
            outputs = self.function(ref, source)(numbers)
        except Refused:
            return None
        first = round(outputs[0, 0].item()) - 1
        expected = numbers[:, first : first + width]
        if first < 0 or not torch.equal(outputs, expected) or not self._linear(ref, source, wide):
            return None
        return first

    def _linear(self, ref: Ref, source: Ref, width: int) -> bool:
        x, y = self.sample(width, 1), self.sample(width, 2)
        function = self.function(ref, source)
        return close(function(x) + 2 * function(y), function(x + 2 * y))

    def _sources(self, ref: Ref) -> list[Ref]:
        candidates = []
        for source in dominators(self.recorder, ref, self.values):
            candidates.append(source)
            if len(candidates) >= _FAR:
                break
        return candidates

    def _same(self, ref: Ref) -> int | None:
        """A view, a copy, a cast, dropout in evaluation."""
        rows = self.rows(self.tensor(ref))
        source = next(iter(self._sources(ref)), None)
        if source is None or rows is None:
            return None
        before = self.rows(self.tensor(source))
        if before is None or before.shape != rows.shape or not torch.equal(before, rows):
            return None
        return self.value(source)

    def _norm(self, ref: Ref) -> int | None:
        rows = self.rows(self.tensor(ref))
        if rows is None:
            return None
        last = self.tensor(ref).shape[-1]
        best = None
        for source in self._sources(ref):
            before = self.rows(self.tensor(source))
            if before is None or before.shape != rows.shape:
                continue
            vectors = self.vectors(ref, {source})
            sizes = {last, self.tensor(source).shape[-1], rows.shape[1], *(v.get().numel() for v in vectors)}
            for size in sorted(s for s in sizes if rows.shape[1] % s == 0):
                norm = as_norm(self.function(ref, source), size, self.sample(rows.shape[1]), vectors)
                if norm is not None:
                    best = source, norm
                    break
            if best is not None:
                break
        if best is None:
            return None
        source, (spec, scale) = best
        x = self.value(source)
        out = self.new(rows.shape[1])
        return self.add(Norm(x, out, spec, scale=scale), out)

    def _activation(self, ref: Ref) -> int | None:
        activation = self._act_of(ref, softcap=True)
        if activation is None:
            return None
        source, (act, scale, alpha, cap) = activation
        if act == "identity" and not cap:
            return None
        width = self.rows(self.tensor(ref)).shape[1]
        x, column = self.part(source)
        out = self.new(width)
        return self.add(Activate(x, out, act, width, x_column=column, scale=scale, alpha=alpha, softcap=cap), out)

    def _act_of(self, ref: Ref, softcap: bool = False) -> tuple[Ref, tuple[str, float, float, float]] | None:
        """(source, (name, scale, alpha, softcap)) of the farthest tensor that `ref` is an activation of."""
        rows = self.rows(self.tensor(ref))
        if rows is None:
            return None
        best = None
        for source in self._sources(ref):
            before = self.rows(self.tensor(source))
            if before is None or before.shape != rows.shape:
                continue
            x = self.sample(rows.shape[1])
            activation = as_activation(self.function(ref, source), x)
            if activation is not None:
                best = source, (*activation, 0.0)
            elif softcap:
                cap = as_softcap(self.function(ref, source), x)
                if cap is not None:
                    best = source, ("identity", cap[0], 1.702, cap[1])
        return best

    def _gated(self, ref: Ref) -> int | None:
        """act(x) * up"""
        step = self._made_by(ref)
        inputs = step.inputs
        if len(inputs) != 2:
            return None
        width = self.rows(self.tensor(ref)).shape[1] if self.rows(self.tensor(ref)) is not None else 0
        if not width or not all(self._width(r) == width for r in inputs) or not self._is_product_of(step, inputs):
            return None
        for act_side, up_side in (inputs, inputs[::-1]):
            activation = self._act_of(act_side)
            if activation is None and act_side in self.values:
                continue
            if activation is None or activation[1][0] == "identity":
                continue
            source, (act, scale, alpha, _) = activation
            x, column = self.part(source)
            up, up_column = self.part(up_side)
            out = self.new(width)
            return self.add(Activate(x, out, act, width, up, column, up_column, scale, alpha=alpha), out)
        x, column = self.part(inputs[0])
        up, up_column = self.part(inputs[1])
        out = self.new(width)
        return self.add(Activate(x, out, "identity", width, up, column, up_column), out)

    def _made_by(self, ref: Ref) -> Step:
        """The step that made a tensor, before views and casts."""
        rows = self.rows(self.tensor(ref))
        while True:
            step = self.recorder.steps[ref.step]
            if len(step.inputs) != 1:
                return step
            before = self.rows(self.tensor(step.inputs[0]))
            if rows is None or before is None or before.shape != rows.shape or not torch.equal(before, rows):
                return step
            ref = step.inputs[0]

    def _width(self, ref: Ref) -> int:
        rows = self.rows(self.tensor(ref))
        return 0 if rows is None else rows.shape[1]

    def _is_product_of(self, step: Step, inputs: tuple[Ref, ...]) -> bool:
        given = {r: self.unrows(self.sample(self._width(r), i), self.tensor(r)) for i, r in enumerate(inputs)}
        number = next(i for i, s in enumerate(self.recorder.steps) if s is step)
        (out,) = replay(self.recorder, [Ref(number, 0)], given)
        a, b = (self.rows(given[r]) for r in inputs)
        return close(self.rows(out), a * b)

    # ---- sums --------------------------------------------------------------------------------------------------------

    def _combination(self, ref: Ref) -> int | None:
        rows = self.rows(self.tensor(ref))
        if rows is None:
            return None
        terms = self._terms(ref, rows.shape[1])
        if terms is None or terms == [ref]:
            return None
        width = rows.shape[1]
        zero = {r: torch.zeros_like(self.tensor(r)) for r in terms}
        (constant_part,) = replay(self.recorder, [ref], zero)
        if constant_part.abs().max() != 0:
            return None
        products = []
        for r in terms:
            given = dict(zero)
            given[r] = torch.ones_like(self.tensor(r))
            gain = self.rows(replay(self.recorder, [ref], given)[0])
            if not close(gain, gain[:1].expand_as(gain)):
                return None
            number = constant(gain[0])
            channel = None
            if number is None:
                matched = _channel(gain[0], self.vectors(ref, set(terms)))
                if matched is None:
                    return None
                channel, number = matched
            products.append((r, plain(number), channel))
        given = {r: self.unrows(self.sample(width, i), self.tensor(r)) for i, r in enumerate(terms)}
        out = self.rows(replay(self.recorder, [ref], given)[0])
        channels = [1 if c is None else c.get().detach().double().flatten() for *_, c in products]
        total = sum(s * self.rows(given[r]) * c for (r, s, _), c in zip(products, channels, strict=True))
        if not close(out, total):
            return None
        products = [term for term in products if term[1] != 0]
        ops = tuple((self.value(r), s, c) for r, s, c in products)
        if len(ops) == 1 and ops[0][1:] == (1.0, None):
            return ops[0][0]
        while len(ops) > 4:
            first = self.new(width)
            self.add(Combine(first, ops[:4]), first)
            ops = ((first, 1.0, None), *ops[4:])
        value = self.new(width)
        return self.add(Combine(value, ops), value)

    def _terms(self, ref: Ref, width: int) -> list[Ref] | None:
        """The nearest tensors that `ref` is a sum of, going back through steps that are linear."""
        terms, todo = [], [ref]
        seen = {ref}
        while todo:
            here = max(todo)
            todo.remove(here)
            step = self.recorder.steps[here.step]
            if here != ref and here in self.values:
                terms.append(here)
                continue
            if (
                step.module is not None
                or not step.inputs
                or any(self._width(r) != width for r in step.inputs)
                or not self._is_linear(step, here)
                or (here != ref and self._is_norm(step, here))
            ):
                terms.append(here)
                continue
            for r in step.inputs:
                if r not in seen:
                    seen.add(r)
                    todo.append(r)
        return terms if len(terms) <= 12 else None

    def _is_norm(self, step: Step, here: Ref) -> bool:
        """Whether a term is the last step of a norm, whose weight is no channel of a sum."""
        if len(step.inputs) != 1:
            return False
        ones = torch.ones_like(self.tensor(step.inputs[0]))
        gain = self.rows(replay(self.recorder, [here], {step.inputs[0]: ones})[0])
        if constant(gain[0]) is not None:
            return False
        norm = self._norm(here)
        if norm is not None:
            self.values[here] = norm
        return norm is not None

    def _is_linear(self, step: Step, out: Ref) -> bool:
        """Whether one step is linear in all that depends on the tokens, together."""
        given = [
            {r: self.unrows(self.sample(self._width(r), 10 * n + i), self.tensor(r)) for i, r in enumerate(step.inputs)}
            for n in range(2)
        ]
        both = {r: given[0][r] + 2 * given[1][r] for r in step.inputs}
        if any(not t.dtype.is_floating_point for t in (self.tensor(r) for r in step.inputs)):
            return False
        x, y, z = (replay(self.recorder, [out], g)[0] for g in (*given, both))
        (zero,) = replay(self.recorder, [out], {r: torch.zeros_like(t) for r, t in given[0].items()})
        return self.rows(z) is not None and zero.abs().max() == 0 and close(x + 2 * y, z)

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def build(self) -> Graph:
        self.needed = needed = self._needed(self.trace.logits)
        self._tokens(needed)
        inside = -1
        for number in sorted({*needed, *self.opaque}):
            step = self.recorder.steps[number]
            if number < inside:
                continue
            if number in self.opaque:
                inside = self.opaque[number].end
                add_call(self, self.opaque[number])
                continue
            if Ref(number, 0) in self.values:
                continue
            if step.module is not None and _layers.is_linear(step.module):
                self._product(number, step.args[0], step.module)
            elif step.name == "scaled_dot_product_attention":
                self._attention(number, *step.args[:3])
            elif step.module is not None:
                add_experts(self, number)
            elif step.name in ("softmax", "_softmax"):
                self._softmax(number)
            elif step.name in _PRODUCTS:
                product = self._stored_product(step)
                if product is not None:
                    self._product(number, *product)
        self.graph.logits = self.value(self.trace.logits)
        check_covered(self)
        self._windows()
        keep_last(self.graph)
        return self.graph

    def _windows(self) -> None:
        """What a window of more tokens than were recorded hides."""
        most = hints(self.trace.model)
        if most <= 1:
            return
        all_windows = far_windows(self.trace.model, self.trace.vocabulary, most + 5, self.trace.own_cache)
        attends = [(i, n) for i, op in enumerate(self.graph.operations) if (n := self._attentions(op))]
        if len(all_windows) != sum(n for _, n in attends):
            raise Refused("(model): its masks far into a text cannot be told apart")
        for i, n in attends:
            op, windows, all_windows = self.graph.operations[i], set(all_windows[:n]), all_windows[n:]
            if len(windows) > 1 or not window_in(op) <= {0, *windows}:
                raise Refused("(model): a layer has two windows")
            self.graph.operations[i] = with_window(op, *windows)

    def _attentions(self, op: object) -> int:
        """How many attentions an operation has."""
        if not isinstance(op, Call):
            return isinstance(op, Attend)
        if not op.cached:
            return 0
        call = next(c for c in self.opaque.values() if c.path == op.path)
        steps = [s for s in self.recorder.steps[call.begin : call.end] if s.depends]
        total = self.trace.past + self.trace.tokens.shape[1]
        return sum(
            s.name == "scaled_dot_product_attention"
            or is_softmax(s.name, [self.tensor(a) if isinstance(a, Ref) else a for a in s.args], total)
            for s in steps
        )

    def _needed(self, ref: Ref) -> set[int]:
        found: set[int] = set()
        todo = [ref]
        while todo:
            here = todo.pop()
            if here.step not in found:
                found.add(here.step)
                todo += self.recorder.steps[here.step].inputs
        return found

    def _tokens(self, needed: set[int]) -> None:
        from ._embedding import embedding_of

        ref, embed = embedding_of(self, needed)
        self.graph.embed = embed
        self.graph.hidden = self.values[ref] = self.new(self._width(ref))

    def _product(self, number: int, source: Ref, module: nn.Module | StoredLinear) -> None:
        x, column = self.part(source)
        width = self._width(Ref(number, 0))
        if not width:
            raise Refused(f"{self.path(source)}: a product has no row for each token")
        out = self.new(width)
        self.values[Ref(number, 0)] = self.add(Product(x, out, module, column), out)

    def _stored_product(self, step: Step) -> tuple[Ref, StoredLinear] | None:
        """(what is multiplied, the layer) of a product with a parameter."""
        args = list(step.args)
        bias = None
        if step.name == "addmm":
            bias, *args = args
        elif step.name == "linear":
            bias = args[2] if len(args) > 2 else step.kwargs.get("bias")
        weight = args[1] if len(args) > 1 else step.kwargs.get("weight")
        if len(step.inputs) != 1 or args[0] != step.inputs[0]:
            return None
        stored = self._parameter(weight)
        if stored is None:
            return None
        tensor = self._value(weight)
        transposed = step.name != "linear"  # (in, out)
        given = stored.get()
        if given.shape == tensor.shape and torch.equal(given, tensor):
            pass
        elif given.T.shape == tensor.shape and torch.equal(given.T, tensor):
            transposed = not transposed
        else:
            return None
        stored_bias = None
        if bias is not None:
            stored_bias = self._parameter(bias)
            if stored_bias is None or not torch.equal(stored_bias.get(), self._value(bias)):
                return None
        return args[0], StoredLinear(stored, stored_bias, transposed)

    def _value(self, leaf: object) -> Tensor:
        return self.tensor(leaf) if isinstance(leaf, Ref) else leaf

    def _parameter(self, leaf: object) -> Stored | None:
        """The parameter that a tensor is a view or a cast of, as far as one can be."""
        while isinstance(leaf, Ref):
            step = self.recorder.steps[leaf.step]
            if step.depends:
                return None
            leaf = next((a for a in step.args if isinstance(a, (Ref, Tensor))), None)
        return self.trace.stored.get(id(leaf)) if isinstance(leaf, Tensor) else None

    # ---- attention ---------------------------------------------------------------------------------------------------

    def _softmax(self, number: int) -> None:
        attend = spelled_out(self, number)
        if attend is not None:
            query, out = attend
            self._attend(query, out)

    def _attention(self, number: int, q: Ref, k: Ref, v: Ref) -> None:
        self._attend(q, Ref(number, 0))

    def _attend(self, q: Ref, out: Ref) -> None:
        if out in self.values:
            return
        where = self.path(out)
        update = self._update_before(out, q)
        layer = update.layer
        keys, values = Ref(update.step, 0), Ref(update.step, 1)
        k, v = self.recorder.steps[update.step].args
        try:
            attend = attention_between(self, q, keys, values, out)
            q_heads = heads_between(self, q)
        except Refused as refused:
            raise Refused(str(refused), refused.step or out.step) from refused
        fresh = layer not in self.appended
        k_heads = heads_between(self, k, plain=True) if fresh else None
        v_heads = heads_between(self, v, plain=True) if fresh else None
        if fresh:
            self.appended[layer] = k
            if v_heads.angles is not None:
                raise Refused(f"{where}: its values are rotated", out.step)
            if k_heads.angles is not None and q_heads.angles is not None and k_heads.angles != q_heads.angles:
                raise Refused(f"{where}: queries and keys are rotated in two ways", out.step)
            if (k_heads.angles is None) != (q_heads.angles is None):
                raise Refused(f"{where}: only queries or only keys are rotated", out.step)
        value = self.new(attend.heads * attend.d)
        of_keys = (k_heads.of, v_heads.of, k_heads.norm) if fresh else (None, None, None)
        rotation = q_heads.angles or (None, 0, False)
        self.add(Heads(q_heads.of, *of_keys[:2], value, layer, q_heads.norm, of_keys[2], *rotation), value)
        result = self.new(attend.heads * attend.dv)
        self.values[out] = self.add(
            Attend(
                value,
                result,
                layer,
                attend.heads,
                attend.groups,
                attend.d,
                attend.dv,
                attend.scale * q_heads.scale,
                attend.window,
                attend.softcap,
                attend.sinks,
                attend.alibi,
            ),
            result,
        )

    def _update_before(self, out: Ref, q: Ref):
        """The call of the cache that an attention's keys come from."""
        seen, todo = set(), [out]
        steps = {u.step: u for u in self.trace.updates}
        found = {}
        while todo:
            here = todo.pop()
            if here in seen or here == q:
                continue
            seen.add(here)
            if here.step in steps:
                found[here.step] = steps[here.step]
                continue
            if here in self.values:
                continue
            todo += self.recorder.steps[here.step].inputs
        if len(found) != 1:
            raise Refused(f"{self.path(out)}: attention does not read the cache in one place", out.step)
        return next(iter(found.values()))


def _channel(gain: Tensor, vectors: list[Stored]) -> tuple[Stored, float] | None:
    for vector in vectors:
        values = vector.get().detach().double().flatten()
        if values.shape != gain.shape:
            continue
        ratio = ((gain * values).sum() / values.square().sum()).item()
        if ratio and close(ratio * values, gain):
            return vector, ratio
    return None
