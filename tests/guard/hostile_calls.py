"""Valid calls of raw operators with one argument, or two, made wrong in shape, dtype, strides, device or number.

An operator may raise, or return whatever it likes; it must not read or write outside of what it was given.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import torch
from raw_calls import recorded
from torch import Tensor

from bigkernels._samples import SAMPLES
from bigkernels.ops.registry import KERNEL_DTYPES

_DTYPES = (
    *KERNEL_DTYPES,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
_INTEGERS = (-(2**63), -(2**40), -(2**31), -2, -1, 0, 1, 2, 3, 7, 31, 32, 64, 128, 4097, 2**31 - 1, 2**31, 2**40, 2**62,
             2**63 - 1)  # fmt: skip
_FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1.0, 1e-300, 1e38, 1e308)

Call = tuple[Callable, tuple]


def calls(seed: int, samples: int = 5) -> list[Call]:
    """Raw calls, forward and backward, of some samples of each operator, and of the operators without samples."""
    dice = random.Random(seed)
    found: list[Call] = []
    for of_operator in SAMPLES.values():
        for sample in dice.sample(of_operator, min(samples, len(of_operator))):
            found += recorded(sample, sample.inputs(dice.choice(KERNEL_DTYPES)), "cpu")
    ops = torch.ops.bigkernels
    x, weight = torch.randn(1000), torch.randn(70, 129)
    codes, scale = ops.compress(x, False, False, 0)
    found += [
        (ops.compress.default, (x, True, True, 5)),
        (ops.decompress.default, (codes, scale, False, torch.bfloat16)),
        (ops.linear_pack.default, (weight, torch.float32)),
        (ops.linear_fwd.default, (torch.randn(40, 129), weight, None, ops.linear_pack(weight, torch.float32))),
    ]
    return found


def call(number: int, seed: int, valid: list[Call]) -> str | None:
    """Make call `number`. What it may not do kills the process, or is seen by the allocator."""
    dice = random.Random(f"{seed} {number}")
    function, given = dice.choice(valid)
    declared = function._schema.arguments
    given = (*given, *(d.default_value for d in declared[len(given) :]))  # the dispatcher leaves defaults out
    arguments = [
        a.clone() if isinstance(a, Tensor) and d.alias_info else a for a, d in zip(given, declared, strict=True)
    ]
    changed = []
    for _ in range(dice.choice([1, 1, 1, 2])):
        at = dice.randrange(len(arguments))
        name, make = dice.choice(list(_wrong(arguments[at], given, dice)))
        arguments[at] = make()
        changed.append(f"{declared[at].name}: {name}")
    print(f"{function.name()} with {', '.join(changed)}", file=sys.stderr, flush=True)  # of its end, where it has one
    with suppress(Exception):  # refusing is what is asked for
        function(*arguments)
    return None


def _wrong(value: object, given: tuple, dice: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, how it is made) of values that may be wrong in the place of one."""
    if isinstance(value, Tensor):
        yield from _wrong_tensors(value)
        yield from _wrong_values(value, dice)
    elif isinstance(value, bool):
        yield str(not value), lambda: not value
    elif isinstance(value, (int, float, torch.dtype)):
        others = _INTEGERS if isinstance(value, int) else _FLOATS if isinstance(value, float) else _DTYPES
        yield from ((str(v), partial(_same, v)) for v in others)
    else:
        yield "one number", lambda: torch.ones(1)
        yield "four numbers", lambda: torch.ones(4)
        yield "two integers", lambda: torch.ones(2, dtype=torch.int32)
        yield "as the first", lambda: given[0]


def _same(value: object) -> object:
    return value


def _wrong_tensors(t: Tensor) -> Iterator[tuple[str, Callable[[], Tensor | None]]]:
    yield "none", lambda: None
    yield "on meta", lambda: t.to("meta")
    yield "a scalar", lambda: torch.zeros((), dtype=t.dtype)
    yield "empty", lambda: torch.empty(0, dtype=t.dtype)
    yield "one dimension more", lambda: t[None]
    yield "expanded", lambda: torch.zeros((1,) * t.dim(), dtype=t.dtype).expand(t.shape)
    yield "every second", lambda: torch.stack((t, t), -1)[..., 0]
    if t.numel():
        yield "odd offset", lambda: torch.cat((t.reshape(-1)[:1], t.reshape(-1)))[1:].view(t.shape)
    for d, size in enumerate(t.shape):
        yield f"twice in {d}", partial(lambda d: torch.cat((t, t), d), d)
        for n in sorted({0, 1, size // 2, size - 1} & set(range(size))):
            yield f"{n} of {size} in {d}", partial(lambda d, n: t.narrow(d, 0, n).clone(), d, n)
        if size:
            yield f"expanded in {d}", partial(lambda d: t.narrow(d, 0, 1).clone().expand(t.shape), d)
            yield f"without {d}", partial(lambda d: t.select(d, 0).clone(), d)
    if t.dim() > 1:
        yield "transposed", lambda: t.transpose(0, -1).clone()
        yield "other strides", lambda: t.transpose(0, -1).contiguous().transpose(0, -1)
    yield from ((f"as {dtype}", partial(t.to, dtype)) for dtype in _DTYPES if dtype != t.dtype)


def _wrong_values(t: Tensor, dice: random.Random) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    if t.is_floating_point():
        most = torch.finfo(t.dtype).max
        values: tuple = (*(v for v in _FLOATS if not abs(v) < float("inf") or abs(v) <= most), most)
    elif t.dtype in (torch.int32, torch.int64):
        values = (-1, 1, 2, 5, 17, 1000, 2**31 - 1, -(2**31))
        yield "reversed", lambda: t.flip(0)
    else:
        values = (True, False) if t.dtype == torch.bool else (0, 1, 127)

    def one(value):
        changed = t.clone(memory_format=torch.contiguous_format)
        changed.view(-1)[dice.randrange(t.numel())] = value
        return changed

    for value in values:
        yield f"all {value}", partial(torch.full_like, t, value)
        if t.numel():
            yield f"one {value}", partial(one, value)
