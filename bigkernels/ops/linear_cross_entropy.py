"""Cross entropy of a linear layer's outputs, which never exist all at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import cross_entropy as _logits
from ._chunks import Call, Objective, Tokens, per_token, total
from ._derivatives import gradients, is_observed, vjp
from ._heads import as_reference, check_head, check_target, logits_of, targets_inside
from .arguments import autocast_dtype, check_shape, check_tensor, own
from .codes import NUMBERS, Operands, kernels_read
from .registry import REFUSED, Implementation, Operator, cpu_kernel, define, needs_grad, triton_kernel

if TYPE_CHECKING:
    from ..quantization import QuantizedWeight

_OP = "functional.linear_cross_entropy"


class CrossEntropyOutput(NamedTuple):
    """A loss and what was asked for beside it. Nothing but the loss has a gradient.

    Attributes:
        loss: as without the others.
        z_loss: the part of the loss that is ``z_loss * logsumexp^2``, reduced as the loss is; None if not asked for.
        token_accuracy: the part of the kept tokens whose largest logit is the target's, in the dtype of the loss; for
            reduction "none" (...), 1 or 0 a token, and 0 for ignored ones. NaN where no token is kept. None if not
            asked for.
        predicted_tokens: (...), int64, the class of the largest logit, the first of equal ones, a NaN counting as
            larger than all, as in `torch.argmax`; -1 for ignored tokens. None if not asked for.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    focal_gamma: float = 0.0,
    token_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`cross_entropy` of ``logit_scale * (hidden @ weight.T + bias)``, without these logits.

    Logits are made and used in blocks; tokens that are ignored cost nothing on CPU. The gradients of the weight and the
    bias are added up in float32 whatever their dtype.

    On CPU the softmax and its product with the weight are one pass over the vocabulary, as in attention (Dao 2022,
    https://arxiv.org/abs/2205.14135), which leaves the gradient of `hidden`; backward is a pass for the weight. Numbers
    it needs again wait in the memory of the weight's gradient, or are computed again where that is too small: three
    matrix products where there are no more tokens than features, up to four elsewhere, and only some megabytes a
    thread beyond the gradients.

    Args:
        hidden: (..., H), floating, any strides. Inside autocast it is cast; the weight is read as it is.
        weight: (V, H), of the dtype of `hidden`, or a `QuantizedWeight`, which gets no gradient.
        target: (...), int64 or int32, in [0, V) or equal to `ignore_index`.
        bias: (V,), of the dtype of `hidden`, or None.
        class_weight: (V,), floating: what `cross_entropy` calls weight. Not differentiable.
        ignore_index: tokens with this target give no loss and no gradient.
        reduction: "none" (...), "sum", or "mean": the sum over the number of tokens kept, or over the sum of their
            class weights where `class_weight` is given. `token_weight` does not enter the divisor.
        label_smoothing, z_loss, softcap, focal_gamma: as in `cross_entropy`.
        token_weight: (...), floating: a weight a token. Not differentiable.
        logit_scale: multiplies the logits, before `softcap` (Cohere, Granite).
        return_z_loss, return_token_accuracy, return_predicted_tokens: what to report beside the loss, found while the
            logits are there.

    Returns:
        The loss in float32 (float64 for float64). Where anything else is asked for a named tuple (loss, z_loss,
        token_accuracy, predicted_tokens), None for what is not: see `CrossEntropyOutput`.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or option values do not fit, or, on CPU, a target is outside the vocabulary.
    """
    lowered = autocast_dtype(hidden.device) if isinstance(hidden, Tensor) else None
    check_head(_OP, hidden, weight, bias, lowered)
    check_target(_OP, target, hidden)
    options = (ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma)
    _check(hidden, weight, class_weight, token_weight, logit_scale, *options)
    if lowered is not None:
        hidden = hidden.to(lowered)
    shape = target.shape
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    token_weight = None if token_weight is None else token_weight.detach().reshape(-1)
    class_weight = None if class_weight is None else class_weight.detach()
    if as_reference(hidden, weight, bias):
        run = _reference
    else:
        run = _kernel if _kernel_serves(hidden, weight, bias, options) else _in_chunks
    report = bool(return_z_loss or return_token_accuracy or return_predicted_tokens)
    results = run(hidden, weight, bias, target, class_weight, token_weight, logit_scale, report, *options)
    if not report:
        return results.view(shape) if reduction == "none" else results
    loss, predicted, lse = results
    kept = target != ignore_index
    of_z = right = None
    if return_z_loss:
        of_z = torch.where(kept, z_loss * lse.detach().square(), 0)
        of_z = of_z if token_weight is None else of_z * token_weight.to(of_z.dtype)
        if reduction != "none":
            of_z = of_z.sum()
        if reduction == "mean":
            of_z = of_z / _divisor(kept, target, class_weight, of_z.dtype)
    if return_token_accuracy:
        right = ((predicted == target) & kept).to(loss.dtype)
        right = right if reduction == "none" else right.sum() / kept.sum()
    if reduction == "none":
        loss, of_z, right = (t if t is None else t.view(shape) for t in (loss, of_z, right))
    predicted = torch.where(kept, predicted, -1).view(shape) if return_predicted_tokens else None
    return CrossEntropyOutput(loss, of_z, right, predicted)


def _divisor(kept, target, class_weight, dtype):
    """Of a mean."""
    if class_weight is None:
        return kept.sum().to(dtype)
    return torch.where(kept, class_weight.to(dtype)[torch.where(kept, target, 0).long()], 0).sum()


def _check(hidden, weight, class_weight, token_weight, logit_scale, ignore_index, reduction, *amounts):
    check_tensor(_OP, "class_weight", class_weight, optional=True)
    check_tensor(_OP, "token_weight", token_weight, optional=True)
    check_shape(_OP, "class_weight", class_weight, weight.shape[:1], "one weight a class")
    check_shape(_OP, "token_weight", token_weight, hidden.shape[:-1], "one weight a token")
    _logits.check_options(_OP, reduction, *amounts)
    if not -math.inf < logit_scale < math.inf:  # isfinite would break a graph
        raise ValueError(f"bigkernels.{_OP}: logit_scale is {logit_scale}, expected a finite number")


def _kernel_serves(hidden, weight, bias, options) -> bool:
    """The CPU kernel takes softcap or label smoothing, smooths over weights that are not quantized, and rounds no token
    to integers.
    """
    _, _, label_smoothing, _, softcap, _ = options
    plain = isinstance(weight, Tensor)
    codes, *_, kind = Operands.plain(weight) if plain else weight.operands()
    return (
        hidden.device.type == "cpu"
        and kernels_read(kind, codes)
        and OPERATOR.uses_kernel(hidden, codes, bias)
        and not (label_smoothing and (softcap or not plain))
        and (plain or not weight.format.dynamic)
        and hidden.shape[1] > 0
    )


def _reference(hidden, weight, bias, target, class_weight, token_weight, logit_scale, report, *options):
    targets_inside(_OP, target, weight.shape[0], options[0])
    z = logits_of(hidden, weight, bias, scale=logit_scale)
    loss = _logits._reference(z, target, class_weight, token_weight, *options)
    return (loss, *_report(z, target, options[0], options[4])) if report else loss


def _report(z, target, ignore_index, softcap):
    """(predicted classes, lse)"""
    z = z.detach()
    predicted = _logits.predictions(z, target, ignore_index, softcap)
    return predicted, torch.logsumexp(z if softcap is None else softcap * torch.tanh(z / softcap), -1)


# ---- in chunks ------------------------------------------------------------------------------------------------------


def _in_chunks(hidden, weight, bias, target, class_weight, token_weight, logit_scale, report, *options):
    ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma = options
    targets_inside(_OP, target, weight.shape[0], ignore_index)
    target, token_weight = own(target), own(token_weight)
    kept = target != ignore_index
    numbers = (ignore_index, label_smoothing, z_loss, softcap, focal_gamma)
    objective = Losses(target, class_weight, token_weight, numbers, report)
    quantized, weight = (None, weight) if isinstance(weight, Tensor) else (weight, None)

    def reference(hidden, weight, bias):
        return _reference(hidden, weight, bias, target, class_weight, token_weight, logit_scale, False, *options)

    call = Call(objective, kept, quantized, reference=reference, scale=float(logit_scale))
    if reduction == "none":
        results = per_token(hidden, weight, bias, call)
        return results if report else results[0]
    divisor = None
    if reduction == "mean":
        divisor = _divisor(kept, target, class_weight, torch.promote_types(hidden.dtype, torch.float32))
    return total(hidden, weight, bias, divisor, call)


class Losses(Objective):
    """The loss of each token, by the kernels of `cross_entropy` where they support its logits."""

    def __init__(self, target, class_weight, token_weight, options, report=False):
        self.reports = 2 if report else 0  # predicted classes and lse
        self.target, self.class_weight, self.token_weight = target, class_weight, token_weight
        self.tensors = (target, class_weight, token_weight)
        self.options = options  # the softcap among them: the head makes logits without it

    def _arguments(self, tokens: Tokens):
        of_token = None if self.token_weight is None else self.token_weight[tokens]
        return self.target[tokens], self.class_weight, of_token

    def _for_kernel(self):
        ignore_index, label_smoothing, z_loss, softcap, focal_gamma = self.options
        return ignore_index, 0, label_smoothing, z_loss, softcap or 0.0, focal_gamma

    def values(self, z: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
        arguments = self._arguments(tokens)
        if not _logits.OPERATOR.uses_kernel(z):
            loss, _, lse = _logits._token_losses(z, *arguments, *self.options)
            if not self.reports:
                return loss, lse
            return loss, lse, _logits.predictions(z, arguments[0], self.options[0], self.options[3]), lse
        if not self.reports:
            return _logits._fwd(z, *arguments, *self._for_kernel())[:2]
        loss, lse, _, predicted = _logits._predict(z, *arguments, *self._for_kernel())
        return loss, lse, predicted, lse

    def gradient(self, z, tokens, values, grads):
        arguments = self._arguments(tokens)
        if _logits.OPERATOR.uses_kernel(z):
            one = values[1].new_ones(())
            given = *arguments, values[1], one, *self._for_kernel()
            if not z.is_cuda:
                return _logits._bwd(grads[0].to(torch.float32), z, *given)
            _logits._bwd_(grads[0].to(torch.float32), z, *given)
            return z

        def loss(z):
            return _logits._token_losses(z, *arguments, *self.options)[0]

        return vjp(loss, (z,), (grads[0],))[0]


# ---- the CPU kernel -------------------------------------------------------------------------------------------------


def _kernel(hidden, weight, bias, target, class_weight, token_weight, logit_scale, report, *options):
    ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma = options
    numbers = (
        ignore_index,
        _logits._REDUCTIONS[reduction],
        label_smoothing,
        z_loss,
        softcap or 0.0,
        focal_gamma,
        float(logit_scale),
    )
    if isinstance(weight, Tensor):
        if weight.dtype not in (hidden.dtype, torch.float32):
            weight = weight.to(hidden.dtype)
        head = Operands.plain(weight)
    else:
        hidden = weight.entering(hidden)
        head = weight.operands()
    grad = needs_grad(hidden, head[0], bias)
    if grad:
        target, token_weight = own(target), own(token_weight)
    arguments = (bias, target, class_weight, token_weight)
    try:
        if grad:
            return _LinearCrossEntropy.apply(hidden, *head, *arguments, numbers, report)
        loss, _, _, _, _, *reports = _fwd(hidden, *head, *arguments, *numbers, False, False, False, report)
        return (loss, *reports) if report else loss
    except REFUSED:
        targets_inside(_OP, target, head[0].shape[0], ignore_index)
        raise


def _dense(operands, k, dtype):
    return operands.codes if operands.kind == NUMBERS else operands.decoded(k, torch.float32).to(dtype)


def _loss(hidden, weight, bias, target, class_weight, token_weight, ignore_index, reduction, *numbers, report=False):
    label_smoothing, z_loss, softcap, focal_gamma, logit_scale = numbers
    name = {v: k for k, v in _logits._REDUCTIONS.items()}[reduction]
    return _reference(
        hidden,
        weight,
        bias,
        target,
        class_weight,
        token_weight,
        logit_scale,
        report,
        ignore_index,
        name,
        label_smoothing,
        z_loss,
        softcap or None,
        focal_gamma,
    )


def _fwd_fallback(
    hidden, weight, scale, zero, row_scale, book, group, kind, bias, target, class_weight, token_weight, *rest
):
    *numbers, backward, of_hidden, of_weight, report = rest
    dense = _dense(Operands(weight, scale, zero, row_scale, book, group, kind), hidden.shape[1], hidden.dtype)
    loss, predicted, lse = _loss(hidden, dense, bias, target, class_weight, token_weight, *numbers, report=True)
    kept = target != numbers[0]
    divisor = kept if class_weight is None else torch.where(kept, class_weight[torch.where(kept, target, 0).long()], 0)
    _, _, dx, dw, state, *reports = _fwd_fake(
        hidden, weight, scale, zero, row_scale, book, group, kind, bias, target, class_weight, token_weight, *rest
    )
    if report:
        reports = predicted, torch.where(kept, lse.float(), 0)
    return loss.float(), divisor.sum().float(), dx, dw, state, *reports


def _fwd_fake(
    hidden, weight, scale, zero, row_scale, book, group, kind, bias, target, class_weight, token_weight, *rest
):
    *numbers, backward, of_hidden, of_weight, report = rest
    loss = hidden.new_empty(hidden.shape[:1] if numbers[1] == 0 else (), dtype=torch.float32)
    # Two numbers, five a token, and what is noted of pieces of tokens.
    state = hidden.new_empty(6 * hidden.shape[0] + 2, dtype=torch.float32) if backward else hidden.new_empty(0)
    reports = (loss.new_empty(hidden.shape[0] if report else 0, dtype=t) for t in (torch.int64, torch.float32))
    return (
        loss,
        loss.new_empty(()),
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        state,
        *reports,
    )


def _bwd_fallback(
    grad,
    hidden,
    weight,
    scale,
    zero,
    row_scale,
    book,
    group,
    kind,
    bias,
    target,
    class_weight,
    token_weight,
    divisor,
    state,
    dx,
    dw,
    *rest,
):
    *numbers, of_hidden, of_weight, of_bias = rest
    dense = _dense(Operands(weight, scale, zero, row_scale, book, group, kind), hidden.shape[1], hidden.dtype)

    def run(hidden, dense, bias):
        return _loss(hidden, dense, bias, target, class_weight, token_weight, *numbers)

    grads = vjp(run, (hidden, dense, bias), (grad,))
    if of_hidden:
        dx.copy_(grads[0])
    if of_weight:
        dw.copy_(grads[1])
    return grads[2].float() if of_bias else state.new_empty(0)


def _bwd_fake(grad, hidden, weight, *rest):
    return grad.new_empty(weight.shape[:1] if rest[-1] else 0)


def _bwd_flops(grad, hidden, weight, *rest):
    of_hidden, of_weight, _ = rest[-3:]
    return 2 * hidden.numel() * weight.shape[0] * (bool(of_hidden) + bool(of_weight))


OPERATOR = Operator(
    "linear_cross_entropy",
    implementations=(cpu_kernel(), Implementation("triton", "cuda", unavailable=triton_kernel().unavailable)),
    in_graphs=True,
)
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? scale, Tensor? zero, Tensor? row_scale, Tensor? book, int group, int kind"
)
_TOKENS = "Tensor? bias, Tensor target, Tensor? class_weight, Tensor? token_weight"
_OPTIONS = (
    "int ignore_index, int reduction, float label_smoothing, float z_loss, float softcap, float focal_gamma,"
    " float logit_scale"
)
# loss, divisor, dx, dw, state, predicted classes, lse. dx holds the gradient of each token's own loss; dw is memory for
# backward. The last two are empty without `report`.
_fwd = define(
    f"linear_cross_entropy_fwd({_HEAD}, {_TOKENS}, {_OPTIONS}, bool backward, bool of_hidden, bool of_weight,"
    " bool report) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_fallback,
    lambda hidden, weight, *_: 2 * hidden.numel() * weight.shape[0],
)
# Makes the gradients of what forward left in dx and dw; returns that of the bias, in float32.
_bwd = define(
    f"linear_cross_entropy_bwd(Tensor grad, {_HEAD}, {_TOKENS}, Tensor divisor, Tensor state, Tensor(a!) dx,"
    f" Tensor(b!) dw, {_OPTIONS}, bool of_hidden, bool of_weight, bool of_bias) -> Tensor",
    _bwd_fake,
    _bwd_fallback,
    _bwd_flops,
)


class _LinearCrossEntropy(torch.autograd.Function):
    """dx, dw and state are no saved tensors: backward turns them into the gradients themselves. A second backward
    finds none, and runs forward again.
    """

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        scale,
        zero,
        row_scale,
        book,
        group,
        kind,
        bias,
        target,
        class_weight,
        token_weight,
        numbers,
        report,
    ):
        ctx.save_for_backward(hidden, weight, scale, zero, row_scale, book, bias, target, class_weight, token_weight)
        ctx.layout, ctx.numbers = (group, kind), numbers
        loss, *ctx.made, predicted, lse = _fwd(
            hidden,
            weight,
            scale,
            zero,
            row_scale,
            book,
            group,
            kind,
            bias,
            target,
            class_weight,
            token_weight,
            *numbers,
            True,
            *ctx.needs_input_grad[:2],
            report,
        )
        if not report:
            return loss
        ctx.mark_non_differentiable(predicted, lse)
        return loss, predicted, lse

    @staticmethod
    def backward(ctx, grad, *_):
        *head, bias, target, class_weight, token_weight = ctx.saved_tensors
        arguments = (*head, *ctx.layout, bias, target, class_weight, token_weight)
        if is_observed(grad):
            hidden, *codes = head
            dense = _dense(Operands(*codes, *ctx.layout), hidden.shape[1], hidden.dtype)

            def loss(hidden, weight, bias):
                return _loss(hidden, weight, bias, target, class_weight, token_weight, *ctx.numbers)

            dx, dw, dbias = gradients(loss, (hidden, dense, bias), (grad,))
            return dx, dw, *[None] * 6, dbias, *[None] * 5
        of_hidden, of_weight, of_bias = (ctx.needs_input_grad[i] for i in (0, 1, 8))
        grads, ctx.made = ctx.made, None
        if grads is None:
            _, *grads, _, _ = _fwd(*arguments, *ctx.numbers, True, of_hidden, of_weight, False)
        divisor, dx, dw, state = grads
        dbias = _bwd(grad, *arguments, divisor, state, dx, dw, *ctx.numbers, of_hidden, of_weight, of_bias)
        return (
            dx if of_hidden else None,
            dw if of_weight else None,
            *[None] * 6,
            dbias.to(bias.dtype) if of_bias else None,
            *[None] * 5,
        )
