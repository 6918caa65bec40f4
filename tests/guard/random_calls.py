"""Random calls of every operator, of odd sizes, strides, offsets and options, as samples."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import torch
from children import unguarded
from torch import Tensor

from bigkernels._compare import compare
from bigkernels._samples import (
    Sample,
    attention,
    decode_attention,
    linear,
    linear_cross_entropy,
    quantized_linear,
    rows,
    widen,
)
from bigkernels.ops.activations import ACTIVATIONS
from bigkernels.ops.registry import KERNEL_DTYPES
from bigkernels.quantization import NF4, Int4

# Around every width that a kernel has: of vectors, tiles, blocks and groups.
_SIZES = [1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 97, 127, 128, 129, 191, 255, 256, 257, 511,
          513, 1023, 1024, 1025]  # fmt: skip
_HEADS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 72, 80, 96, 128]
_LENGTHS = [0, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 200, 257]
_FORMATS = ["int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "q4_1", "q8_0", Int4(32, "rtn"), Int4(128, "rtn"),
            NF4(64, double_quant=False), NF4(128, double_quant=False)]  # fmt: skip


class _Dice(random.Random):
    def chance(self, p: float) -> bool:
        return self.random() < p

    def some(self, p: float, *values: object) -> object:
        """One of the values with probability p, else None."""
        return self.choice(values) if self.chance(p) else None

    def lead(self, most: int) -> tuple[int, ...]:
        return tuple(self.choice([0, 1, 1, 2, 3, 5, 7]) for _ in range(self.randint(0, most)))

    def view(self) -> Callable[[Tensor], Tensor]:
        """Gives a tensor one of the layouts that models make; what lies between its elements is NaN."""
        return self.choice(
            [
                _whole,
                _whole,
                _columns,
                _offset(self.choice([1, 2, 3, 7, 17])),
                _transposed,
                _repeated,
                _every_second,
                _headroom,
            ]
        )


def _whole(t):
    return t


def _nan(t, *shape):
    return torch.full(shape, float("nan"), dtype=t.dtype)


def _columns(t):
    return torch.cat((t, _nan(t, *t.shape[:-1], 3)), -1)[..., : t.shape[-1]]


def _offset(elements):
    return lambda t: torch.cat((_nan(t, elements), t.reshape(-1)))[elements:].view(t.shape)


def _transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def _repeated(t):
    return t[:1].expand(t.shape) if t.dim() > 1 and t.shape[0] else t


def _every_second(t):
    return torch.stack((t, _nan(t, *t.shape)), -1)[..., 0]


def _headroom(t):
    return torch.cat((t, _nan(t, t.shape[0], 1, *t.shape[2:])), 1)[:, : t.shape[1]] if t.dim() > 2 else t


def _norm(dice: _Dice) -> Sample:
    operator = dice.choice(["rms_norm", "layer_norm"])
    optional = ["weight", "residual"] + ["bias"] * (operator == "layer_norm")
    names = ["x", *(n for n in optional if dice.chance(0.5))]
    shape = (*dice.lead(3), dice.choice(_SIZES)) if dice.chance(0.95) else (dice.choice([300, 521]), 1024)
    options = {"eps": dice.choice([1e-6, 1e-5, 0.1])}
    if operator == "rms_norm":
        options["offset"] = dice.choice([0.0, 1.0])
    make = rows.norm_inputs(" ".join(names), shape, dice.view())
    return Sample(operator, f"{names} {shape}", make, options, tuple(names))


def _rope(dice: _Dice) -> Sample:
    size = 2 * dice.choice([1, 2, 3, 4, 8, 9, 16, 19, 20, 24, 32, 40, 48, 64])
    heads = dice.choice([1, 2, 3, 7, 9]), dice.randint(1, 3)
    shape = dice.randint(1, 3), *heads, dice.choice([0, 1, 2, 3, 17, 33]), size
    options = {
        "rotary": 2 * dice.randint(1, size // 2),
        "interleaved": dice.chance(0.5),
        "cos_batch": dice.choice([1, shape[0]]),
        "heads_last": dice.chance(0.4),
    }
    return rows._rope(f"{shape} {options}", *shape, arrange=dice.view(), **options)


def _glu(dice: _Dice) -> Sample:
    shape = (*dice.lead(2), dice.choice([*_SIZES, 4095, 4096, 4097])) if dice.chance(0.95) else ()
    activation = dice.choice(list(ACTIVATIONS))
    make = rows._glu_inputs(*shape, arrange=dice.view() if shape else _whole)
    return Sample("glu", f"{shape} {activation}", make, {"activation": activation}, ("gate", "up"))


def _loss_options(dice: _Dice) -> dict[str, object]:
    options = {
        "reduction": dice.choice(["mean", "sum", "none"]),
        "z_loss": dice.some(0.3, 1e-3),
        "label_smoothing": dice.some(0.3, 0.1, 1.0),
        "softcap": dice.some(0.3, 5.0),
        "focal_gamma": dice.some(0.3, 2.0),
    }
    return {name: value for name, value in options.items() if value is not None}


def _cross_entropy(dice: _Dice) -> Sample:
    tokens, vocabulary = dice.choice([1, 2, 3, 7, 13, 33]), dice.choice([*_SIZES, 8192])
    options = _loss_options(dice) | {
        "extra": dice.choice(["", "weight", "token_weight", "weight token_weight"]),
        "ignore": dice.some(0.5, -100),
        "target_dtype": dice.choice([torch.int64, torch.int32]),
    }
    return rows._ce(f"{tokens} {vocabulary} {options}", tokens, vocabulary, arrange=dice.view(), **options)


def _linear_cross_entropy(dice: _Dice) -> Sample:
    shape = dice.choice([1, 2, 3, 13, 31, 32, 33, 64, 65, 129, 300]), dice.choice(_SIZES), dice.choice([*_HEADS, 257])
    options = _loss_options(dice) | {
        "extra": dice.choice(["", "class_weight", "token_weight"]),
        "ignore": dice.some(0.5, -100),
        "bias": dice.chance(0.4),
        "logit_scale": dice.choice([1.0, 0.5]),
    }
    return linear_cross_entropy._loss(f"{shape} {options}", *shape, arrange=dice.view(), **options)


def _attention_options(dice: _Dice) -> dict[str, object]:
    options = {
        "softcap": dice.some(0.3, 3.0),
        "dropout_p": dice.some(0.2, 0.2),
        "return_lse": dice.chance(0.3),
        "causal": dice.chance(0.5),
        "alibi": dice.chance(0.2),
        "sinks": dice.chance(0.3),
    }
    if dice.chance(0.3):
        options["window"] = dice.choice([-1, 0, 1, 7, 33, 200]), dice.choice([-1, 0, 3, 40])
    return {name: value for name, value in options.items() if value is not None}


def _heads_of(dice: _Dice) -> tuple[int, int]:
    groups = dice.choice([1, 1, 2, 3])
    return groups * dice.choice([1, 1, 2, 3, 7]), groups


def _attention(dice: _Dice) -> Sample:
    batch, (heads, groups), size = dice.choice([1, 1, 2, 3]), _heads_of(dice), dice.choice(_HEADS)
    queries = dice.choice(_LENGTHS)
    keys = queries if dice.chance(0.5) else dice.choice(_LENGTHS)
    if batch * heads * queries * keys > 400_000:
        batch, queries = 1, min(queries, 33)
    options = _attention_options(dice) | {
        "tokens_first": dice.chance(0.5),
        "value_size": dice.some(0.4, 1, 5, 8, 33, 64, 128),
    }
    full = (batch, heads, queries, keys)
    if dice.chance(0.3) and 0 not in full:
        options["bias"] = tuple(n if dice.chance(0.6) else 1 for n in full)
    if dice.chance(0.2) and keys:
        options["mask"] = attention._random_mask
    if dice.chance(0.3) and options["causal"]:
        options["prefix"] = [dice.randint(0, keys + 3) for _ in range(batch)]
    shape = batch, heads, groups, queries, keys, size
    return attention.attention_sample(f"{shape} {options}", *shape, arrange=dice.view(), **options)


def _varlen_attention(dice: _Dice) -> Sample:
    count, (heads, groups), size = dice.choice([1, 1, 2, 3, 5]), _heads_of(dice), dice.choice(_HEADS)
    queries = [dice.choice(_LENGTHS[:-3]) for _ in range(count)]
    keys = queries if dice.chance(0.6) else [dice.choice(_LENGTHS[:-3]) for _ in range(count)]
    options = _attention_options(dice) | {"rest": dice.choice([0, 0, 1, 5]), "value_size": dice.some(0.4, 5, 33)}
    if dice.chance(0.3) and options["causal"]:
        options["prefix"] = [dice.randint(0, 9) for _ in range(count)]
    lengths = queries, keys, heads, groups, size
    return attention.varlen_sample(f"{lengths} {options}", *lengths, arrange=dice.view(), **options)


def _decode_attention(dice: _Dice) -> Sample:
    (heads, groups), size, new = _heads_of(dice), dice.choice(_HEADS), dice.choice([1, 1, 1, 2, 3, 5, 16, 17, 40])
    full = [0, new, *(new + n for n in (1, 16, 30, 63, 64, 127, 300))]
    lengths = [dice.choice(full) for _ in range(dice.randint(1, 3))]
    append = dice.chance(0.5)
    options = _attention_options(dice) | {
        "new": new,
        "heads": heads,
        "groups": groups,
        "size": size,
        "append": append,
        "int8": dice.chance(0.3),
        "page": dice.some(0.6, 1, 3, 16, 17, 64),
        "value_size": dice.some(0.4, 5, 33, 64),
        "angles": dice.choice([1, len(lengths)]),
        "tokens_first": dice.chance(0.5),
    }
    for unknown in ("causal", "dropout_p"):
        options.pop(unknown, None)
    if append and size > 1 and dice.chance(0.6):
        options |= {"rotary": 2 * dice.randint(1, size // 2), "interleaved": dice.chance(0.5)}
    capacity = max(lengths) + dice.choice([0, 0, 1, 7])
    options["arrange"] = _whole if append else dice.view()
    return decode_attention.decode_sample(f"{lengths} {capacity} {options}", lengths, capacity, **options)


def _matrix(dice: _Dice) -> tuple[tuple[int, ...], int]:
    k, n = dice.choice(_SIZES), dice.choice(_SIZES)
    lead = dice.choice([(), (0,), (1,), (2,), (3,), (5,), (7, 2), (17,), (33,), (65,), (129,), (520,)])
    return (*lead, k), n if k * n * max(1, *lead, 1) < 1e7 else 33


def _linear(dice: _Dice) -> Sample:
    shape, n = _matrix(dice)
    return linear._sample(f"{shape} {n}", shape, n, bias=dice.chance(0.5), arrange=dice.view())


def _quantized_linear(dice: _Dice) -> Sample:
    (shape, n), config = _matrix(dice), dice.choice(_FORMATS)
    bias = dice.chance(0.5)
    return quantized_linear.weight_sample(f"{config} {shape} {n}", config, shape, n, bias=bias, arrange=dice.view())


KINDS = (
    _norm,
    _rope,
    _glu,
    _cross_entropy,
    _linear_cross_entropy,
    _attention,
    _varlen_attention,
    _decode_attention,
    _linear,
    _quantized_linear,
)


def draw(number: int, seed: int) -> tuple[Sample, torch.dtype, int]:
    """(sample, dtype, threads) of call `number`."""
    dice = _Dice(f"{seed} {number}")
    return KINDS[number % len(KINDS)](dice), dice.choice(KERNEL_DTYPES), dice.choice([1, 1, 2, 3, 7])


def call(number: int, seed: int) -> str | None:
    """What is wrong with call `number`; None where it is as the reference, or both refuse it."""
    sample, dtype, threads = draw(number, seed)
    torch.set_num_threads(threads)
    inputs = sample.inputs(dtype, seed=number)
    what = f"{sample.operator} {sample.name} {dtype} {threads} threads"
    print(what, file=sys.stderr, flush=True)  # what a child says last is in the report of its end
    try:
        ours = sample.results(inputs, backend="cpu")
    except (RuntimeError, ValueError, TypeError) as error:
        return _refused(sample, inputs, f"{what}: {error!r:.300}")
    with unguarded():
        plain, exact = (sample.results(i, backend="reference") for i in (inputs, widen(inputs)))
        for name, right in exact.items():
            found = compare(ours[name], plain[name], right, roundings=8)
            # Of terms that cancel in a small result, the roundings are those of the terms.
            terms = max([1.0, *(t.abs().nan_to_num(0, 0, 0).max().item() for t in (right, plain[name]) if t.numel())])
            slack = 32 * torch.finfo(ours[name].dtype).eps * terms
            if sample.operator.endswith("norm") and inputs["x"].shape[-1] <= 2:
                slack = max(slack, 1e-3)  # the gradient is nothing but what is left of terms
            if found.problem or not found.error <= found.bound + slack:
                return f"{what}: {name} {found}"
    return None


def _refused(sample: Sample, inputs: dict[str, Tensor], fault: str) -> str | None:
    with unguarded():
        try:
            sample.results(inputs, backend="reference")
        except (RuntimeError, ValueError, TypeError):
            return None
    return fault
