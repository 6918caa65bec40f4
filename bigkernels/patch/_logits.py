"""Logits of a training step, which are computed when somebody reads them, and the loss that does not."""

# mypy: ignore-errors

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from .._torch_private import FakeTensor
from ..ops.arguments import autocast_dtype
from ._lazy import Kind, Lazy, Values
from ._metrics import LossMetrics
from ._places import is_freed

_aten = torch.ops.aten
_ROWS_STAY = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten._reshape_alias.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.clone.default,
    _aten._to_copy.default,
)


@dataclass(frozen=True)
class Note:
    """What a forward made of its head's product z: ``scale * z``, or ``cap * tanh(scale * z)``, with rows as they come.

    `replay(hidden, weight, bias)` does it again, step by step. Tensors are without history, so that logits that are
    kept detached keep no graph; `origin` has it.
    """

    hidden: Tensor
    weight: Any
    bias: Tensor | None
    replay: Callable[[Tensor, Any, Tensor | None], Tensor]
    sources: tuple[tuple[Tensor, int], ...]
    sample: Tensor | None
    origin: tuple[Tensor | None, ...] | None
    scale: float = 1.0
    cap: float | None = None
    watcher: LossMetrics | None = None

    def then(self, step: Callable[[Tensor], Tensor], **changes: Any) -> Note:
        replay = self.replay
        return replace(self, replay=lambda *head: step(replay(*head)), **changes)

    def compute(self) -> Tensor:
        """The logits, of the weights that the forward had.

        Raises:
            RuntimeError: they have changed since, so that these logits are lost.
        """
        if is_freed(self.weight):
            raise RuntimeError(
                "bigkernels.patch: a model in training does not compute its logits, and the weight of its head is "
                "spread over the ranks again: read `logits` before `backward`, keep the weight by "
                "fully_shard(model, reshard_after_forward=False), or patch(model, loss=False)"
            )
        if any(t._version != version for t, version in self.sources) or not self._same_sample():
            raise RuntimeError(
                "bigkernels.patch: a model in training does not compute its logits, and now its head"
                " has other weights: read `logits` before they change, or "
                "patch(model, loss=False)"
            )
        return self.replay(self.hidden, self.weight, self.bias)

    def _same_sample(self) -> bool:
        return self.sample is None or torch.equal(self.sample, _sample(self.weight))

    def cross_entropy(self, hidden, weight, bias, target, class_weight, options, report: bool = False) -> Tensor:
        """With `report`, the watcher is told of it."""
        report = report and self.watcher is not None
        scale = self.scale if self.cap is None else self.scale * self.cap
        output = functional.linear_cross_entropy(
            hidden,
            weight,
            target.view(hidden.shape[:-1]),
            bias,
            class_weight=class_weight,
            softcap=self.cap,
            logit_scale=scale,
            return_z_loss=report,
            return_token_accuracy=report,
            **options,
        )
        if not report:
            return output
        if options.get("reduction", "mean") != "none":
            kept = target != options.get("ignore_index", -100)
            self.watcher.add(output, kept, options.get("reduction", "mean") == "mean")
        return output.loss


def _sample(weight: Any) -> Tensor | None:
    """Some elements: optimizers outside of torch may write to a weight behind its version counter."""
    if not isinstance(weight, Tensor) or isinstance(weight, FakeTensor):
        return None
    rows, columns = (max(1, n // 32) for n in weight.shape)
    return weight.detach()[::rows, ::columns].clone()


class Logits(Lazy):
    """``head(hidden)``, and what a forward made of it, computed when it is first read.

    Factors, divisors and a tanh, which is what models have between their head and their loss, and casts are noted; a
    cross entropy of the result then needs no logits. To autograd this is a function of the hidden states and the head's
    parameters, and the loss is a function of this: what is done with logits and their gradients has its effect.
    """

    note: Note | None = None

    @classmethod
    def of(
        cls, head: Callable, hidden: Tensor, weight: Any, bias: Tensor | None, watcher: LossMetrics | None = None
    ) -> Logits:
        lowered, kind = autocast_dtype(hidden.device), hidden.device.type
        known = torch.amp.is_autocast_available(kind)

        def product(hidden, weight, bias):
            cast = torch.autocast(kind, lowered, lowered is not None) if known else nullcontext()
            with cast:
                return F.linear(hidden, weight, bias) if isinstance(weight, Tensor) else head(hidden)

        parts = [weight] if isinstance(weight, Tensor) else list(weight.tensors.values())
        sources = tuple((t, t._version) for t in (hidden, *parts, bias) if t is not None)
        sources = tuple((t.detach(), version) for t, version in sources)  # which share the counter
        trained = weight if isinstance(weight, Tensor) else None
        note = Note(
            hidden.detach(),
            _plain(weight),
            _plain(bias),
            product,
            sources,
            _sample(weight),
            (hidden, trained, bias),
            watcher=watcher,
        )
        return _Head.apply(cls, note, lowered or hidden.dtype, hidden, trained, bias)

    @classmethod
    def _noted(cls, note: Note, kind: Kind) -> Logits:
        logits = cls(Values(replace(note, origin=None).compute), kind)
        logits.note = note
        return logits

    def _derived(self, function, step, values, kind, path):
        note = self.note
        if note is None or not _keeps_rows(function, self, kind):
            return super()._derived(function, step, values, kind, path)
        logits = type(self)(values, kind, path)
        logits.note = note.then(step, origin=None if function is _aten.detach.default else note.origin)
        return logits

    @property
    def untouched(self) -> Note | None:
        """What a loss may be computed from without these logits; None once they are there."""
        return self.note if self.made is None else None

    def cross_entropy(self, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
        """As `bigkernels.functional.cross_entropy` of rows of these logits, in float32."""
        watcher = self.note.watcher
        if watcher is not None and watcher.coefficient:
            options["z_loss"] = watcher.coefficient
        return _Loss.apply(self, target, weight, options)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        if self.made is not None:
            return repr(self.tensor())
        return f"Logits({tuple(self.shape)}, {self.dtype}, not computed)"

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        step = _STEPS.get(function)
        if step is not None and not kwargs:
            values = step(*args)
            if values is not None:
                return values
        return super().__torch_function__(function, types, args, kwargs)


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _keeps_rows(function: Any, before: Tensor, after: Kind) -> bool:
    """Whether a result has the same rows in the same order; views here are of contiguous tensors."""
    if function not in _ROWS_STAY or len(after.shape) < 2 or after.shape[-1] != before.shape[-1]:
        return False
    return before.is_contiguous()


# ---- what is noted --------------------------------------------------------------------------------------------------


def _scaled(z: Any, factor: Any, divide: bool = False) -> Logits | None:
    if not isinstance(z, Logits):
        z, factor = factor, z
    note = z.untouched if isinstance(z, Logits) else None
    if note is None or type(factor) not in (int, float) or not math.isfinite(factor) or (divide and not factor):
        return None
    times = 1 / factor if divide else factor
    if note.cap is None:
        changes = {"scale": note.scale / factor if divide else note.scale * factor}
    elif times > 0:
        changes = {"cap": note.cap / factor if divide else note.cap * factor}
    else:
        return None
    return _Step.apply(z, (lambda x: x / factor) if divide else (lambda x: x * factor), changes)


def _divided(z: Any, divisor: Any) -> Logits | None:
    return _scaled(z, divisor, divide=True) if isinstance(z, Logits) else None


def _tanh(z: Any) -> Logits | None:
    note = z.untouched if isinstance(z, Logits) else None
    return None if note is None or note.cap is not None else _Step.apply(z, torch.tanh, {"cap": 1.0})


_STEPS = {
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, torch.multiply), _scaled),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide), _divided),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
}


# ---- gradients ------------------------------------------------------------------------------------------------------


class Gradient(Lazy):
    """Of logits by their loss. It holds what becomes of it, `parts`: the gradients of the head's input and parameters.

    Its own elements are computed if somebody reads them, a hook for example. `more` is the gradient by other uses of
    the logits.
    """

    parts: tuple[Tensor | None, ...] | None = None
    more: Tensor | None = None

    @classmethod
    def of(cls, parts: tuple, more: Tensor | None, compute: Callable[[], Tensor], kind: Kind) -> Gradient:
        gradient = cls(Values(compute), kind)
        gradient.parts, gradient.more = parts, more
        return gradient

    def _derived(self, function, step, values, kind, path):
        if function is _aten.clone.default or not _keeps_rows(function, self, kind):
            return super()._derived(function, step, values, kind, path)
        gradient = type(self)(values, kind, path)
        gradient.parts = self.parts
        gradient.more = None if self.more is None else self.more.reshape(kind.shape).to(kind.dtype)
        return gradient

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is _aten.add.Tensor and not kwargs:
            mine, other = args if isinstance(args[0], Gradient) else args[::-1]
            alike = type(other) is Tensor and other.shape == mine.shape and other.dtype == mine.dtype
            if alike and mine.holds:
                more = other if mine.more is None else mine.more + other
                return cls.of(mine.parts, more, lambda: mine.values.fresh() + other, Kind.of(mine))
        return super().__torch_dispatch__(function, types, args, kwargs)

    @property
    def holds(self) -> bool:
        """Whether `parts` are still those of the elements."""
        return self.parts is not None and not self.values.lent


def _split(grad: Tensor) -> tuple[tuple | None, Tensor | None]:
    """(parts, the rest of a gradient of logits)."""
    if isinstance(grad, Gradient) and grad.holds:
        return grad.parts, grad.more
    return None, grad.tensor() if isinstance(grad, Lazy) else grad


class _Head(torch.autograd.Function):
    """Logits of hidden states, weight and bias."""

    @staticmethod
    def forward(ctx, cls, note, dtype, hidden, weight, bias):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.replay, ctx.quantized = note.replay, _quantized(note.weight)
        shape = (*hidden.shape[:-1], note.weight.shape[0])
        return cls._noted(note, Kind(shape, None, None, dtype, hidden.device))

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias = ctx.saved_tensors
        parts, rest = _split(grad)
        grads = list(parts or (None, None, None))
        if rest is not None:
            for i, more in enumerate(_of_product(ctx, rest, hidden, weight, bias)):
                grads[i] = more if grads[i] is None else grads[i] if more is None else grads[i] + more
        return None, None, None, *grads


def _of_product(ctx, grad, hidden, weight, bias):
    """The gradients of a head's input, weight and bias, by operators that can be differentiated."""
    wanted = ctx.needs_input_grad[3:]
    rows, wide = grad.reshape(-1, grad.shape[-1]), grad.dtype
    of_hidden = of_weight = of_bias = None
    if wanted[0] and weight is None:
        of_hidden = _of_quantized(ctx, grad, hidden)
    elif wanted[0]:
        of_hidden = (rows @ weight.to(wide)).view(hidden.shape).to(hidden.dtype)
    if wanted[1]:
        of_weight = (rows.mT @ hidden.reshape(-1, hidden.shape[-1]).to(wide)).to(weight.dtype)
    if wanted[2]:
        of_bias = rows.sum(0).to(bias.dtype)
    return of_hidden, of_weight, of_bias


def _of_quantized(ctx, grad, hidden):
    again = torch.is_grad_enabled()
    x = hidden if again else hidden.detach().requires_grad_()
    with torch.enable_grad():
        z = ctx.replay(x, ctx.quantized, None)
    return torch.autograd.grad(z, x, grad, create_graph=again)[0]


class _Step(torch.autograd.Function):
    """A factor, a divisor or a tanh."""

    @staticmethod
    def forward(ctx, z, step, changes):
        ctx.step = step
        if step is torch.tanh:
            ctx.save_for_backward(z)
        return type(z)._noted(z.note.then(step, **changes), Kind.of(z))

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors

        def back(g):
            return g * (1 - torch.tanh(saved[0]).square()) if saved else ctx.step(g)

        parts, rest = _split(grad)
        rest = None if rest is None else back(rest)
        if parts is None:
            return rest, None, None
        return Gradient.of(parts, rest, lambda: back(grad.dense()), Kind.of(grad)), None, None


class _Loss(torch.autograd.Function):
    """The cross entropy of logits that are not computed."""

    @staticmethod
    def forward(ctx, z, target, class_weight, options):
        note, ctx.options, ctx.like = z.note, options, Kind.of(z)
        target = target.clone()  # loaders fill theirs again
        origin = note.origin or (None, None, None)
        ctx.wanted = [t is not None and t.requires_grad for t in origin]
        # Tensors are saved as such, for their versions and to be freed with the graph.
        ctx.note = replace(note, hidden=None, weight=_quantized(note.weight), bias=None, sources=(), origin=None)
        ctx.save_for_backward(target, class_weight, z if note.origin is None else None, *origin)
        if not ctx.needs_input_grad[0] or not any(ctx.wanted):
            ctx.made = None
            return note.cross_entropy(note.hidden, note.weight, note.bias, target, class_weight, options, True)
        ctx.made = _fused(ctx, origin, target, class_weight, True)
        return ctx.made[0].detach()

    @staticmethod
    def backward(ctx, grad):
        target, class_weight, z, *origin = ctx.saved_tensors

        def elements():
            replayed = ctx.note.replay(origin[0], _or(ctx.note.weight, origin[1]), origin[2]) if z is None else z
            return _of_logits(replayed, target, class_weight, grad, **ctx.options)

        # Where it will be differentiated again, of the logits themselves, as of detached ones.
        if torch.is_grad_enabled() or z is not None:
            return elements(), None, None, None
        (made, leaves), ctx.made = ctx.made or _fused(ctx, origin, target, class_weight), None
        asked = [t for t, w in zip(leaves, ctx.wanted, strict=True) if w]
        found = iter(torch.autograd.grad(made, asked, grad))
        parts = tuple(next(found) if w else None for w in ctx.wanted)
        return Gradient.of(parts, None, elements, ctx.like), None, None, None


def _of_logits(z, target, class_weight, grad, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0):
    """The gradient of the cross entropy of logits z (..., V), by operators that can be differentiated."""
    rows, target = z.reshape(-1, z.shape[-1]).float(), target.reshape(-1, 1).long()
    kept = target != ignore_index
    target = torch.where(kept, target, 0)
    p = torch.softmax(rows, -1)
    weight = rows.new_ones(rows.shape[1]) if class_weight is None else class_weight.float()
    of_target = torch.where(kept, weight[target], 0)
    if reduction == "mean":
        grad = grad / of_target.sum()
    grad = torch.where(kept, grad.reshape(-1, 1), 0)
    hot = torch.zeros_like(rows).scatter_(1, target, 1.0)
    grad_rows = (1 - label_smoothing) * of_target * (p - hot)
    if label_smoothing:
        grad_rows = grad_rows + label_smoothing / len(weight) * (weight.sum() * p - weight)
    if z_loss:
        grad_rows = grad_rows + 2 * z_loss * torch.logsumexp(rows, -1, keepdim=True) * p
    return (grad * grad_rows).reshape(z.shape).to(z.dtype)


def _quantized(weight: Any) -> Any:
    return None if isinstance(weight, Tensor) else weight


def _or(value: Any, other: Any) -> Any:
    return other if value is None else value


def _fused(ctx, origin, target, class_weight, report=False):
    """The loss and what it is differentiated by. A graph of its own: its gradients are those of the logits' inputs."""
    leaves = [t if t is None else t.detach().requires_grad_(w) for t, w in zip(origin, ctx.wanted, strict=True)]
    hidden, weight, bias = leaves
    with torch.enable_grad():
        weight = _or(ctx.note.weight, weight)
        return ctx.note.cross_entropy(hidden, weight, bias, target, class_weight, ctx.options, report), leaves


def materialized(logits: Any) -> Any:
    """An ordinary tensor of logits that have been computed, or that nothing is known of; what is given elsewhere."""
    if isinstance(logits, Lazy) and (not isinstance(logits, Logits) or logits.untouched is None):
        return logits.tensor()
    return logits
