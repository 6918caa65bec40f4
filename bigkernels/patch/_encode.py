"""The step program of encoders: which layers get one, and how a model's own loop over them comes to be one call of it.

Each layer but the last gives a tensor that has no memory yet. The last one, which is given such a tensor of the layer
before it, runs all of them. Whoever reads one of these tensors before, has the layers so far computed by their modules.
"""

# mypy: ignore-errors

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.quantized import Quantized
from ..program import _layers
from ..program._encoder_call import Given, collects, form_of, resolve_arguments, same_others
from ..program._encoder_masks import Scores
from ..program._encoder_stack import KEY, Stack, unsupported
from ..program._forward import _check_surroundings
from ..program._padding import Refusal
from ._bound import Bound, Stepping
from ._lazy import Kind, Lazy, Values
from ._rule import Write
from .rules.attention_mask import StructuredMask

_CHANGED = (
    "bigkernels.patch: hidden states between the layers of an encoder are read after its layers or their input have "
    "changed; read them before, or patch(model, encode=False)"
)
_SAME = {torch.float32: 1e-2}  # of hidden states, computed in two ways
_LEAST = 3  # linear layers of an encoder's


class Place:
    """Where a layer is in its stack."""

    def __init__(self, stack: Stack, at: int) -> None:
        self.stack, self.at = stack, at


class _Call:
    """One pass through the layers, as far as it has come."""

    def __init__(self, stack: Stack, hidden: Tensor) -> None:
        self.stack, self.hidden, self.version = stack, hidden, _version(hidden)
        self.sample = _sample(hidden)
        self.given: list[Given] = []
        self.below: list[Callable | None] = []
        self.between: list[weakref.ref[_Between]] = []
        self.written: list[tuple[Tensor, int]] = []  # what else layers are given, and how often it had been written to
        self.done, self.state = False, None
        self.out: Tensor | None = None
        self.out_version = 0
        self._said: dict[int, Scores | None] = {}

    def add(self, given: Given) -> None:
        """What the next layer is given."""
        before = self.given[-1] if self.given else None
        if before is not None and same_others(given, before):
            given.others, given.said, given.form, given.like = before.others, before.said, before.form, before.like
        else:
            given.said, given.like = self.said(given.others), len(self.given)
            given.form = form_of(given)
            self.written += [(t, _version(t)) for t in _tensors(given.others)]
        self.given.append(given)

    def said(self, others: dict[str, Any]) -> dict[str, Scores]:
        """What the masks among arguments say that nobody has built yet."""
        found = {}
        for name, value in others.items():
            if type(value) is StructuredMask:
                if id(value) not in self._said:
                    self._said[id(value)] = _scores(value, self.hidden.shape[1])
                if self._said[id(value)] is not None:
                    found[name] = self._said[id(value)]
                else:
                    others[name] = value.dense
        return found

    def finish(self) -> Tensor:
        """What the last layer gives."""
        if not self._fresh():
            raise RuntimeError(_CHANGED)
        if any(values() is not None for values in self.between[:-1]):
            self._read_all()
            raise Refusal("hidden states between the layers are kept")
        out = self.stack.run(self.given)
        self.done, self.state, self.out = True, self._state(), out
        self.out_version = _version(out)
        return out

    def _fresh(self) -> bool:
        """Whether what went in is what it was."""
        if _version(self.hidden) != self.version or any(_version(t) != version for t, version in self.written):
            return False
        return self.sample is None or torch.equal(self.sample, _bytes(self.hidden))

    def _read_all(self) -> None:
        """What somebody keeps, by the modules, before anything can change that it comes from."""
        x = self.hidden
        for count, reference in enumerate(self.between, 1):
            x = self._layer(count - 1, x)
            values = reference()
            if values is not None and values.compute is not None:
                values.made, values.compute = x.contiguous(), None

    def _layer(self, at: int, x: Tensor) -> Tensor:
        given = self.given[at]
        with torch.no_grad():
            layer = self.stack.layers[at]
            out = _own(layer, self.below[at])(layer, **Given(given.first, x, given.others).everything)
        return out if isinstance(out, Tensor) else out[0]

    def _state(self) -> list[int] | None:
        return self.stack.versions() if self.stack.same() else None

    def by_modules(self, count: int) -> Tensor:
        """The hidden states after `count` layers.

        Raises:
            RuntimeError: they can no longer be computed: layers or what went in have changed since.
        """
        changed = self.done and self.state != self._state()
        if changed or not self._fresh() or any(layer.training for layer in self.stack.layers[:count]):
            raise RuntimeError(_CHANGED)
        x = self.hidden
        for at in range(count):
            x = self._layer(at, x)
        if self.done and not self._leads_to_out(count, x):
            raise RuntimeError(_CHANGED)
        return x

    def _leads_to_out(self, count: int, x: Tensor) -> bool:
        """Whether the other layers make of `x` what the call gave: writes through `.data` count nowhere."""
        if _version(self.out) != self.out_version:
            return False
        for at in range(count, len(self.stack.layers)):
            x = self._layer(at, x)
        seen = self.out.ne(0).any(-1)  # of padding it has zeros
        error, scale = (self.out - x)[seen].abs().max(), x[seen].abs().max()
        return bool(error <= _SAME.get(x.dtype, 0.1) * scale)


class _Between(Values):
    """The hidden states after some layers of a call."""

    def __init__(self, call: _Call, count: int) -> None:
        super().__init__(lambda: call.by_modules(count))
        self.call, self.count = call, count


def _scores(mask: StructuredMask, length: int) -> Scores | None:
    s = mask.structure
    if s is None or s.sequences is not None or not s.queries == s.keys == s.used == length:
        return None
    return Scores(s.padding, s.left, s.right)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _sample(t: Tensor) -> Tensor | None:
    """A copy of a tensor that counts no writes: small beside what a layer makes."""
    return _bytes(t).clone() if t.is_inference() else None


def _bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.uint8)  # of which NaN is the same as itself


def _tensors(others: dict[str, Any]) -> Iterator[Tensor]:
    """Those among arguments, alone and in pairs."""
    for value in others.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, Tensor):
                yield part


def _own(layer: nn.Module, below: Callable | None) -> Callable:
    return type(layer).forward if below is None else below


def forward(layer: nn.Module, below: Callable | None, *args: Any, **kwargs: Any) -> Any:
    """`below` is the function that would be called without it, None for the class's own."""
    if not torch.compiler.is_compiling():
        place = layer.__dict__.get(KEY)
        if place is not None:
            out = _by_program(layer, below, place, args, kwargs)
            if out is not None:
                return out
        args = tuple(x.dense() if type(x) is Lazy and isinstance(x.values, _Between) else x for x in args)
        kwargs = {k: x.dense() if type(x) is Lazy and isinstance(x.values, _Between) else x for k, x in kwargs.items()}
    return _own(layer, below)(layer, *args, **kwargs)


def _by_program(layer: nn.Module, below: Callable | None, place: Place, args: tuple, kwargs: dict) -> Any:
    stack, at = place.stack, place.at
    if layer.training or (at >= len(stack.layers) or stack.layers[at] is not layer):
        return None
    try:
        given = resolve_arguments(layer, stack.names[at], args, kwargs)
        call = _call_of(layer, place, given)
        if call is None:
            return None
        with stack.lock:
            if at == 0:
                stack.ready()
            given.hidden = call.hidden
            if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(given.others)):
                raise Refusal("gradients are recorded")
            call.add(given)
            graph = stack.graph(at, given)
            call.below.append(below)
            if at + 1 < len(stack.layers):
                values = _Between(call, at + 1)
                call.between.append(weakref.ref(values))
                made: Any = Lazy(values, Kind.of(call.hidden))
            else:
                made = call.finish()
            if graph.returns is None:
                return made
            return made, *(None if name is None else given.others[name] for name in graph.returns)
    except Refusal as refusal:
        stack.refused(refusal)
        return None


def _call_of(layer: nn.Module, place: Place, given: Given) -> _Call | None:
    """The call that a layer goes on with, or begins; None: the modules'.

    Raises:
        Refusal: the first layer is called in a way that no program stands for.
    """
    x = given.hidden
    if place.at:
        values = x.values if type(x) is Lazy and not x.path else None
        if not isinstance(values, _Between) or values.made is not None or values.count != place.at:
            return None
        call = values.call
        return call if call.stack is place.stack and len(call.given) == place.at and not call.done else None
    if type(x) not in (Tensor, nn.Parameter) or x.is_nested or x.layout is not torch.strided:
        raise Refusal("hidden states are no plain tensor")
    if x.dim() != 3 or not x.is_cpu or not x.numel():
        raise Refusal("no hidden states (B, S, width) on this processor")
    if not x.is_floating_point() or x.dtype == torch.float64:
        raise Refusal(f"hidden states are {x.dtype}")
    _check_surroundings()
    if torch.is_grad_enabled():
        trained = (p.requires_grad for each in place.stack.layers for p in each.parameters())
        if x.requires_grad or any(trained):
            raise Refusal("gradients are recorded")
    if collects():
        raise Refusal("outputs of modules are collected")
    return _Call(place.stack, x)


def apply(layer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """In the place of `_apply`, which moves and casts."""
    place = layer.__dict__.get(KEY)
    if place is not None:
        place.stack.release()
    return type(layer)._apply(layer, *args, **kwargs)


# ---- which layers ----------------------------------------------------------------------------------------------------


def candidates(model: nn.Module, decoders: set[nn.Module]) -> Iterator[tuple[str, list[nn.Module]]]:
    """Lists of layers that may be an encoder's, and are in none of `decoders`."""
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or module in decoders or module in inside or not len(module):
            continue
        layers = list(module)
        if inside.isdisjoint(layers) and len(set(layers)) == len(layers) and all(map(_is_layer, layers)):
            inside.update(m for layer in layers for m in layer.modules())
            yield path, layers[1:] if _begins_with_positions(layers) else layers


def _begins_with_positions(layers: list[nn.Module]) -> bool:
    """Whether the first one alone has a table, as in T5: it makes a bias of positions, which the others are given. Its
    own modules run."""
    first, *others = ({type(m) for m in layer.modules()} for layer in layers)
    return bool(others) and nn.Embedding in first and not any(nn.Embedding in kinds for kinds in others)


def _is_layer(module: nn.Module) -> bool:
    linear = sum(_layers.is_linear(m) or isinstance(m, Quantized) for m in module.modules())
    attention = any(isinstance(m, nn.MultiheadAttention) for m in module.modules())
    return type(module).forward is not nn.Module.forward and (linear >= _LEAST or attention)


def stack_of(layers: list[nn.Module]) -> Stack:
    """The one that an earlier patch gave them, or a new one."""
    held = layers[0].__dict__.get(KEY)
    if isinstance(held, Place) and len(held.stack.layers) == len(layers):
        if all(a is b for a, b in zip(held.stack.layers, layers, strict=True)):
            return held.stack
    return Stack(layers)


def release(module: nn.Module) -> None:
    held = module.__dict__.get(KEY)
    if isinstance(held, Place):
        held.stack.release()


def writes_for(stack: Stack, others: list[Write]) -> list[Write]:
    """What to write, among what is written for other reasons: the program goes around the forward that they give."""
    made = []
    for i, layer in enumerate(stack.layers):
        at = next((j for j, w in enumerate(others) if w.module is layer and w.key == "forward"), None)
        below = None if at is None else others[at].value.func
        if at is not None:
            del others[at]
        made += [
            Write(layer, "forward", Stepping(forward, layer, below)),
            Write(layer, "_apply", Bound(apply, layer)),
            Write(layer, KEY, Place(stack, i)),
        ]
    return made


__all__ = ["candidates", "release", "stack_of", "unsupported", "writes_for"]
