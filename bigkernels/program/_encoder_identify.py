"""From a recorded call of an encoder's layer to operations: products and what lies between them as in `_identify.py`,
attention by its weights.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import itertools
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import _layers
from ._attention import _scales
from ._covered import check_covered
from ._encoder_call import HIDDEN_BELOW, Form, Given, drawn
from ._encoder_ir import GivenAngles, LayerGraph, Mix, Turn
from ._encoder_reference import attention
from ._encoder_shaken import original, shaken
from ._forms import close, plain_within, random
from ._heads import Found, Rotations, heads_between
from ._identify import Builder
from ._ir import HeadsOf
from ._layers import products
from ._products import Drawn
from ._record import Trace, _wrap, stored_of
from ._replay import replay
from ._rows import as_heads, from_heads
from ._trace import Recorder, Ref, Refused, _same, leaves
from .suspend import disturbance, suspended, wrapped

BATCH = 2


def record_layer(layer: nn.Module, given: Given, seeming: torch.dtype) -> tuple[Trace, object]:
    """The layer's own code on hidden states in float64; and what it returned."""
    recorder = Recorder()
    recorder.give(given.hidden, seeming)
    for value in given.others.values():
        for t in value if isinstance(value, tuple) else ():
            recorder._note(_same, (), {}, (t,), False, ())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(suspended(layer))
        stack.enter_context(wrapped(layer, functools.partial(_wrap, recorder)))
        stack.enter_context(recorder)
        try:
            out = layer(**given.everything)
        except Refused:
            raise
        except Exception as error:
            message = (str(error).splitlines() or [""])[0][:120]
            where = recorder.path or "(layer)"
            raise Refused(f"{where}: does not run in float64: {type(error).__name__}: {message}") from error
    if recorder.reads is not None:
        raise Refused(f"{recorder.reads or '(layer)'}: its code looks at numbers that it computed")
    first = out[0] if isinstance(out, (tuple, list)) and out else out
    ref = recorder.where.get(id(first))
    if not isinstance(first, Tensor) or ref is None or not recorder.steps[ref.step].depends:
        raise Refused("(layer): gives no hidden states that PyTorch functions made")
    batch, length = given.hidden.shape[:2]
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=given.hidden.device)
    paths = {module: path for path, module in layer.named_modules()}
    trace = Trace(layer, recorder, tokens, tokens, ref, [], stored_of(layer), seeming, 0, paths=paths)
    return trace, out


def returns_of(out: object, given: Given) -> tuple[str | None, ...] | None:
    """As `LayerGraph.returns` says it."""
    if isinstance(out, Tensor):
        return None
    names = {id(t): name for name, t in given.others.items() if isinstance(t, Tensor)}
    if type(out) is not tuple or any(x is not None and id(x) not in names for x in out[1:]):
        raise Refused("(layer): gives more than hidden states")
    return tuple(names.get(id(x)) for x in out[1:])


def find_layer(layer: nn.Module, form: Form, seen: Given) -> LayerGraph | str:
    """What a layer computes of a call of this form; or why it has no program.

    Args:
        seen: a call's own arguments.
    """
    # Here and not at the top: the check runs the layer by `record_layer`.
    from ._encoder_check import check_layer

    try:
        reason = disturbance(layer)
        if reason is not None:
            raise Refused(reason)
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        given = drawn(form, seen, BATCH, _length(layer, form), 3, device)
        copied, modules = shaken(layer)
        with products(Drawn()):
            trace, out = record_layer(copied, given, form.dtype)
            graph = LayerBuilder(trace, form, given).build()
        graph.operations = original(graph.operations, modules)
        graph.returns = returns_of(out, given)
        check_layer(layer, graph, form, seen)
        return graph
    except Refused as refused:
        return str(refused)
    except Exception as error:  # noqa: BLE001  whatever a layer does, it is left to its modules
        message = (str(error).splitlines() or [""])[0][:120]
        return f"(layer): the search failed: {type(error).__name__}: {message}"


def _length(layer: nn.Module, form: Form) -> int:
    """A number of tokens that is no number of heads or the like."""
    numbers = {v for m in layer.modules() for v in vars(m).values() if type(v) is int}
    numbers |= {n for p in layer.parameters() for n in p.shape}
    numbers |= {v for _, _, what in form.parts for v in leaves(what) if type(v) is int}
    return next(n for n in (7, 11, 13, 5, 17, 19, 23, 29, 31, 37, 41) if n not in numbers)


class _Angles(Rotations):
    """Angles are what the layer is given."""

    def index(self, roots: tuple[Ref, ...], layout: str, sign: int, rotary: int, interleaved: bool) -> int:
        key = (roots, layout, sign, rotary, interleaved)
        if key not in self.known:
            b = self.builder
            for name, _ in ((n, k) for n, k, _ in b.form.parts if k == "angles"):
                refs = [b.recorder.where.get(id(t)) for t in b.given.others[name]]
                if all(root in refs for root in roots) and len(roots) == 2:
                    order = tuple(refs.index(root) for root in roots)
                    b.graph.angles.append(GivenAngles(name, order, layout, sign, rotary, interleaved))
                    self.known[key] = len(b.graph.angles) - 1
                    break
            else:
                raise Refused(f"{b.path(roots[0])}: its angles are nothing that it is given")
        return self.known[key]


class LayerBuilder(Builder):
    """Makes a graph of a recorded layer."""

    def __init__(self, trace: Trace, form: Form, given: Given):
        super().__init__(trace)
        self.graph = LayerGraph()
        self.rotations = _Angles(self)
        self.form, self.given = form, given

    def build(self) -> LayerGraph:
        self.needed = self._needed(self.trace.logits)
        first = self.recorder.where[id(self.given.hidden)]
        self.graph.hidden = self.values[first] = self.new(self.form.width)
        for number in sorted(self.needed):
            step = self.recorder.steps[number]
            if Ref(number, 0) in self.values:
                continue
            if step.module is not None and _layers.is_linear(step.module):
                self._product(number, step.args[0], step.module)
            elif step.name == "scaled_dot_product_attention":
                q, k, v = (
                    step.args[i] if len(step.args) > i else step.kwargs.get(name)
                    for i, name in enumerate(("query", "key", "value"))
                )
                self._mix(q, k, v, Ref(number, 0))
            elif step.module is not None:
                raise Refused(f"{step.path}: its experts are not looked at", number)
            elif step.name in ("softmax", "_softmax"):
                found = self._spelled_out(number)
                if found is not None:
                    self._mix(*found)
            elif step.name in ("linear", "matmul", "__matmul__", "mm", "addmm"):
                found = self._stored_product(step)
                if found is not None:
                    self._product(number, *found)
        self.graph.logits = self.value(self.trace.logits)
        if self.graph.widths[self.graph.logits] != self.form.width:
            raise Refused("(layer): its hidden states come out in another width")
        check_covered(self)
        return self.graph

    # ---- attention

    def _spelled_out(self, number: int) -> tuple[Ref, Ref, Ref, Ref] | None:
        """(q, k, v, out) of a softmax over products of two tensors."""
        steps = self.recorder.steps
        here = Ref(number, 0)
        for source in self._sources(here):
            step = steps[source.step]
            if step.name in ("matmul", "__matmul__", "bmm", "baddbmm", "einsum") and len(step.inputs) == 2:
                break
        else:
            return None
        if step.name not in ("matmul", "__matmul__", "bmm"):
            return None
        q, transposed = step.args[:2]
        before = steps[transposed.step]
        if before.name not in ("transpose", "permute", "swapaxes") or len(before.inputs) != 1:
            return None
        weights = {here}
        for later in range(number + 1, len(steps)):
            step = steps[later]
            if not any(r in weights for r in step.inputs):
                continue
            if step.name in ("matmul", "__matmul__", "bmm") and len(step.inputs) == 2:
                return q, before.inputs[0], step.args[1], Ref(later, 0)
            weights |= {Ref(later, i) for i in range(len(step.outs))}
        return None

    def _mix(self, q: Ref, k: Ref, v: Ref, out: Ref) -> None:
        if out in self.values:
            return
        spec = self._attention_between(q, k, v, out)
        found = [heads_between(self, q), heads_between(self, k, plain=True), heads_between(self, v, plain=True)]
        if found[2].angles is not None or found[2].norm is not None:
            raise Refused(f"{self.path(out)}: its values are rotated or normed", out.step)
        keys, values = (_grouped(f.of, spec.heads) for f in found[1:])
        if len(keys.columns) != len(values.columns):
            raise Refused(f"{self.path(out)}: keys and values have other heads", out.step)
        made = self.new(spec.heads * spec.dv)
        of_q, of_k = self._turned(found[0], found[0].of), self._turned(found[1], keys)
        for of in (of_q, of_k, values):
            steps = {b - a for a, b in itertools.pairwise(of.columns)}
            if len(steps) > 1:
                raise Refused(f"{self.path(out)}: heads at other distances", out.step)
        spec = replace(
            spec, q=of_q, k=of_k, v=values, out=made, groups=len(keys.columns), scale=spec.scale * found[0].scale
        )
        self.values[out] = self.add(spec, made)

    def _turned(self, found: Found, of: HeadsOf) -> HeadsOf:
        if found.angles is None and found.norm is None:
            return of
        out = self.new(len(of.columns) * of.d)
        self.add(Turn(of, out, found.norm, *(found.angles or (None, 0, False))), out)
        return HeadsOf(out, tuple(range(0, len(of.columns) * of.d, of.d)), of.d)

    def _attention_between(self, q: Ref, k: Ref, v: Ref, out: Ref) -> Mix:
        where = self.path(out)
        batch, length = self.trace.tokens.shape
        likes = [self.tensor(r) for r in (q, k, v)]
        shaped = [as_heads(t, batch, length) for t in (*likes, self.tensor(out))]
        if any(t is None for t in shaped):
            raise Refused(f"{where}: its heads have no known layout", out.step)
        heads, d, dv = shaped[0].shape[1], shaped[0].shape[3], shaped[2].shape[3]
        groups = shaped[1].shape[1]
        if shaped[2].shape[1] != groups or heads % groups or shaped[3].shape[1] != heads or shaped[1].shape[3] != d:
            raise Refused(f"{where}: its heads do not fit each other", out.step)

        def compute(*numbers: Tensor) -> Tensor:
            given = {
                r: from_heads(n, like, batch, length) for r, n, like in zip((q, k, v), numbers, likes, strict=True)
            }
            return as_heads(replay(self.recorder, [out], given)[0], batch, length)

        def weights(q_: Tensor, k_: Tensor) -> Tensor:
            parts = []
            for begin in range(0, length, dv):
                v_ = torch.zeros_like(shaped[2], dtype=torch.float64)
                for i in range(min(dv, length - begin)):
                    v_[:, :, begin + i, i] = 1
                parts.append(compute(q_, k_, v_)[..., : min(dv, length - begin)])
            return torch.cat(parts, -1)

        none = weights(*(torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in shaped[:2]))
        names, causal, added = self._scores(none, where, out.step)
        self.graph.scores = tuple(dict.fromkeys((*self.graph.scores, *names)))
        if self.graph.scores != names:
            raise Refused(f"{where}: attention twice, with other scores", out.step)
        spec = Mix(None, None, None, -1, heads, groups, d, dv, 1.0, 0.0, causal, 0 if names else None)
        q_, k_, v_ = (random(*t.shape, seed=i, device=t.device) for i, t in enumerate(shaped[:3]))
        q_ = q_ * (3 / d) ** 0.5
        raw = q_ @ k_.repeat_interleave(heads // groups, 1).transpose(2, 3)
        seen = (added > HIDDEN_BELOW).expand_as(raw)
        if not bool((seen.sum(-1) > 1).any()):
            raise Refused(f"{where}: each token sees itself alone", out.step)

        def centred(scores: Tensor) -> Tensor:
            mean = scores.masked_fill(~seen, 0).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
            return (scores - mean)[seen]

        def scores(factor: float) -> Tensor:
            return centred(weights(factor * q_, k_).clamp_min(1e-300).log() - added.masked_fill(~seen, 0))

        small = 1e-2 / raw.abs().max().item()
        want = centred(small * raw)
        scale = (scores(small) * want).sum().item() / want.square().sum().item()
        if not scale or scale != scale:
            raise Refused(f"{where}: its scores do not depend on queries and keys", out.step)
        softcap = 0.0
        factor = 20.0 / (abs(scale) * raw.abs().max().item())
        if not close(scores(factor), centred(scale * factor * raw), 1e-6):
            one = factor * scale * raw
            softcap = self._cap(one, weights(factor * q_, k_), added, seen)
            if softcap is None:
                raise Refused(f"{where}: its scores are no scaled products", out.step)
        for candidate in _scales(plain_within(scale, 1e-9), d):
            found = replace(spec, scale=candidate, softcap=softcap)
            if close(compute(q_, k_, v_), attention(q_, k_, v_, added, found), 1e-7):
                return found
        raise Refused(f"{where}: computes another attention", out.step)

    def _cap(self, raw: Tensor, weights: Tensor, added: Tensor, seen: Tensor) -> float | None:
        """c of scores c tanh(raw / c): by the difference of two keys of a query."""
        for c in (*(float(n) for n in range(5, 101, 5)), 15.0, 25.0):
            scores = (c * torch.tanh(raw / c) + added).masked_fill(~seen, float("-inf"))
            if close(weights.nan_to_num(0.0), scores.softmax(-1).nan_to_num(0.0), 1e-7):
                return c
        return None

    def _scores(self, none: Tensor, where: str, step: int) -> tuple[tuple[str, ...], bool, Tensor]:
        """Which arguments say what is seen, whether only earlier tokens are, and what is added to scores."""
        batch, length = self.trace.tokens.shape
        names = [name for name, kind, _ in self.form.parts if kind in ("mask", "bias")]
        zero = torch.zeros(batch, 1, length, length, dtype=torch.float64, device=none.device)
        earlier = torch.ones(length, length, dtype=torch.bool, device=none.device).tril()
        for count in range(len(names), -1, -1):
            for some in itertools.combinations(names, count):
                added = sum((_number(self.given.others[name]) for name in some), zero)
                for causal in (False, True):
                    total = added.masked_fill(~earlier, float("-inf")) if causal else added
                    total = total.masked_fill(total <= HIDDEN_BELOW, float("-inf"))
                    expected = total.softmax(-1).nan_to_num(0.0).expand_as(none)
                    if close(none, expected, 1e-7):
                        return some, causal, total
        raise Refused(f"{where}: which keys it sees is not known", step)


def _number(t: Tensor) -> Tensor:
    """What a mask or a bias adds to scores."""
    if t.dtype != torch.bool:
        return t.double()
    return torch.zeros(t.shape, dtype=torch.float64, device=t.device).masked_fill(~t, float("-inf"))


def _grouped(of: HeadsOf, heads: int) -> HeadsOf:
    """Heads that are the same for several queries once."""
    once = tuple(dict.fromkeys(of.columns))
    if len(of.columns) == heads and heads % len(once) == 0:
        each = heads // len(once)
        if tuple(c for c in once for _ in range(each)) == of.columns:
            return replace(of, columns=once)
    return of
