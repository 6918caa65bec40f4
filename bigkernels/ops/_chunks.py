"""Losses over a vocabulary from hidden states, some tokens at a time: no tensor of (T, V) is ever held.

A `Head` makes the logits of some tokens, an `Objective` makes numbers a token of them and the gradient of the logits,
and the two functions here walk over the tokens:

* `total`, a sum over tokens: what comes from above is one factor for all of them, so that forward makes the gradients
  while it has the logits (three products) and backward only multiplies them. They are made for a factor of one: in
  16 bits the gradient of a mean over many tokens would be lost to underflow before it is added up.
* `per_token`, numbers a token: backward makes the logits once more (four products).

Gradients of the weight and the bias are added up in float32 (float64 for float64). A gradient that nobody asks for
costs neither work nor memory. Ignored tokens are left out on CPU; on other devices they are computed and count nothing,
because to know how many there are the host would have to wait.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch_private import disable_dynamo
from . import linear as _linear
from . import quantized_linear as _quantized
from ._derivatives import gradients, is_observed, no_autocast
from .registry import compute_dtype, has_values, is_capturing, is_readable

if TYPE_CHECKING:
    from ..quantization import QuantizedWeight

Tokens = slice | Tensor  # rows of the hidden states: a run, or their numbers

_LEAST = {"cpu": 2**25}  # bytes of a chunk's logits that are always granted
# A GPU adds to the gradient of the weight while it multiplies: with fewer than some 1000 tokens memory is the limit.
_LEAST_ELSEWHERE = 2**29
# Elements of the logits from which a GPU's tokens are counted: what makes them takes milliseconds.
_WORTH_WAITING = 2**27
_SHARE = 0.05  # of 16-bit logits of all tokens, which a chunk's logits may take
_BLOCK, _GPU_BLOCK = 2**21, 2**26  # elements of a weight's gradient that are made at once before they are added


class Objective:
    """What a loss makes of the logits of some tokens.

    Attributes:
        outputs: how many numbers a token it returns.
        reports: how many more, which have no gradient: the last ones of `values`.
        tensors: what it reads beside the logits. They are constants, and must not be written before backward.
    """

    outputs = 1
    reports = 0
    tensors: Sequence[Tensor | None] = ()

    def values(self, z: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
        """From logits z (n, V), which stay as they are: first the outputs (n,), then what `gradient` wants to see
        again, (n,) each.
        """
        raise NotImplementedError

    def gradient(self, z: Tensor, tokens: Tokens, values: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
        """The gradient of z (n, V), which may be written over z.

        `values` are those of these tokens, `grads` (n,) the gradient of each output, None where it is zero.
        """
        raise NotImplementedError

    def both(self, z: Tensor, tokens: Tokens, grads: Sequence[Tensor | None]) -> tuple[Sequence[Tensor], Tensor]:
        """`values` and `gradient` in one, which may share what they compute; z may be written over."""
        values = self.values(z, tokens)
        return values, self.gradient(z, tokens, values, grads)


class Head:
    """``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature``, for some tokens.

    Without `softcap`, ``scale * (hidden @ weight.T + bias) / temperature``. Products are added up in float32 and not
    rounded to 16 bits, so that every loss makes of one head one distribution.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
    ):
        self.hidden, self.bias = hidden, bias
        self.scale, self.softcap, self.temperature = scale, softcap, temperature
        self.wide = compute_dtype(hidden.dtype)
        self.vocabulary = weight.shape[0]
        self.quantized = self.weight = None
        if not isinstance(weight, Tensor):
            self.quantized, self.kernel = weight, False
            return
        self.kernel = _linear.OPERATOR.uses_kernel(hidden, weight, bias) and hidden.is_cpu
        if not self.kernel or weight.dtype not in (hidden.dtype, torch.float32):
            weight = weight.to(hidden.dtype)
        readable = weight.stride(1) == 1 or (weight.stride(0) == 1 and not self.kernel)
        self.weight = weight if readable else weight.contiguous()  # once, and not in each product
        if bias is not None:
            self.bias = bias.to(hidden.dtype)

    def product(self, tokens: Tokens) -> Tensor:
        """``hidden @ weight.T + bias`` in float32 (float64 for float64), in new memory."""
        x = self.hidden[tokens]
        if self.quantized is not None:
            return _quantized.wide_product(x, self.quantized, self.bias)
        if self.kernel:
            return _linear._fwd(x, self.weight, self.bias, None, True)
        if self.wide == x.dtype:
            return F.linear(x, self.weight, self.bias)
        if x.is_cuda:
            z = torch.mm(x, self.weight.T, out_dtype=self.wide)
            return z if self.bias is None else z.add_(self.bias)
        return _linear.wide_product(x, self.weight, self.bias)

    def logits(self, tokens: Tokens) -> Tensor:
        """(n, V) in float32 (float64 for float64), in new memory."""
        z = self.product(tokens)
        if self.softcap is not None:
            return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return z if self.scale == self.temperature else z.mul_(self.scale / self.temperature)

    def slope(self, z: Tensor) -> Tensor | float:
        """The derivative of the logits z by the product."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        # 1 - tanh^2 as a product, which keeps its digits near saturation.
        tanh = z * (self.temperature / self.softcap)
        return (1 - tanh).mul_(tanh.add_(1)).mul_(factor)


class _Gradients:
    """Of the hidden states, the weight and the bias, added up over chunks; None for those that are not wanted."""

    def __init__(self, head: Head, hidden: bool, weight: bool, bias: bool):
        self.head = head
        self.hidden = torch.zeros_like(head.hidden, memory_format=torch.contiguous_format) if hidden else None
        self.weight = self.bias = None
        sizes = head.vocabulary, head.hidden.shape[1]
        if weight:
            self.weight = head.hidden.new_zeros(sizes, dtype=head.wide)
            self.like = self.weight.new_empty(()).expand(sizes)  # tells the kernel the dtype of its result
        if bias:
            self.bias = head.hidden.new_zeros(sizes[0], dtype=head.wide)

    def __bool__(self) -> bool:
        return any(g is not None for g in (self.hidden, self.weight, self.bias))

    def add(self, tokens: Tokens, dz: Tensor, slope: Tensor | float) -> None:
        """`dz` is the gradient of the logits of these tokens, and `slope` theirs by the product."""
        if isinstance(slope, Tensor) or slope != 1:
            dz = dz.mul_(slope)
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        dz = dz.to(self.head.hidden.dtype)
        if self.hidden is not None:
            self.hidden[tokens] = self._of_hidden(dz)
        if self.weight is not None:
            self._add_to_weight(dz, self.head.hidden[tokens])

    def _of_hidden(self, dz: Tensor) -> Tensor:
        head = self.head
        if head.kernel:
            return _linear._bwd(dz, None, head.weight, True)[0]
        if head.quantized is None:
            return torch.mm(dz, head.weight)
        operands, k = head.quantized.operands(), head.quantized.shape[1]
        run = _quantized._bwd if _quantized.uses_kernel(dz, operands) else _quantized._backward
        dx = run(dz, *operands, k)
        return head.quantized.leaving(dx)

    def _add_to_weight(self, dz: Tensor, x: Tensor) -> None:
        total = self.weight
        if dz.dtype == total.dtype and not self.head.kernel:
            total.addmm_(dz.T, x)
        elif dz.is_cuda and _adds_wide(dz.device):
            torch.addmm(total, dz.T, x, out_dtype=total.dtype, out=total)
        elif dz.is_cuda:
            for rows in _blocks(total, _GPU_BLOCK):
                total[rows] += torch.mm(dz[:, rows].T, x, out_dtype=total.dtype)
        else:
            # In blocks that stay in the caches until they are added.
            for rows in _blocks(total, _BLOCK):
                if self.head.kernel:
                    total[rows] += _linear._bwd(dz[:, rows], x, self.like[rows], False)[1]
                else:
                    total[rows].addmm_(dz[:, rows].T.to(total.dtype), x.to(total.dtype))


@cache
def _adds_wide(device: torch.device) -> bool:
    """Whether addmm adds products of 16-bit numbers to float32, as it does in late versions."""
    total, x = (torch.zeros(16, 16, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.addmm(total, x, x, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _blocks(matrix: Tensor, elements: int) -> Iterator[slice]:
    rows = max(32, elements // max(matrix.shape[1], 1) // 32 * 32)
    return (slice(begin, begin + rows) for begin in range(0, matrix.shape[0], rows))


def _scaled(grad: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``grad * factor`` in a dtype; `grad` stays, because backward may run again."""
    if grad is None or grad.dim() < 2:
        return None if grad is None else (grad * factor).to(dtype)
    out = torch.empty_like(grad, dtype=dtype)
    factor = factor.view(1, 1)  # a number would be rounded to the dtype of `grad` first
    if grad.is_cuda:
        return torch.mul(grad, factor, out=out)
    # In blocks: a wide copy of all of it would be the largest tensor there is.
    for rows in _blocks(grad, _BLOCK):
        out[rows] = grad[rows] * factor
    return out


def chunk_rows(tokens: int, vocabulary: int, device: torch.device) -> int:
    """How many tokens are computed at once."""
    granted = max(_LEAST.get(device.type, _LEAST_ELSEWHERE), int(_SHARE * 2 * tokens * vocabulary))
    return max(32, granted // (4 * max(vocabulary, 1)) // 32 * 32)


def _split(tokens: int, index: Tensor | None, rows: int) -> Iterator[Tokens]:
    """Chunks of about one size; one without tokens where there are none, so that results have their dtypes."""
    count = tokens if index is None else index.shape[0]
    parts = max(1, -(-count // rows))
    step = max(32, -(-count // parts + 31) // 32 * 32) if parts > 1 else max(count, 1)
    for begin in range(0, max(count, 1), step):
        run = slice(begin, min(begin + step, count))
        yield run if index is None else index[run]


@dataclass(frozen=True)
class Call:
    """What a pass over the tokens needs beside the tensors that are differentiated.

    Attributes:
        objective: what is computed.
        kept: (T,) boolean, the tokens that count; None for all.
        quantized: the head, where it is quantized: it then gets no gradient.
        scale, softcap, temperature: as in `Head`.
        skip: whether ignored tokens are left out: True makes the host wait for a GPU to count them, False computes
            them in vain, None leaves them out where that waits for nothing or for far less than it saves.
        rows: tokens at once; None chooses by memory.
        reference: the result of all tokens at once and in plain PyTorch, as a function of hidden states, weight (the
            quantized one, where the head is) and bias: for derivatives of gradients, which are refused without it.
    """

    objective: Objective
    kept: Tensor | None = None
    quantized: QuantizedWeight | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    skip: bool | None = None
    rows: int | None = None
    reference: Callable[[Tensor, Tensor | QuantizedWeight, Tensor | None], Tensor | Sequence[Tensor]] | None = None

    def head(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Head:
        weight = weight if self.quantized is None else self.quantized
        return Head(hidden, weight, bias, scale=self.scale, softcap=self.softcap, temperature=self.temperature)

    def versions(self) -> list[int]:
        """Of the objective's constants: others where one was written."""
        return [t._version for t in self.objective.tensors if t is not None and not t.is_inference()]

    def derivatives(
        self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, grads: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias that can be differentiated."""
        if self.reference is None:
            raise RuntimeError("bigkernels: this objective has no reference to take second derivatives of")

        def call(hidden, weight, bias):
            return self.reference(hidden, weight if self.quantized is None else self.quantized, bias)

        return gradients(call, (hidden, weight, bias), grads)

    def chunks(self, head: Head) -> tuple[Tensor | None, Tensor | None, list[Tokens]]:
        """(numbers of the tokens, or None for all; mask of those that count, where others are computed; chunks)"""
        count, device = head.hidden.shape[0], head.hidden.device
        index, mask = None, self.kept
        skip = self.skip
        if self.kept is not None and skip is None:
            skip = is_readable(self.kept) or self._worth_waiting(head)
        if self.kept is not None and skip:
            index, mask = self.kept.nonzero().squeeze(1), None
            count = index.shape[0]
            index = None if count == head.hidden.shape[0] else index
        rows = self.rows or chunk_rows(head.hidden.shape[0], head.vocabulary, device)
        return index, mask, list(_split(count, index, rows))

    def _worth_waiting(self, head: Head) -> bool:
        """Whether counting the tokens (a wait of about 20 us) costs little beside the products of those that count."""
        kept = self.kept
        if not kept.is_cuda or kept.numel() * head.vocabulary < _WORTH_WAITING:
            return False
        return has_values(kept) and not is_capturing(kept)


@disable_dynamo
def total(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, divisor: Tensor | None, call: Call
) -> Tensor | tuple[Tensor, ...]:
    """The sum of the objective's first output over the tokens that count, over `divisor`.

    Args:
        hidden: (T, H), floating.
        weight: (V, H), or None where `call.quantized` is the head.
        bias: (V,) or None.
        divisor: a scalar, a constant. Where it is zero, the loss is what the division gives, and its gradient zero.
        call: the rest.

    Returns:
        A scalar in float32 (float64 for float64), differentiable by `hidden`, `weight` and `bias`; where the objective
        reports, that and its reports (T,).
    """
    return _Total.apply(hidden, weight, bias, divisor, call)


@disable_dynamo
def per_token(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> tuple[Tensor, ...]:
    """The outputs of an objective, (T,) each in float32 (float64 for float64); 0 for tokens that do not count. Then its
    reports.

    Arguments as those of `total`. Each output is differentiable by `hidden`, `weight` and `bias`.
    """
    return _PerToken.apply(hidden, weight, bias, call)


def _in_units(grads: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Sequence[Tensor | None], Tensor | None]:
    """Gradients over a power of two, and that; None where the dtype has exponents enough.

    A mean over many tokens sends down gradients so small that what float16 makes of them is zero.
    """
    given = [g for g in grads if g is not None and g.numel()]
    if dtype != torch.float16 or not given:
        return grads, None
    largest = torch.stack([g.abs().amax() for g in given]).amax()
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    unit = torch.where(largest.isfinite() & (largest > 0), unit, 1)
    return [g if g is None else g / unit for g in grads], unit


def _of_all_tokens(every: list[Sequence[Tensor]], tokens: int, index: Tensor | None) -> list[Tensor]:
    """The values of chunks as those of all tokens, (T,) each; 0 for tokens that were left out."""
    values = [torch.cat(parts) for parts in zip(*every, strict=True)]
    return values if index is None else [v.new_zeros(tokens).index_copy_(0, index, v) for v in values]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, divisor, call):
        with no_autocast(hidden.device):
            head = call.head(hidden, weight, bias)
            sums = _Gradients(head, *ctx.needs_input_grad[:3])
            index, mask, chunks = call.chunks(head)
            loss = hidden.new_zeros((), dtype=head.wide)
            reports = []
            rest = (None,) * (call.objective.outputs - 1)
            for tokens in chunks:
                z = head.logits(tokens)
                if sums:
                    one = z.new_ones(z.shape[0], dtype=head.wide) if mask is None else mask[tokens].to(head.wide)
                    slope = head.slope(z)
                    values, dz = call.objective.both(z, tokens, (one, *rest))
                    sums.add(tokens, dz, slope)
                else:
                    values = call.objective.values(z, tokens)
                loss += values[0].sum() if mask is None else torch.where(mask[tokens], values[0], 0).sum()
                if call.objective.reports:
                    reports.append(values[-call.objective.reports :])
        # The inputs are for derivatives of the gradients alone, and so are constants, which have to be the same then.
        ctx.save_for_backward(hidden, weight, bias, sums.hidden, sums.weight, sums.bias, divisor)
        ctx.call, ctx.versions = call, call.versions()
        loss = loss if divisor is None else loss / divisor
        if not reports:
            return loss
        reports = _of_all_tokens(reports, hidden.shape[0], index)
        ctx.mark_non_differentiable(*reports)
        return loss, *reports

    @staticmethod
    def backward(ctx, grad, *_):
        *inputs, of_hidden, of_weight, of_bias, divisor = ctx.saved_tensors
        if is_observed(grad):
            if ctx.versions != ctx.call.versions():
                raise RuntimeError(
                    "bigkernels: a tensor that derivatives of a loss's gradients need, as its target, "
                    "has been modified by an inplace operation"
                )
            return *ctx.call.derivatives(*inputs, (grad,)), None, None
        if divisor is not None:
            grad = torch.where(divisor == 0, 0, grad / divisor)
        grads = of_hidden, of_weight, of_bias
        return *(g if g is None else _scaled(g, grad, t.dtype) for g, t in zip(grads, inputs, strict=True)), None, None


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, call):
        with no_autocast(hidden.device):
            head = call.head(hidden, weight, bias)
            index, mask, chunks = call.chunks(head)
            every = []
            for tokens in chunks:
                every.append(call.objective.values(head.logits(tokens), tokens))
            values = _of_all_tokens(every, hidden.shape[0], index)
        outputs = values[: call.objective.outputs]
        reports = values[len(values) - call.objective.reports :]
        if mask is not None:
            outputs = [torch.where(mask, v, 0) for v in outputs]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*reports)
        ctx.call = call
        ctx.save_for_backward(hidden, weight, bias, *values, *call.objective.tensors)
        return *outputs, *reports

    @staticmethod
    def backward(ctx, *grads):
        call = ctx.call
        grads = grads[: call.objective.outputs]
        hidden, weight, bias, *values = ctx.saved_tensors  # this also finds constants that were written since
        values = values[: len(values) - len(call.objective.tensors)]
        if is_observed(*grads):
            return *call.derivatives(hidden, weight, bias, grads), None
        with no_autocast(hidden.device):
            head = call.head(hidden, weight, bias)
            sums = _Gradients(head, *ctx.needs_input_grad[:3])
            _, mask, chunks = call.chunks(head)
            if mask is not None:
                grads = [g if g is None else torch.where(mask, g, 0) for g in grads]
            grads, unit = _in_units(grads, hidden.dtype)
            for tokens in chunks if any(g is not None for g in grads) else ():
                z = head.logits(tokens)
                slope = head.slope(z)
                taken = [v[tokens] for v in values], [g if g is None else g[tokens] for g in grads]
                sums.add(tokens, call.objective.gradient(z, tokens, *taken), slope)
        gradients = sums.hidden, sums.weight, sums.bias
        inputs = hidden, weight, bias
        if unit is not None:
            return *(
                g if g is None else _scaled(g, unit, t.dtype) for g, t in zip(gradients, inputs, strict=True)
            ), None
        return *(g if g is None else g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)), None
