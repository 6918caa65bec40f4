"""Log probabilities of given tokens, and the entropy of the distribution, without logits of all tokens."""

# mypy: ignore-errors

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._deprecated import renamed_arguments
from .._torch_private import disable_dynamo
from ._chunks import Call, Objective, Tokens, per_token
from ._heads import as_reference, check_head, check_positive, check_target, logits_of, targets_inside
from .arguments import autocast_dtype

if TYPE_CHECKING:
    from ..quantization import QuantizedWeight

_OP = "functional.linear_logprobs"
# What is known of a token's distribution without a gradient, and its dtype where that is not the logits'.
REPORTS = {"log_sum_sq_probs": None, "mean_logits": None, "is_top1": torch.bool}


@renamed_arguments("bigkernels.functional.linear_logprobs", entropy="return_entropy")
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    reports: Sequence[str] = (),
) -> Tensor | tuple[Tensor, ...]:
    """``log_softmax(z)[target]`` of each token, and the entropy of ``softmax(z)``, with the logits::

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature

    (without `softcap`, ``logit_scale * (hidden @ weight.T + bias) / temperature``). Logits exist for some tokens at a
    time, in float32 as they were added up: `linear_cross_entropy` has the same numbers, and ratios of policies are
    exact. Backward computes them again. Gradients reach `hidden`, `weight` and `bias` through both results, and those
    of the weight and bias are added up in float32.

    Args:
        hidden: (..., H), floating, any strides. Inside autocast it is cast; the weight is read as it is.
        weight: (V, H), of the dtype of `hidden`, or a `QuantizedWeight`, which gets no gradient.
        target: (...), int64 or int32, in [0, V) or equal to `ignore_index`.
        bias: (V,), of the dtype of `hidden`, or None.
        ignore_index: tokens with this target give 0, and no gradient.
        temperature: positive; divides the logits, after `softcap`.
        logit_scale: multiplies the logits, before `softcap`.
        softcap: positive; bounds the logits (Gemma 2, https://arxiv.org/abs/2408.00118). None leaves them.
        return_entropy: whether to return the entropy too, in nats.
        reports: more to return, without gradients, of "log_sum_sq_probs" (``log(sum(softmax(z)^2))``, as WPO's weights
            need it), "mean_logits" (the mean of z) and "is_top1" (whether the target is the first of the largest
            logits, whose mean is the accuracy of tokens).

    Returns:
        (...) log probabilities in float32 (float64 for float64), or a tuple of them, the entropy where it is asked for,
        and the reports in the order of their names; all are 0 or False for ignored tokens.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or option values do not fit, there is no such report, or, on CPU, a target is
            outside the vocabulary.

    Example::

        logprobs = linear_logprobs(hidden, head.weight, tokens, temperature=0.7)          # (B, S)
        with torch.no_grad():
            before = linear_logprobs(old_hidden, old_head.weight, tokens, temperature=0.7)
        loss = bigkernels.losses.grpo_loss(logprobs, before, advantages, mask).loss
    """
    lowered = autocast_dtype(hidden.device) if isinstance(hidden, Tensor) else None
    check_head(_OP, hidden, weight, bias, lowered)
    check_target(_OP, target, hidden)
    check_positive(_OP, temperature=temperature, softcap=softcap)
    if not math.isfinite(logit_scale):
        raise ValueError(f"bigkernels.{_OP}: logit_scale is {logit_scale}, expected a finite number")
    unknown = [name for name in reports if name not in REPORTS]
    if unknown or isinstance(reports, str):
        raise ValueError(f"bigkernels.{_OP}: reports are {reports!r}, expected a tuple of {', '.join(REPORTS)}")
    if lowered is not None:
        hidden = hidden.to(lowered)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    options = {"scale": float(logit_scale), "softcap": softcap, "temperature": float(temperature)}
    run = _reference if as_reference(rows, weight, bias) else _run
    results = run(rows, weight, bias, targets, ignore_index, return_entropy, tuple(reports), options)
    results = [r.view(target.shape) for r in results]
    return tuple(results) if len(results) > 1 else results[0]


@disable_dynamo
def _run(hidden, weight, bias, target, ignore_index, entropy, reports, options):
    target, kept = _split(target, ignore_index, weight.shape[0])

    def reference(hidden, weight, bias):
        return _whole(hidden, weight, bias, target, kept, entropy, (), options)

    quantized, weight = (None, weight) if isinstance(weight, Tensor) else (weight, None)
    call = Call(LogProbs(target, entropy, reports), kept, quantized, reference=reference, **options)
    return finished(per_token(hidden, weight, bias, call), reports, kept)


def _reference(hidden, weight, bias, target, ignore_index, entropy, reports, options):
    return _whole(hidden, weight, bias, *_split(target, ignore_index, weight.shape[0]), entropy, reports, options)


def _split(target, ignore_index, vocabulary):
    """(a class a token, whether it counts)"""
    targets_inside(_OP, target, vocabulary, ignore_index)
    kept = target != ignore_index
    return torch.where(kept, target, 0).long(), kept


def _whole(hidden, weight, bias, target, kept, entropy, reports, options):
    z = logits_of(hidden, weight, bias, **options)
    log_p = z.log_softmax(-1)
    results = [log_p.gather(1, target[:, None])[:, 0]]
    if entropy:
        results.append(-(log_p.exp() * log_p).sum(-1))
    results = [torch.where(kept, r, 0.0) for r in results]
    return results + finished([report(name, z.detach(), target) for name in reports], reports, kept)


def report(name: str, z: Tensor, target: Tensor) -> Tensor:
    """One of `REPORTS` (n,) of logits (n, V), in their dtype."""
    if name == "is_top1":
        return (z.argmax(-1) == target).to(z.dtype)
    if name == "mean_logits":
        return z.mean(-1)
    return torch.logsumexp(2 * z, -1) - 2 * torch.logsumexp(z, -1)


def finished(found: Sequence[Tensor], reports: Sequence[str], kept: Tensor | None) -> list[Tensor]:
    """Outputs and then reports, where these have their dtypes and are 0 for tokens that do not count."""
    first = len(found) - len(reports)
    results = list(found[:first])
    for name, t in zip(reports, found[first:], strict=True):
        t = t if kept is None else torch.where(kept, t, 0)
        results.append(t.to(REPORTS[name] or t.dtype))
    return results


class LogProbs(Objective):
    """With s = z - max(z), e = exp(s), S = sum(e): log p = s - log S. Nothing is lost where logits are large."""

    def __init__(self, target: Tensor, entropy: bool = False, reports: Sequence[str] = ()):
        self.target = target
        self.entropy = entropy
        self.outputs = 1 + entropy
        self.named, self.reports = reports, len(reports)
        self.tensors = (target,)

    def values(self, z: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
        reports = tuple(report(name, z, self.target[tokens]) for name in self.named)
        target = self.target[tokens, None]
        most = z.amax(-1, keepdim=True)
        s = z - most
        s_target = s.gather(1, target)
        if self.entropy:
            # A class of probability zero adds nothing, and not 0 * inf.
            s.clamp_min_(torch.finfo(s.dtype).min / 4)
        e = s.exp() if self.entropy else s.exp_()
        e_target = e.gather(1, target)
        others = e.scatter_(1, target, 0).sum(-1, keepdim=True)
        total = others + e_target
        # Near 1, p has no digits left for what it lacks; the others have.
        certain = e_target > others
        ratio = others / torch.where(certain, e_target, 1)
        results = [torch.where(certain, -torch.log1p(ratio), s_target - total.log())]
        if self.entropy:
            mean = torch.linalg.vecdot(e, s).unsqueeze(-1) + torch.special.xlogy(e_target, e_target)
            results.append(total.log() - mean / total)
        return *(v.squeeze(-1) for v in (*results, most, total)), *reports

    def gradient(self, z, tokens, values, grads):
        target = self.target[tokens, None]
        values = [v.unsqueeze(-1) for v in values]
        of_log_p, of_entropy = [*(g if g is None else g.to(z.dtype).unsqueeze(-1) for g in grads), None][:2]
        log_p, most, total = values[0], *values[self.outputs : self.outputs + 2]
        if of_log_p is None:
            of_log_p = torch.zeros_like(log_p)
        of_target = -of_log_p * torch.expm1(log_p)
        s = z.sub_(most)
        if of_entropy is None:
            dz = s.exp_().mul_(-of_log_p / total)
        else:
            s.clamp_min_(torch.finfo(s.dtype).min / 4)
            e = s.exp()
            shift = values[1] - total.log()  # entropy + log p is s + shift
            of_target -= of_entropy * log_p.exp() * (log_p + values[1])
            dz = s.add_(shift).mul_(of_entropy).add_(of_log_p).mul_(e).mul_(-1 / total)
        return dz.scatter_(1, target, of_target)
