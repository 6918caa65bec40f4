"""Cross entropy over a large vocabulary without a float32 copy of the logits."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from .._deprecated import renamed_arguments
from ._derivatives import gradients, is_observed, vjp
from .arguments import check_same_device, check_shape, check_tensor, own, type_name
from .registry import REFUSED, Operator, compute_dtype, define, is_readable, needs_grad

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DEFAULTS = (-100, "mean", 0.0, 0.0, None, 0.0)


@renamed_arguments("bigkernels.functional.cross_entropy", weight="class_weight")
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    focal_gamma: float = 0.0,
    token_weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy between logits and target classes, as `torch.nn.functional.cross_entropy` and with more options.

    With ``z = softcap * tanh(logits / softcap)`` (or the logits), ``lse = logsumexp(z)``, ``p = exp(z[target] - lse)``
    and e the label smoothing, a token's loss is::

        ce   = (1 - e) * class_weight[target] * (lse - z[target]) + e / V * sum_c class_weight[c] * (lse - z[c])
        loss = token_weight * ((1 - p)^focal_gamma * ce + z_loss * lse^2)

    Args:
        logits: (T, V), floating; rows may be strided.
        target: (T,), int64 or int32, in [0, V) or equal to `ignore_index`.
        class_weight: (V,), floating: a weight a class. Not differentiable.
        ignore_index: tokens with this target give no loss and no gradient.
        reduction: "none" (T,), "sum", or "mean": the sum over the number of tokens kept, or over the sum of their
            class weights where `class_weight` is given, as PyTorch does. `token_weight` does not enter the divisor.
        label_smoothing: in [0, 1].
        z_loss: not negative; the coefficient of ``lse^2`` (PaLM, https://arxiv.org/abs/2204.02311).
        softcap: positive; bounds the logits (Gemma 2, https://arxiv.org/abs/2408.00118). None leaves them.
        focal_gamma: not negative (Lin et al. 2017, https://arxiv.org/abs/1708.02002).
        token_weight: (T,), floating: a weight a token. Not differentiable.

    Returns:
        The loss in float32 (float64 for float64 logits): the sum over tokens would lose its meaning in 16 bits.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or option values do not fit, or, on CPU, a target is outside the vocabulary.
    """
    options = (ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma)
    try:
        if OPERATOR.uses_kernel(logits, target, class_weight, token_weight) and not needs_grad(
            class_weight, token_weight
        ):
            grad = needs_grad(logits)
            if not grad and options == _DEFAULTS and class_weight is None and token_weight is None:
                return _infer(logits, target)  # each argument that is not passed saves a call on one token some time
            # The raw operators know "no cap" as 0, which is no cap that a caller may ask for.
            cap = -1.0 if softcap == 0 else softcap or 0.0
            if grad:
                target, token_weight = own(target), own(token_weight)
            args = (
                logits,
                target,
                class_weight,
                token_weight,
                ignore_index,
                _REDUCTIONS[reduction],
                label_smoothing,
                z_loss,
                cap,
                focal_gamma,
            )
            return _CrossEntropy.apply(*args) if grad else _infer(*args)
    except REFUSED:
        _check(logits, target, class_weight, token_weight, *options)
        raise
    _check(logits, target, class_weight, token_weight, *options)
    return _reference(logits, target, class_weight, token_weight, *options)


def _check(
    logits, target, class_weight, token_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma
):
    op = "functional.cross_entropy"
    check_tensor(op, "logits", logits)
    check_tensor(op, "class_weight", class_weight, optional=True)
    check_tensor(op, "token_weight", token_weight, optional=True)
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"bigkernels.{op}: target is {type_name(target)}; accepted are int64 and int32 class indices")
    if logits.dim() != 2:
        raise ValueError(f"bigkernels.{op}: logits has shape {tuple(logits.shape)}, expected (T, V)")
    check_same_device(op, "logits", logits, target=target, class_weight=class_weight, token_weight=token_weight)
    check_shape(op, "target", target, logits.shape[:1], "one class a row of logits")
    check_shape(op, "class_weight", class_weight, logits.shape[1:], "one weight a class")
    check_shape(op, "token_weight", token_weight, logits.shape[:1], "one weight a token")
    check_options(op, reduction, label_smoothing, z_loss, softcap, focal_gamma)
    if is_readable(target):
        _check_targets(target, logits.shape[1], ignore_index)


def check_options(op, reduction, label_smoothing, z_loss, softcap, focal_gamma):
    if reduction not in _REDUCTIONS:
        raise ValueError(f"bigkernels.{op}: reduction is {reduction!r}; accepted are {', '.join(_REDUCTIONS)}")
    for name, value, accepted, fits in (
        ("label_smoothing", label_smoothing, "in [0, 1]", 0 <= label_smoothing <= 1),
        ("z_loss", z_loss, "not negative", z_loss >= 0),
        ("softcap", softcap, "positive or None", softcap is None or 0 < softcap < float("inf")),
        ("focal_gamma", focal_gamma, "not negative", focal_gamma >= 0),
    ):
        if not fits:
            raise ValueError(f"bigkernels.{op}: {name} is {value}, expected {accepted}")


def _check_targets(target, vocabulary, ignore_index):
    # Data-dependent, so on CPU only: on a GPU it would wait for the device.
    outside = target[(target != ignore_index) & ((target < 0) | (target >= vocabulary))]
    if outside.numel():
        raise ValueError(
            f"bigkernels.functional.cross_entropy: target holds {outside[0].item()}, outside the "
            f"vocabulary [0, {vocabulary}) and not ignore_index ({ignore_index})"
        )


def _token_losses(
    logits, target, class_weight, token_weight, ignore_index, label_smoothing, z_loss, softcap, focal_gamma
):
    """(loss a token, divisor weight a token, lse), everything wide."""
    wide = compute_dtype(logits.dtype)
    z = logits.to(wide)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    kept = target != ignore_index
    index = torch.where(kept, target, 0).long()
    lse = torch.logsumexp(z, -1)
    nll = lse - z.gather(1, index.unsqueeze(1)).squeeze(1)
    divisor = torch.ones_like(nll) if class_weight is None else class_weight.to(wide)[index]
    ce = (1 - label_smoothing) * divisor * nll
    if label_smoothing:
        per_class = lse.unsqueeze(1) - z
        smooth = per_class.sum(1) if class_weight is None else per_class @ class_weight.to(wide)
        ce = ce + label_smoothing / z.shape[1] * smooth
    if focal_gamma:
        ce = ce * (-torch.expm1(-nll)).clamp_min(0) ** focal_gamma
    loss = ce + z_loss * lse.square() if z_loss else ce
    if token_weight is not None:
        loss = loss * token_weight.to(wide)
    return torch.where(kept, loss, 0.0), torch.where(kept, divisor, 0.0), lse


def predictions(logits, target, ignore_index, softcap):
    """The first class of the largest logit, as argmax finds it; -1 for ignored tokens."""
    z = logits.detach().to(compute_dtype(logits.dtype))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return torch.where(target != ignore_index, z.argmax(-1), -1)


def _reference(
    logits, target, class_weight, token_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma
):
    loss, divisor, _ = _token_losses(
        logits, target, class_weight, token_weight, ignore_index, label_smoothing, z_loss, softcap, focal_gamma
    )
    if reduction == "none":
        return loss
    return loss.sum() / divisor.sum() if reduction == "mean" else loss.sum()


def _fwd_fallback(logits, target, class_weight, token_weight, ignore_index, reduction, *options):
    loss, divisor, lse = _token_losses(logits, target, class_weight, token_weight, ignore_index, *options)
    divisor = divisor.sum()
    if reduction:
        loss = loss.sum() / divisor if reduction == _REDUCTIONS["mean"] else loss.sum()
    return loss.float(), lse.float().contiguous(), divisor.float()


def _fwd_fake(logits, target, class_weight, token_weight, ignore_index, reduction, *options):
    rows = logits.shape[:1]
    loss, lse, divisor = (logits.new_empty(s, dtype=torch.float32) for s in ((() if reduction else rows), rows, ()))
    return loss, lse, divisor


def _predict_fallback(logits, target, class_weight, token_weight, ignore_index, reduction, *options):
    results = _fwd_fallback(logits, target, class_weight, token_weight, ignore_index, reduction, *options)
    return *results, predictions(logits, target, ignore_index, options[2])


def _predict_fake(logits, *rest):
    return *_fwd_fake(logits, *rest), logits.new_empty(logits.shape[:1], dtype=torch.int64)


def _bwd_fallback(grad, logits, target, class_weight, token_weight, lse, divisor, *options):
    return vjp(_loss_of(target, class_weight, token_weight, *options), (logits,), (grad,))[0].contiguous()


def _loss_of(target, class_weight, token_weight, ignore_index, reduction, *options):
    """The reference as a function of the logits alone, from the raw operators' arguments."""
    name = next(name for name, number in _REDUCTIONS.items() if number == reduction)
    return lambda z: _reference(z, target, class_weight, token_weight, ignore_index, name, *options)


def _bwd_fake(grad, logits, *rest):
    return logits.new_empty(logits.shape)


def _bwd_over_fallback(grad, logits, *rest):
    logits.copy_(_bwd(grad, logits, *rest))


def _with_defaults(logits, target, *given):
    """The dispatcher leaves out the last arguments where they have the schema's defaults."""
    return logits, target, *given, *(None, None, -100, 1, 0.0, 0.0, 0.0, 0.0)[len(given) :]


# Logits come from a matrix product and the loss is a number: the compiler has nothing to fuse it with, and makes three
# times as slow a loop of the reference, with several copies of the logits.
OPERATOR = Operator("cross_entropy", in_graphs=True)
_OPTIONS = "int ignore_index, int reduction, float label_smoothing, float z_loss, float softcap, float focal_gamma"
_fwd = define(
    f"cross_entropy_fwd(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_fallback,
)
# The same, and `predictions`.
_predict = define(
    f"cross_entropy_predict(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _predict_fake,
    _predict_fallback,
)
_infer = define(
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, Tensor? token_weight=None, int ignore_index=-100,"
    " int reduction=1, float label_smoothing=0.0, float z_loss=0.0, float softcap=0.0, float focal_gamma=0.0)"
    " -> Tensor",
    lambda *args: _fwd_fake(*_with_defaults(*args))[0],
    lambda *args: _fwd_fallback(*_with_defaults(*args))[0],
)
_REST = f"Tensor target, Tensor? weight, Tensor? token_weight, Tensor lse, Tensor divisor, {_OPTIONS}"
_bwd = define(f"cross_entropy_bwd(Tensor grad, Tensor logits, {_REST}) -> Tensor", _bwd_fake, _bwd_fallback)
# The same, written over the logits.
_bwd_ = define(
    f"cross_entropy_bwd_(Tensor grad, Tensor(a!) logits, {_REST}) -> ()", lambda *args: None, _bwd_over_fallback
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, class_weight, token_weight, *options):
        loss, lse, divisor = _fwd(logits, target, class_weight, token_weight, *options)
        ctx.save_for_backward(logits, target, class_weight, token_weight, lse, divisor)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        logits, target, class_weight, token_weight, *_ = saved
        if is_observed(grad):
            return *gradients(_loss_of(target, class_weight, token_weight, *ctx.options), (logits,), (grad,)), *[
                None
            ] * 9
        return _bwd(grad, *saved, *ctx.options), *[None] * 9
