"""What distillation computes of logits: divergences, the teacher's classes, and the objective of a chunk of tokens.

P are the teacher's probabilities, Q = softmax(u) the student's. Both are kept as logarithms (n, C), C being the classes
of a vocabulary, or a few of them and the others as one.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._chunks import Head, Objective, Tokens
from ._heads import logits_of
from .linear_logprobs import LogProbs
from .registry import compute_dtype

if TYPE_CHECKING:
    from ..quantization import QuantizedWeight

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def finite(log_p: Tensor) -> Tensor:
    """In place: a class of probability zero then adds 0 to a sum, and not 0 * inf."""
    return log_p.clamp_min_(torch.finfo(log_p.dtype).min / 4)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Of rows, without their product in memory: (n, 1)."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def divergence(kind: str, beta: float, log_p: Tensor, log_q: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """(value (n, 1), its gradient by u (n, C) if wanted). Both tensors may be written over."""
    if kind == "forward_kl":
        p = log_p.exp()
        value = dot(p, log_p.sub_(log_q))
        return value, log_q.exp_().sub_(p) if wanted else None
    if kind == "reverse_kl":
        q = log_q.exp()
        ratio = log_q.sub_(log_p)
        value = dot(q, ratio)
        return value, ratio.sub_(value).mul_(q) if wanted else None
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    of_p = dot(log_p.exp(), log_p.sub_(log_m))
    q = log_q.exp()
    ratio = log_q.sub_(log_m)
    of_q = dot(q, ratio)
    value = beta * of_p + (1 - beta) * of_q
    return value, ratio.sub_(of_q).mul_(q).mul_(1 - beta) if wanted else None


class Teacher(NamedTuple):
    """Flattened to rows: hidden states and a head, or logits, or the most likely classes."""

    hidden: Tensor | None
    weight: Tensor | QuantizedWeight | None
    bias: Tensor | None
    options: dict
    logits: Tensor | None
    log_p: Tensor | None
    classes: Tensor | None

    def detached(self) -> Teacher:
        return Teacher(*(t.detach() if isinstance(t, Tensor) else t for t in self))


class Distillation(Objective):
    def __init__(self, teacher, target, vocabulary, *, kind, beta, temperature, factor, alpha):
        self.teacher = teacher
        self.head = None
        if teacher.hidden is not None:
            self.head = Head(teacher.hidden, teacher.weight, teacher.bias, **teacher.options)
        self.kind, self.beta, self.temperature, self.factor, self.alpha = kind, beta, temperature, factor, alpha
        self.hard = LogProbs(target) if alpha else None
        self.others = teacher.classes is not None and teacher.classes.shape[1] < vocabulary
        self.tensors = tuple(t for t in (*teacher, target) if isinstance(t, Tensor))

    def values(self, z, tokens):
        return self._compute(z, tokens, None)[0]

    def gradient(self, z, tokens, values, grads):
        return self._compute(z, tokens, grads[0])[1]

    def both(self, z, tokens, grads):
        return self._compute(z, tokens, grads[0])

    def _compute(self, z: Tensor, tokens: Tokens, grad: Tensor | None) -> tuple[tuple[Tensor], Tensor | None]:
        of_loss = None if grad is None else grad.to(z.dtype).unsqueeze(-1) * (self.factor / self.temperature)
        few = self.teacher.classes is not None
        value, dz = (self._of_few if few else self._of_all)(z, tokens, of_loss)
        value = self.factor * value.squeeze(-1)
        if self.hard is not None:
            hard = self.hard.values(z, tokens)
            value = value - self.alpha * hard[0]
            if grad is not None:
                dz += self.hard.gradient(z, tokens, hard, (-self.alpha * grad,))
        return (value,), dz

    def _of_all(self, z, tokens, of_loss):
        logits = self.teacher.logits[tokens].to(z.dtype) if self.head is None else self.head.logits(tokens).to(z.dtype)
        log_p = finite(torch.log_softmax(logits / self.temperature if self.temperature != 1 else logits, -1))
        del logits
        log_q = finite(torch.log_softmax(z / self.temperature if self.temperature != 1 else z, -1))
        value, dz = divergence(self.kind, self.beta, log_p, log_q, of_loss is not None)
        return value, None if dz is None else dz.mul_(of_loss)

    def _of_few(self, z, tokens, of_loss):
        classes = self.teacher.classes[tokens].long()
        log_p = finite(with_others(self.teacher.log_p[tokens].to(z.dtype), z.shape[1]))
        u = z / self.temperature
        few = u.gather(1, classes)
        if not self.others:
            value, gradient = divergence(self.kind, self.beta, log_p, finite(few.log_softmax(-1)), of_loss is not None)
            return value, None if gradient is None else u.scatter_(1, classes, gradient.mul_(of_loss))
        # The logit of the others together; their shares of its gradient are their shares of its mass.
        lse = finite(u.scatter_(1, classes, -torch.inf).logsumexp(-1, keepdim=True))
        log_q = finite(torch.cat((few, lse), 1).log_softmax(-1))
        value, gradient = divergence(self.kind, self.beta, log_p, log_q, of_loss is not None)
        if gradient is None:
            return value, None
        gradient.mul_(of_loss)
        return value, u.sub_(lse).exp_().mul_(gradient[:, -1:]).scatter_(1, classes, gradient[:, :-1])


def count_tokens(hidden, kept):
    """How many count; a number from the host would have to be waited for."""
    wide = compute_dtype(hidden.dtype)
    return hidden.new_full((), hidden.shape[0], dtype=wide) if kept is None else kept.sum(dtype=wide)


def reference(hidden, weight, bias, target, kept, teacher, options, head, reduction):
    kind, beta, temperature, factor, alpha = options.values()
    z = logits_of(hidden, weight, bias, **head)
    log_q = (z / temperature).log_softmax(-1)
    teacher = teacher.detached()
    if teacher.classes is not None:
        classes = teacher.classes.long()
        log_p, log_q = with_others(teacher.log_p.to(z.dtype), z.shape[1]), log_q.gather(1, classes)
        if classes.shape[1] < z.shape[1]:
            others = (z / temperature).scatter(1, classes, -torch.inf).logsumexp(-1, keepdim=True)
            log_q = torch.cat((log_q, others - (z / temperature).logsumexp(-1, keepdim=True)), 1)
    else:
        logits = teacher.logits
        if logits is None:
            logits = logits_of(teacher.hidden, teacher.weight, teacher.bias, **teacher.options)
        log_p = (logits.to(z.dtype) / temperature).log_softmax(-1)
    if kind == "jsd":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        loss = beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)
    else:
        first, second = (log_p, log_q) if kind == "forward_kl" else (log_q, log_p)
        loss = (first.exp() * (first - second)).sum(-1)
    loss = factor * loss
    if alpha:
        loss = loss - alpha * z.log_softmax(-1).gather(1, target[:, None])[:, 0]
    if kept is not None:
        loss = torch.where(kept, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / count_tokens(hidden, kept) if reduction == "mean" else loss.sum()


def with_others(log_p: Tensor, vocabulary: int) -> Tensor:
    """Log probabilities of k classes and of all others together, normalised."""
    if log_p.shape[1] < vocabulary:
        others = 1 - log_p.exp().sum(-1, keepdim=True)
        log_p = torch.cat((log_p, others.clamp_min(torch.finfo(log_p.dtype).eps).log()), 1)
    return log_p.log_softmax(-1)
