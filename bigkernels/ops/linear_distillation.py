"""Distillation of a teacher's distribution over a vocabulary, without logits of all tokens of either model."""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._torch_private import disable_dynamo
from ._chunks import Call, per_token, total
from ._distillation import DIVERGENCES, Distillation, Teacher, count_tokens, reference
from ._heads import as_reference, check_head, check_positive, check_target, targets_inside
from .arguments import autocast_dtype, check_same_device, check_shape, check_tensor, own, type_name
from .registry import is_readable

if TYPE_CHECKING:
    from ..quantization import QuantizedWeight

_OP = "functional.linear_distillation"
_REDUCTIONS = ("mean", "sum", "none")


def linear_distillation(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | QuantizedWeight | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    alpha: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
) -> Tensor:
    """A divergence between a teacher's and a student's distribution of the next token.

    With the logits ``z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`` (without `softcap`,
    ``logit_scale * (hidden @ weight.T + bias)``), those of the teacher likewise, ``Q = softmax(z / temperature)`` and
    ``P = softmax(teacher's z / temperature)``, a token's loss is ``(1 - alpha) * c * D + alpha * CE``, with D::

        forward_kl   KL(P || Q) = sum_v P log(P / Q)          (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)
        reverse_kl   KL(Q || P) = sum_v Q log(Q / P)          (MiniLLM, https://arxiv.org/abs/2306.08543)
        jsd          beta * KL(P || M) + (1 - beta) * KL(Q || M),  M = beta * P + (1 - beta) * Q
                                                              (GKD, https://arxiv.org/abs/2306.13649, equation 1)

    c = 1, or ``temperature^2`` with `temperature_squared`, which keeps the size of the gradients as Hinton et al. do.
    ``CE = -log softmax(z)[target]`` has no temperature.

    The teacher is one of: hidden states and a head; logits; or the k most likely classes of each token. With k of them
    the distributions are of k + 1 classes, the k and all others together: ``P = (p_1, .., p_k, 1 - sum p_i)`` and Q
    likewise, so that no mass is forgotten and every divergence is finite. The mass of the others in P is not taken
    below the spacing of floats at 1, and P is then normalised. With k = V there are no others.

    The teacher is a constant. Logits exist for some tokens at a time. With "mean" and "sum" the gradients are made
    while the logits are there; with "none" backward computes them again.

    Args:
        hidden: (..., H), floating, any strides. Inside autocast it is cast; the weight is read as it is.
        weight: (V, H), of the dtype of `hidden`, or a `QuantizedWeight`, which gets no gradient.
        target: (...), int64 or int32. Needed for `alpha`; where it is `ignore_index` the token does not count.
        bias: (V,), of the dtype of `hidden`, or None.
        teacher_hidden: (..., G): the size may be another than that of the student.
        teacher_weight: (V, G), of the dtype of `teacher_hidden`, or a `QuantizedWeight`.
        teacher_bias: (V,) or None.
        teacher_logits: (..., V), floating, as the teacher returns them: with its scale and softcap, without
            temperature.
        teacher_topk: (log probabilities (..., k), floating; classes (..., k), int64 or int32, distinct in a token). The
            log probabilities are those of P, at this temperature: ``log_softmax(z / temperature).topk(k)``.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: in (0, 1), for "jsd".
        temperature: positive.
        temperature_squared: whether D is multiplied by ``temperature^2``.
        alpha: in [0, 1); the part of the cross entropy with `target`.
        mask: (...), boolean: which tokens count. Both it and `target` can leave a token out.
        ignore_index: see `target`.
        reduction: "mean" over the tokens that count, "sum", or "none": (...), 0 for those that do not.
        logit_scale, softcap: of the student.
        teacher_logit_scale, teacher_softcap: of the teacher given by hidden states.

    Returns:
        The loss in float32 (float64 for float64). The mean of no tokens is NaN, with gradients of zero.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or option values do not fit, there is not one teacher, an option is given that would
            mean nothing, or, on CPU, a target or class is outside the vocabulary, or `teacher_topk` holds no
            probabilities.
    """
    lowered = autocast_dtype(hidden.device) if isinstance(hidden, Tensor) else None
    check_head(_OP, hidden, weight, bias, lowered)
    _check_options(divergence, beta, temperature, alpha, reduction, logit_scale, softcap)
    _check_teacher(
        hidden,
        weight.shape[0],
        lowered,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logits,
        teacher_topk,
        teacher_logit_scale,
        teacher_softcap,
    )
    _check_tokens(hidden, target, mask, alpha)
    if lowered is not None:
        hidden = hidden.to(lowered)
        teacher_hidden = None if teacher_hidden is None else teacher_hidden.to(lowered)
    teacher = Teacher(
        _rows(teacher_hidden),
        teacher_weight,
        teacher_bias,
        {"scale": teacher_logit_scale, "softcap": teacher_softcap},
        _rows(teacher_logits),
        *(map(_rows, teacher_topk) if teacher_topk is not None else (None, None)),
    )
    flat_target = None if target is None else target.reshape(-1)
    kept = None if mask is None else mask.reshape(-1).clone()  # backward reads it, whatever becomes of `mask`
    if target is not None:
        kept = flat_target != ignore_index if kept is None else kept & (flat_target != ignore_index)
        flat_target = torch.where(kept, flat_target, 0).long()
    factor = (1 - alpha) * (temperature**2 if temperature_squared else 1.0)
    options = {"kind": divergence, "beta": beta, "temperature": temperature, "factor": factor, "alpha": alpha}
    head = {"scale": float(logit_scale), "softcap": softcap}
    run = reference if as_reference(hidden, weight, bias) else _run
    loss = run(_rows(hidden), weight, bias, flat_target, kept, teacher, options, head, reduction)
    return loss.view(hidden.shape[:-1]) if reduction == "none" else loss


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(-1, t.shape[-1])


@disable_dynamo
def _run(hidden, weight, bias, target, kept, teacher, options, head, reduction):
    teacher = teacher.detached()
    kept, teacher = own(kept), teacher._replace(log_p=own(teacher.log_p), classes=own(teacher.classes))
    vocabulary = weight.shape[0]
    if target is not None and options["alpha"]:
        targets_inside(_OP, target, vocabulary, -100)
    if teacher.classes is not None and is_readable(teacher.classes):
        _check_classes(teacher, kept, vocabulary)
    elif teacher.classes is not None and kept is not None:
        # Computed in vain, and so have to be classes.
        classes = torch.where(kept[:, None], teacher.classes, 0)
        teacher = teacher._replace(classes=classes, log_p=torch.where(kept[:, None], teacher.log_p, 0))

    def whole(hidden, weight, bias):
        return reference(hidden, weight, bias, target, kept, teacher, options, head, reduction)

    quantized, weight = (None, weight) if isinstance(weight, Tensor) else (weight, None)
    objective = Distillation(teacher, target, vocabulary, **options)
    call = Call(objective, kept, quantized, reference=whole, **head)
    if reduction == "none":
        return per_token(hidden, weight, bias, call)[0]
    return total(hidden, weight, bias, count_tokens(hidden, kept) if reduction == "mean" else None, call)


def _check_options(kind, beta, temperature, alpha, reduction, logit_scale, softcap):
    if kind not in DIVERGENCES:
        raise ValueError(f"bigkernels.{_OP}: divergence is {kind!r}; accepted are {', '.join(DIVERGENCES)}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"bigkernels.{_OP}: reduction is {reduction!r}; accepted are {', '.join(_REDUCTIONS)}")
    if not 0 < beta < 1:
        raise ValueError(
            f"bigkernels.{_OP}: beta is {beta}, expected in (0, 1); the limits are what forward_kl and "
            "reverse_kl are for"
        )
    if kind != "jsd" and beta != 0.5:
        raise ValueError(f"bigkernels.{_OP}: beta is {beta}, and means nothing to {kind}")
    if not 0 <= alpha < 1:
        raise ValueError(f"bigkernels.{_OP}: alpha is {alpha}, expected in [0, 1)")
    check_positive(_OP, temperature=temperature, softcap=softcap)
    if not math.isfinite(logit_scale):
        raise ValueError(f"bigkernels.{_OP}: logit_scale is {logit_scale}, expected a finite number")


def _check_teacher(hidden, vocabulary, lowered, teacher_hidden, weight, bias, logits, topk, scale, softcap):
    given = [
        name
        for name, t in (("teacher_hidden", teacher_hidden), ("teacher_logits", logits), ("teacher_topk", topk))
        if t is not None
    ]
    if len(given) != 1:
        raise ValueError(
            f"bigkernels.{_OP}: {' and '.join(given) or 'no teacher'} given; expected one of "
            "teacher_hidden, teacher_logits and teacher_topk"
        )
    tokens = hidden.shape[:-1]
    if teacher_hidden is not None:
        check_head(_OP, teacher_hidden, weight, bias, lowered, "teacher_")
        check_same_device(_OP, "hidden", hidden, teacher_hidden=teacher_hidden)
        check_shape(_OP, "teacher_hidden", teacher_hidden, (*tokens, weight.shape[1]), "the tokens of hidden")
        if weight.shape[0] != vocabulary:
            raise ValueError(
                f"bigkernels.{_OP}: teacher_weight has shape {tuple(weight.shape)}, expected "
                f"({vocabulary}, G): the vocabulary of weight"
            )
        check_positive(_OP, teacher_softcap=softcap)
        if not math.isfinite(scale):
            raise ValueError(f"bigkernels.{_OP}: teacher_logit_scale is {scale}, expected a finite number")
        return
    for name, value in (
        ("teacher_weight", weight),
        ("teacher_bias", bias),
        ("teacher_softcap", softcap),
        ("teacher_logit_scale", None if scale == 1 else scale),
    ):
        if value is not None:
            raise ValueError(f"bigkernels.{_OP}: {name} is given, and means nothing to {given[0]}")
    if logits is not None:
        check_tensor(_OP, "teacher_logits", logits)
        check_same_device(_OP, "hidden", hidden, teacher_logits=logits)
        check_shape(_OP, "teacher_logits", logits, (*tokens, vocabulary), "one number a token and class")
        return
    if not isinstance(topk, (tuple, list)) or len(topk) != 2:
        raise TypeError(f"bigkernels.{_OP}: teacher_topk must be (log probabilities, classes)")
    log_p, classes = topk
    check_tensor(_OP, "teacher_topk[0]", log_p)
    if not isinstance(classes, Tensor) or classes.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"bigkernels.{_OP}: teacher_topk[1] is {type_name(classes)}; accepted are int64 and int32")
    check_same_device(_OP, "hidden", hidden, **{"teacher_topk[0]": log_p, "teacher_topk[1]": classes})
    check_shape(_OP, "teacher_topk[1]", classes, log_p.shape, "one class a log probability")
    k = log_p.shape[-1] if log_p.dim() else 0
    if log_p.shape[:-1] != tokens or not 0 < k <= vocabulary:
        raise ValueError(
            f"bigkernels.{_OP}: teacher_topk has shape {tuple(log_p.shape)}, expected "
            f"{(*tokens, 'k')}, k in [1, {vocabulary}]"
        )


def _check_tokens(hidden, target, mask, alpha):
    if target is not None:
        check_target(_OP, target, hidden)
    elif alpha:
        raise ValueError(f"bigkernels.{_OP}: alpha is {alpha}, and the cross entropy needs target")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"bigkernels.{_OP}: mask is {type_name(mask)}; accepted is bool")
        check_same_device(_OP, "hidden", hidden, mask=mask)
        check_shape(_OP, "mask", mask, hidden.shape[:-1], "one a token")


def _check_classes(teacher, kept, vocabulary):
    """Data-dependent, so on CPU only."""
    log_p, classes = teacher.log_p, teacher.classes
    if kept is not None:
        log_p, classes = log_p[kept], classes[kept]
    outside = classes[(classes < 0) | (classes >= vocabulary)]
    if outside.numel():
        raise ValueError(
            f"bigkernels.{_OP}: teacher_topk[1] holds {outside[0].item()}, outside the vocabulary [0, {vocabulary})"
        )
    if (classes.sort(-1).values.diff(dim=-1) == 0).any():
        raise ValueError(f"bigkernels.{_OP}: teacher_topk[1] holds a class twice in one token")
    mass = log_p.double().exp().sum(-1)
    wrong = mass[~(mass < 1.05)]  # 16-bit log probabilities may be that far off
    if wrong.numel():
        raise ValueError(
            f"bigkernels.{_OP}: teacher_topk[0] has probabilities that sum to {wrong[0].item():.4g}; "
            "expected log probabilities, which sum to at most 1"
        )
