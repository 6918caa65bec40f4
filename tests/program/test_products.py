"""The step program's products against float64, for every way a weight is stored, at every instruction-set level.

Run as a script it checks the level of the process, for products of many shapes; the test runs it once a level.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from conftest import Isa
from torch import Tensor

from bigkernels.quantization.ggml import BLOCK_TYPES

_native = pytest.importorskip("bigkernels._native", reason="development builds only")

BLOCKS = {row.kind.name: row for row in BLOCK_TYPES.values() if row.kernels >= 0}  # of GGUF files
KINDS = ("f32", "bf16", "f16", "int8", "fp8", "affine4", "book4", "affine4m", "int8g", *BLOCKS)
PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
PACKED = ("affine4", "book4", "affine4m")
GROUPED = (*PACKED, "int8g")
INTEGERS = ("int8", "int8g", "affine4", "affine4m", *BLOCKS)  # what is multiplied as integers
EXACT, ROUNDED_8, ROUNDED_16 = 0, 1, 2


@dataclass
class Stored:
    """A weight for the kernels, the memory behind it, and its values in float64, with what they are differences of."""

    make: Callable[[], object]
    weight: object
    memory: list[Tensor]
    values: Tensor
    terms: Tensor
    panels: bool = False


def stored(kind: str, n: int, k: int, group: int = 0, transposed: bool = False, seed: int = 0) -> Stored:
    made = torch.Generator().manual_seed(seed)
    if kind in PLAIN:
        shape = (k, n) if transposed else (n, k)
        w = torch.randn(shape, generator=made, dtype=torch.float32).to(PLAIN[kind])
        make = partial(
            _native.Weight,
            *(KINDS.index(kind), n, k, w.data_ptr(), w.stride(0) * w.element_size()),
            transposed=transposed,
        )
        values = (w.T if transposed else w).double()
        return Stored(make, make(), [w], values, values.abs())
    if kind in BLOCKS:
        return blocks(kind, n, k, made)
    groups = -(-k // group) if group else 0
    row_scale = torch.tensor([0.25, 1, 4])[torch.arange(n) % 3].contiguous()
    book = torch.linspace(-1, 1, 16, dtype=torch.float32) ** 3
    book = book.bfloat16().float()  # what the pairs hold exactly
    scale = torch.rand(n, groups or 1, generator=made, dtype=torch.float32) + 0.1
    zero = 15 * torch.rand(n, groups or 1, generator=made, dtype=torch.float32)
    by = torch.arange(k) // group if group else torch.zeros(k, dtype=torch.int64)
    if kind in PACKED:
        codes = torch.randint(0, 16, (n, 2 * (-(-k // 2))), generator=made, dtype=torch.uint8)
        memory = codes[:, ::2] | codes[:, 1::2] << 4  # an odd row's last half byte holds what it likes
        codes = codes[:, :k]
        if kind == "book4":
            values = book.double()[codes.long()] * scale.double()[:, by]
            terms = values.abs()
        else:
            scale, zero = scale.half(), zero.half()
            values = codes.double()
            if kind == "affine4":
                zero_of, scale_of = zero.double()[:, by], scale.double()[:, by] * row_scale.double()[:, None]
                values, terms = (values - zero_of) * scale_of, (values + zero_of) * scale_of
            else:
                values = values * scale.double()[:, by] + zero.double()[:, by]
                terms = values
    else:
        memory = torch.randint(-128, 128, (n, k), generator=made, dtype=torch.int8)
        if kind == "fp8":
            memory[(memory & 127) == 127] = 5  # no NaN here
            values = memory.view(torch.float8_e4m3fn).double() * scale.double()
            terms = values.abs()
        else:
            scale = scale.half() if group else scale
            values, terms = memory.double() * scale.double()[:, by], (memory.double() + 256) * scale.double()[:, by]
    memory = torch.cat([memory.view(torch.uint8), torch.full((n, 3), 255, dtype=torch.uint8)], 1)  # rows lie apart
    tensors = [memory, scale.contiguous(), zero.contiguous(), row_scale, book]
    make = partial(
        _native.Weight,
        *(KINDS.index(kind), n, k, memory.data_ptr(), memory.stride(0), *(t.data_ptr() for t in tensors[1:]), group),
    )
    return Stored(make, make(), tensors, values, terms)


def blocks(kind: str, n: int, k: int, made: torch.Generator) -> Stored:
    """Blocks at random with sensible scales; k is rounded up to whole ones."""
    row = BLOCKS[kind]
    count = -(-k // row.block)
    raw = torch.randint(0, 256, (n * count, row.nbytes), generator=made, dtype=torch.uint8)
    for at in row.scales:
        scale = (torch.rand(n * count, generator=made, dtype=torch.float32) * 0.02 - 0.005).half()
        raw[:, at : at + 2] = scale[:, None].view(torch.uint8)
    values = row.decode(raw).double()
    without = raw.clone()
    if len(row.scales) > 1:
        without[:, row.scales[1] : row.scales[1] + 2] = 0
    scaled = row.decode(without).double()
    terms = (scaled.abs() + (values - scaled).abs()).view(n, -1)
    memory = torch.cat([raw.view(n, -1), torch.full((n, 3), 255, dtype=torch.uint8)], 1)  # rows lie apart
    make = partial(_native.Weight, row.kernels, n, count * row.block, memory.data_ptr(), memory.stride(0))
    return Stored(make, make(), [memory], values.view(n, -1), terms)


def product(w: Stored, x: Tensor, integers: int, ends: list[int] | None = None) -> Tensor:
    x = x.contiguous()
    out = torch.full((x.shape[0], w.values.shape[0]), torch.nan, dtype=torch.float32)
    _native.product(w.weight, integers, x.data_ptr(), x.shape[0], out.data_ptr(), ends or [w.values.shape[0]])
    return out


def in_panels(w: Stored, integers: int) -> Stored | None:
    """The same weight, with panels; None where it has none."""
    size = _native.panels(w.weight, integers)
    if not size:
        return None
    memory = torch.full((size + 128,), 255, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64
    other = copy.copy(w)
    other.weight, other.memory, other.panels = w.make(), [*w.memory, memory], True
    _native.panels(other.weight, integers, memory.data_ptr() + begin)
    assert (memory[:begin] == 255).all() and (memory[begin + size :] == 255).all()
    return other


def rounded(x: Tensor, kind: str, integers: int) -> Tensor:
    """The tokens that a product multiplies, in float64."""
    if kind in BLOCKS and integers != ROUNDED_8:
        return x.double()
    if kind == "bf16" or (integers and kind not in PLAIN and (integers == 2 or kind not in INTEGERS)):
        return x.bfloat16().double()
    if integers == 0 or kind in PLAIN:
        return x.double()
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    top = blocks.abs().amax(-1, keepdim=True)
    scale = top * torch.tensor(1 / 127, dtype=torch.float32)
    codes = (blocks * (torch.full_like(top, 127) / top).where(top > 0, 0)).round()
    return (codes.double() * scale.double()).flatten(1)[:, : x.shape[1]]


def expected(w: Stored, x: Tensor) -> tuple[Tensor, Tensor]:
    """The product, and what its terms add up to: the measure of its errors."""
    return x @ w.values.T, x.abs() @ w.terms.T


def check(kind: str, n: int, k: int, m: int, group: int, transposed: bool, integers: int, seed: int) -> None:
    w = stored(kind, n, k, group, transposed, seed)
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(m, w.values.shape[1], generator=made, dtype=torch.float32)
    y = product(w, x, integers)
    right, terms = expected(w, rounded(x, kind, EXACT if kind in BLOCKS else integers))
    wrong = (y.double() - right).abs() > 2e-6 * terms + 1e-30
    what = f"{kind} n {n} k {k} m {m} group {group} transposed {transposed} integers {integers}"
    check_panels(w, x, integers, *expected(w, rounded(x, kind, integers)), what, seed)
    assert not wrong.any(), f"{what}: {wrong.sum()} of {wrong.numel()}, {(y - right).abs().max()} off at {terms.max()}"
    if n > 1:
        cut = random.Random(seed).randint(1, n - 1)
        assert torch.equal(product(w, x, integers, [cut, n]), y), f"{what}: rows cut at {cut}"
    # Tokens do not see each other, where both products go the same way: up to 2, 3, 4 and 16 tokens, others may.
    part = (m // 3, m)
    if not any(part[1] - part[0] <= most < m for most in (1, 2, 3, 4, 16)):
        assert torch.equal(product(w, x[slice(*part)], integers), y[slice(*part)]), f"{what}: tokens {part}"


def check_panels(w: Stored, x: Tensor, integers: int, right: Tensor, terms: Tensor, what: str, seed: int):
    kept = in_panels(w, integers)
    if kept is None:
        return
    out = product(kept, x, integers)
    m, n = out.shape
    wrong = (out.double() - right).abs() > 2e-6 * terms + 1e-30
    assert not wrong.any(), f"panels, {what}: {wrong.sum()} of {wrong.numel()}, {(out - right).abs().max()} off"
    # Nor does it matter how many tokens there are, or where rows begin.
    for t in range(0, m, 5):
        assert torch.equal(product(kept, x[t : t + 1], integers), out[t : t + 1]), f"panels, {what}: token {t}"
    assert torch.equal(product(kept, x[m // 2 :], integers), out[m // 2 :]), f"panels, {what}: half of the tokens"
    if n > 1:
        cut = random.Random(seed).randint(1, n - 1)
        assert torch.equal(product(kept, x, integers, [cut, n]), out), f"panels, {what}: rows cut at {cut}"


def cases(seed: int, count: int):
    """For each kind: every number of tokens with a shape at random."""
    draw = random.Random(seed)
    tokens = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 33, 100)
    for kind in KINDS:
        for i in range(count // 3 if kind in BLOCKS else count):
            m = tokens[i % len(tokens)]
            n = draw.choice((1, 5, 15, 16, 17, 31, 48, 130, 144))
            k = draw.choice((1, 2, 31, 32, 33, 64, 95, 127, 128, 160, 257, 512, 513, 576, 700, 1056, 2047))
            group = draw.choice((32, 64, 128)) if kind in GROUPED else 0
            transposed = kind in PLAIN and draw.random() < 0.4
            yield kind, n, k, m, group, transposed, draw.choice((0, 1, 2)), draw.randrange(1 << 30)


def test_every_kind_is_right_at_every_level(isa: Isa) -> None:
    isa.script(__file__, "39")


def each_way(kind: str, integers: int, n: int = 20, k: int = 96) -> list[Stored]:
    """A weight as it is stored, and with panels."""
    w = stored(kind, n, k, 32 if kind in GROUPED else 0)
    return [w, *filter(None, [in_panels(w, integers)])]


def test_long_sums_are_as_accurate_as_torchs() -> None:
    """Many tokens of float32 numbers: not one chain of additions over a whole row."""
    made = torch.Generator().manual_seed(3)
    for kind, group, k in (("f32", 0, 4096), ("f32", 0, 2051), ("affine4", 64, 4096)):
        w = stored(kind, 40, k, group)
        if kind == "f32":
            w.memory[0].abs_()  # sums that grow
            w.values.abs_()
        x = torch.rand(70, k, generator=made, dtype=torch.float32)
        right = x.double() @ w.values.T
        theirs = (x @ w.values.float().T).double() - right
        for m in (20, 70):
            error = product(w, x[:m], EXACT).double() - right[:m]
            assert error.square().mean() <= 4 * theirs.square().mean() + 1e-30, (kind, k, m)
        assert torch.equal(product(w, x[:20], EXACT), product(w, x, EXACT)[:20]), (kind, k)


def test_values_that_are_not_finite_are_not_lost() -> None:
    for kind in KINDS:
        for integers in (0, 1, 2):
            for w, m in itertools.product(each_way(kind, integers), (1, 5)):
                for bad in (torch.inf, -torch.inf, torch.nan):
                    x = torch.ones(m, w.values.shape[1], dtype=torch.float32)
                    x[0, 40] = bad
                    y = product(w, x, integers)
                    zero = (w.values[:, 40] == 0) if bad != bad else torch.zeros(20, dtype=torch.bool)
                    assert not y[0][~zero].isfinite().any(), (kind, integers, m, bad)
                    assert y[1:].isfinite().all(), (kind, integers, m, bad)


def test_codes_with_integers_have_panels() -> None:
    for kind in KINDS:
        w = stored(kind, 20, 96, 32 if kind in GROUPED else 0)
        assert (_native.panels(w.weight, ROUNDED_8) > 0) == (kind in INTEGERS or (kind == "book4" and pairs())), kind
        assert bool(_native.panels(w.weight, EXACT)) == (kind in BLOCKS), kind


def pairs() -> bool:
    return torch.ops.bigkernels.cpu_isa() in ("avx512", "amx")


def test_small_and_zero_tokens() -> None:
    for kind in INTEGERS:
        for w, m in itertools.product(each_way(kind, 1), (1, 5)):
            k = w.values.shape[1]
            assert torch.equal(product(w, torch.zeros(m, k), 1), torch.zeros(m, 20))
            small = torch.randn(m, k, dtype=torch.float32) * 1e-25
            right, terms = expected(w, rounded(small, kind, 1 if w.panels or kind not in BLOCKS else EXACT))
            assert ((product(w, small, 1).double() - right).abs() <= 2e-6 * terms).all(), kind


def test_no_tokens_and_no_elements() -> None:
    for kind in KINDS:
        group = 32 if kind in GROUPED else 0
        w = stored(kind, 20, 64, group)
        assert product(w, torch.zeros(0, w.values.shape[1], dtype=torch.float32), 1).shape == (0, 20)
        nothing = product(stored(kind, 20, 0, group), torch.zeros(5, 0, dtype=torch.float32), 1)
        assert torch.equal(nothing, torch.zeros(5, 20)), kind


def test_forms_tell_which_tokens_may_be_shared() -> None:
    form = {kind: _native.product_form(stored(kind, 4, 64, 32 if kind in GROUPED else 0).weight, 1) for kind in KINDS}
    assert form["f32"] == form["f16"]
    for kind in PLAIN:  # of 4 to 16 tokens, those of columns are in another order
        assert _native.product_form(stored(kind, 4, 64, transposed=True).weight, 1) != form[kind]
    assert form["affine4"] == form["affine4m"]
    assert len({form["f32"], form["bf16"], form["int8"], form["int8g"], form["affine4"]}) == 5
    wide = _native.product_form(stored("affine4", 4, 64, 64).weight, 1)
    assert wide != form["affine4"]  # sums over other groups


def test_nan_codes_of_fp8() -> None:
    w = stored("fp8", 4, 64)
    w.memory[0].view(torch.int8)[1, 3] = 127
    for integers in (0, 1):
        for m in (1, 5):
            y = product(w, torch.ones(m, 64, dtype=torch.float32), integers)
            assert y[:, 1].isnan().all() and y[:, [0, 2, 3]].isfinite().all()


if __name__ == "__main__":
    for case in cases(int(sys.argv[2]) if len(sys.argv) > 2 else 1, int(sys.argv[1])):
        check(*case)
