"""Cross entropy on GPUs. The logits are read once forward and once backward, and nothing of their size but the gradient
is written.

With z the logits after softcap, p = exp(z - lse) and y the target, the gradient of a token's loss is

    dz_j = alpha * p_j - beta * weight_j - kappa * [j = y],

whose coefficients are found once a row. At the target alpha * p_y - kappa would cancel as p_y nears one; there it is
computed from 1 - p_y.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import cross_entropy as op
from ._launch import capability, falls_back, launch, power_of_2, processors, require, rows

_DEBUG = os.environ.get("BIGKERNELS_DEBUG", "0") not in ("", "0")
_REDUCTIONS = {number: name for name, number in op._REDUCTIONS.items()}
_LEAST = tl.constexpr(-3.4e38)  # below every finite logit; finite, because -inf - -inf is not a number


@triton.jit
def _exp(x):
    """exp(x), what is not normal flushed to zero: `tl.exp` would take four instructions more to keep it."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _tanh(x):
    # The quotient cancels near zero, where the series is exact to float32.
    e = _exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * 0.021869488))))
    return tl.where(s < 0.0625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _one_minus_exp(x):
    """1 - exp(-x) for x >= 0."""
    near = x * (1.0 - x / 2 * (1.0 - x / 3 * (1.0 - x / 4 * (1.0 - x / 5 * (1.0 - x / 6 * (1.0 - x / 7))))))
    return tl.where(x < 0.25, near, 1.0 - _exp(-x))


@triton.jit
def _target(
    LOGITS,
    TARGET,
    WEIGHT,
    row,
    inside,
    stride,
    ignore_index,
    softcap,
    V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHECK: tl.constexpr,
):
    """A row's target, whether it counts, the logit there, and its weight: NaN for a target outside the vocabulary."""
    y = tl.load(TARGET + row, mask=inside, other=0).to(tl.int64)
    kept = inside & (y != ignore_index)
    valid = kept & (y >= 0) & (y < V)
    if CHECK:
        tl.device_assert(valid | (kept == 0), "cross_entropy: a target is outside the vocabulary and not ignore_index")
    z = tl.load(LOGITS + row * stride + y, mask=valid, other=0.0).to(tl.float32)
    if SOFTCAP:
        z = softcap * _tanh(z / softcap)
    weight = 1.0
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + y, mask=valid, other=0.0).to(tl.float32)
    return y, kept, z, tl.where(valid, weight, tl.where(kept, float("nan"), 0.0))


@triton.jit
def forward_rows(
    LOGITS,
    TARGET,
    WEIGHT,
    WEIGHT_SUM,
    TOKEN_WEIGHT,
    LOSS,
    DIVISOR,
    LSE,
    PREDICTED,
    tokens,
    stride,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    focal_gamma,
    V: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOCAL: tl.constexpr,
    CHECK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    y, kept, z_y, weight_y = _target(
        LOGITS, TARGET, WEIGHT, row, inside, stride, ignore_index, softcap, V, SOFTCAP, CHECK
    )
    # Maximum and sum of exponentials run along VECTOR elements that one thread holds: the loop needs no barrier.
    top = tl.full([ROWS, LANES], _LEAST, tl.float32)
    sums = tl.zeros([ROWS, LANES], tl.float32)
    smooth = tl.zeros([ROWS, LANES], tl.float32)
    if PREDICTED is not None:
        best = tl.full([ROWS, LANES], -float("inf"), tl.float32)
        best_at = tl.zeros([ROWS, LANES], tl.int32)
        nan_at = tl.full([ROWS, LANES], V, tl.int32)
    if ALIGNED:
        lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # 16 bytes in one load
    else:
        lane = tl.arange(0, LANES)[:, None] + tl.arange(0, VECTOR)[None, :] * LANES  # neighbours side by side
    # Ignored rows are not read.
    end = tl.max(kept.to(tl.int32), 0) * V
    start = 0
    while start < end:
        col = start + lane
        mask = kept[:, None, None] & (col < V)[None, :, :]
        z = tl.load(LOGITS + (row * stride)[:, None, None] + col[None, :, :], mask=mask, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = softcap * _tanh(z / softcap)
        if SMOOTH:
            if WEIGHT is not None:
                weight = tl.load(WEIGHT + col, mask=col < V, other=0.0).to(tl.float32)
                smooth += tl.sum(tl.where(mask, z * weight[None, :, :], 0.0), 2)
            else:
                smooth += tl.sum(tl.where(mask, z, 0.0), 2)
        z = tl.where(mask, z, -float("inf"))
        if PREDICTED is not None:
            here = col[None, :, :].to(tl.int32)
            nan_at = tl.minimum(nan_at, tl.min(tl.where(z != z, here, V), 2))
            number = tl.where(z != z, -float("inf"), z)
            most = tl.max(number, 2)
            first = tl.min(tl.where(number == most[:, :, None], here, V), 2)
            best_at = tl.where(most > best, first, best_at)
            best = tl.maximum(most, best)
        above = tl.maximum(top, tl.max(z, 2))
        sums = sums * _exp(top - above) + tl.sum(_exp(z - above[:, :, None]), 2)
        top = above
        start += LANES * VECTOR
    highest = tl.where(kept, tl.max(top, 1), 0.0)
    log_sum = tl.log(tl.where(kept, tl.sum(sums * _exp(top - highest[:, None]), 1), 1.0))
    lse = highest + log_sum
    nll = (highest - z_y) + log_sum
    ce = (1.0 - label_smoothing) * weight_y * nll
    if SMOOTH:
        weight_sum = V * 1.0
        if WEIGHT is not None:
            weight_sum = tl.load(WEIGHT_SUM)
        ce += label_smoothing / V * (lse * weight_sum - tl.sum(smooth, 1))
    if FOCAL:
        ce *= _exp(focal_gamma * tl.log(tl.maximum(_one_minus_exp(nll), 1e-38)))
    loss = ce + z_loss * lse * lse
    if TOKEN_WEIGHT is not None:
        loss *= tl.load(TOKEN_WEIGHT + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(LOSS + row, tl.where(kept, loss, 0.0), mask=inside)
    tl.store(DIVISOR + row, tl.where(kept, weight_y, 0.0), mask=inside)
    tl.store(LSE + row, tl.where(kept, lse, 0.0), mask=inside)
    if PREDICTED is not None:
        largest = tl.max(best, 1)
        at = tl.min(tl.where(best == largest[:, None], best_at, V), 1)
        nan = tl.min(nan_at, 1)  # larger than all, as in torch
        at = tl.where(nan < V, nan, at).to(tl.int64)
        tl.store(PREDICTED + row, tl.where(kept, at, -1), mask=inside)


@triton.jit
def backward_rows(
    GRAD,
    LOGITS,
    TARGET,
    WEIGHT,
    WEIGHT_SUM,
    TOKEN_WEIGHT,
    LSE,
    DIVISOR,
    D_LOGITS,
    tokens,
    stride_grad,
    stride,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    focal_gamma,
    V: tl.constexpr,
    MEAN: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOCAL: tl.constexpr,
    CHECK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    y, kept, z_y, weight_y = _target(
        LOGITS, TARGET, WEIGHT, row, inside, stride, ignore_index, softcap, V, SOFTCAP, CHECK
    )
    lane = tl.arange(0, BLOCK)
    lse = tl.load(LSE + row, mask=kept, other=0.0)
    nll = lse - z_y
    missing = _one_minus_exp(nll)
    grad = tl.load(GRAD + row * stride_grad, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        grad = grad / tl.load(DIVISOR)
    if TOKEN_WEIGHT is not None:
        grad *= tl.load(TOKEN_WEIGHT + row, mask=inside, other=0.0).to(tl.float32)

    kappa = (1.0 - label_smoothing) * weight_y
    beta = tl.zeros([ROWS], tl.float32)
    everywhere = 2.0 * z_loss * lse  # the part of alpha that kappa does not cancel
    if SMOOTH:
        weight_sum = V * 1.0
        if WEIGHT is not None:
            weight_sum = tl.load(WEIGHT_SUM)
        spread = label_smoothing / V * weight_sum
        beta += label_smoothing / V
    if FOCAL:
        ce = kappa * nll
        if SMOOTH:
            smooth = tl.zeros([ROWS, BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                col = start + lane
                mask = kept[:, None] & (col < V)[None, :]
                z = tl.load(LOGITS + (row * stride)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
                if SOFTCAP:
                    z = softcap * _tanh(z / softcap)
                if WEIGHT is not None:
                    z *= tl.load(WEIGHT + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
                smooth += z
            ce += label_smoothing / V * (lse * weight_sum - tl.sum(smooth, 1))
        log_missing = tl.log(tl.maximum(missing, 1e-38))
        factor = _exp(focal_gamma * log_missing)
        if SMOOTH:
            everywhere += factor * spread
        kappa = factor * kappa + ce * focal_gamma * _exp((focal_gamma - 1.0) * log_missing - nll)
        beta *= factor
    else:
        if SMOOTH:
            everywhere += spread
    alpha = grad * (everywhere + kappa)
    beta *= grad
    at_target = grad * everywhere - alpha * missing - beta * weight_y

    if IN_PLACE:
        tl.debug_barrier()  # every warp has read what it needs of the whole row
    # Programs beyond the first of a row share its columns, where there are too few rows to fill the GPU.
    start = tl.program_id(1) * BLOCK
    while start < V:
        col = start + lane
        mask = kept[:, None] & (col < V)[None, :]
        z = tl.load(LOGITS + (row * stride)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
        slope = 1.0
        if SOFTCAP:
            bounded = _tanh(z / softcap)
            z = softcap * bounded
            slope = 1.0 - bounded * bounded
        dz = alpha[:, None] * _exp(z - lse[:, None])
        if SMOOTH:
            if WEIGHT is not None:
                dz -= beta[:, None] * tl.load(WEIGHT + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
            else:
                dz -= beta[:, None]
        dz = tl.where(col[None, :] == y[:, None], at_target[:, None], dz) * slope
        dz = tl.where(kept[:, None], dz, 0.0)
        mask = inside[:, None] & (col < V)[None, :]
        tl.store(D_LOGITS + (row * V)[:, None] + col[None, :], dz.to(D_LOGITS.dtype.element_ty), mask=mask)
        start += BLOCK * tl.num_programs(1)


def _prepare(
    logits, target, weight, token_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma
):
    require("cross_entropy", softcap >= 0, "softcap must be positive")  # the caller's checks name what was given
    op._check(
        logits,
        target,
        weight,
        token_weight,
        ignore_index,
        _REDUCTIONS[reduction],
        label_smoothing,
        z_loss,
        softcap or None,
        focal_gamma,
    )
    weight_sum = weight.sum(dtype=torch.float32) if weight is not None and label_smoothing else None
    target, weight, token_weight = (None if t is None else t.contiguous() for t in (target, weight, token_weight))
    flags = {"SMOOTH": label_smoothing != 0, "SOFTCAP": softcap != 0, "FOCAL": focal_gamma != 0, "CHECK": _DEBUG}
    return rows(logits), target, weight, weight_sum, token_weight, flags


@falls_back(op._fwd_fallback)
def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    focal_gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the fallback, except that lse is 0 for ignored tokens: their logits are not read."""
    return _forward(
        logits,
        target,
        weight,
        token_weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
        focal_gamma,
        None,
    )


@falls_back(op._predict_fallback)
def predict(logits: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward`, and the first class of the largest logit; -1 for ignored tokens."""
    predicted = logits.new_empty(logits.shape[:1], dtype=torch.int64)
    given: tuple[Any, ...] = logits, *rest, predicted
    return *_forward(*given), predicted


def _forward(
    logits,
    target,
    weight,
    token_weight,
    ignore_index,
    reduction,
    label_smoothing,
    z_loss,
    softcap,
    focal_gamma,
    predicted,
):
    logits, target, weight, weight_sum, token_weight, flags = _prepare(
        logits, target, weight, token_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma
    )
    tokens, vocabulary = logits.shape
    loss, divisor, lse = (logits.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    vector = 16 // logits.element_size()
    # Four vectors a thread; long rows get more threads where there are few of them.
    warps = 4 if tokens >= 8 * processors(logits.device) or vocabulary < 16384 else 16
    lanes = min(128 * warps, power_of_2(triton.cdiv(vocabulary, vector)))
    at_once = 128 * warps // lanes
    # The assembler takes 64 on the newest GPUs, and spills.
    registers = 72 if logits.dtype == torch.float32 and warps == 4 and capability(logits) >= 100 else None
    launch(
        forward_rows,
        (triton.cdiv(tokens, at_once),),
        logits,
        target,
        weight,
        weight_sum,
        token_weight,
        loss,
        divisor,
        lse,
        predicted,
        tokens,
        logits.stride(0),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        focal_gamma,
        V=vocabulary,
        **flags,
        ROWS=at_once,
        LANES=lanes,
        VECTOR=vector,
        ALIGNED=logits.stride(0) % 16 == 0 and vocabulary % 16 == 0,
        num_warps=warps,
        debug=_DEBUG,
        maxnreg=registers,
    )
    divisor = divisor.sum()
    if reduction:
        loss = loss.sum() / divisor if _REDUCTIONS[reduction] == "mean" else loss.sum()
    return loss, lse, divisor


def infer(*args) -> Tensor:
    return forward(*op._with_defaults(*args))[0]


def _differentiate(
    d_logits: Tensor,
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    lse: Tensor,
    divisor: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    focal_gamma: float,
) -> None:
    name = _REDUCTIONS[reduction]
    require("cross_entropy_bwd", grad.shape == (logits.shape[:1] if name == "none" else ()), "grad must fit the loss")
    require("cross_entropy_bwd", lse.shape == logits.shape[:1] and divisor.shape == (), "lse must fit logits")
    in_place = d_logits is logits
    logits, target, weight, weight_sum, token_weight, flags = _prepare(
        logits, target, weight, token_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma
    )
    tokens, vocabulary = logits.shape
    # In place a row has one program, because others would read what it has written; where there are few, wide ones.
    warps = 16 if in_place and vocabulary >= 16384 and tokens < 8 * processors(logits.device) else 4
    block = min(512 * warps, power_of_2(vocabulary))
    at_once = max(1, 1024 // block)
    programs = triton.cdiv(tokens, at_once)
    shares = min(triton.cdiv(vocabulary, block), triton.cdiv(8 * processors(logits.device), programs))
    launch(
        backward_rows,
        (programs, 1 if in_place else shares),
        grad,
        logits,
        target,
        weight,
        weight_sum,
        token_weight,
        lse.contiguous(),
        divisor,
        d_logits,
        tokens,
        grad.stride(0) if name == "none" else 0,
        logits.stride(0),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        focal_gamma,
        V=vocabulary,
        MEAN=name == "mean",
        **flags,
        ROWS=at_once,
        BLOCK=block,
        IN_PLACE=in_place,
        num_warps=warps,
        debug=_DEBUG,
    )


@falls_back(op._bwd_fallback, inputs=2, empty=op._bwd_fake)
def backward(grad: Tensor, logits: Tensor, *rest) -> Tensor:
    d_logits = logits.new_empty(logits.shape)
    _differentiate(d_logits, grad, logits, *rest)
    return d_logits


@falls_back(op._bwd_over_fallback, inputs=2)
def backward_over(grad: Tensor, logits: Tensor, *rest) -> None:
    """`backward`, written over the logits."""
    if not logits.is_contiguous():
        return op._bwd_over_fallback(grad, logits, *rest)
    _differentiate(logits, grad, logits, *rest)


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: large and small vocabularies, few rows, every option,
    and gradients over chunks of logits."""
    plain, everything = (0.0, 0.0, 0.0, 0.0), (0.1, 1e-4, 30.0, 2.0)
    for tokens, vocabulary, options in (
        (8192, 128256, plain),
        (64, 128256, plain),
        (8192, 256, plain),
        (8192, 50257, plain),
        (8192, 128256, everything),
        (8192, 128256, (0.0, 0.0, 30.0, 0.0)),
    ):
        logits = torch.empty(tokens, vocabulary, dtype=dtype, device="meta")
        target, lse = logits.new_empty(tokens, dtype=torch.int64), logits.new_empty(tokens, dtype=torch.float32)
        weights = (logits.new_empty(vocabulary), lse) if options is everything else (None, None)
        yield forward, (logits, target, *weights, -100, 1, *options)
        if tokens == 8192 and vocabulary == 128256:
            yield predict, (logits, target, *weights, -100, 1, *options)
        yield backward, (lse.new_empty(()), logits, target, *weights, lse, lse.new_empty(()), -100, 1, *options)
        for some in (tokens, 512):
            z, n = logits[:some], slice(some)
            yield (
                backward_over,
                (
                    lse[n],
                    z,
                    target[n],
                    weights[0],
                    weights[1] if weights[1] is None else lse[n],
                    lse[n],
                    lse.new_empty(()),
                    -100,
                    0,
                    *options,
                ),
            )
