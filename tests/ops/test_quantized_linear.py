"""Linear layers with quantized weights: the kernels against the reference in float64, by codes drawn at random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from products import check_product
from torch import Tensor

from bigkernels.ops import codes as kinds
from bigkernels.ops import quantized_linear as op
from bigkernels.ops.codes import INT8, Operands

KINDS = {row.name: row for row in kinds.KINDS.values() if row.has_kernels and not row.block}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

fwd, bwd = torch.ops.bigkernels.quantized_linear_fwd, torch.ops.bigkernels.quantized_linear_bwd


def weight(kind: str, n: int, k: int, group: int = 64) -> tuple:
    """What `Operands` hold, and k, as the operators take them."""
    row, groups = KINDS[kind], -(-k // group)

    def of(codes: Tensor, *args: Tensor, **more) -> tuple:
        return *Operands.of(row, codes, *args, **more), k

    if kind == "int8":
        return of(torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) / 100)
    if kind == "fp8":
        return of(torch.randn(n, k).mul(100).to(torch.float8_e4m3fn).view(torch.uint8), torch.rand(n) / 1000)
    if kind == "int8g":
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        return of(codes, (torch.rand(n, groups) / 100).half(), group=group)
    codes = torch.randint(0, 256, (n, (k + 1) // 2), dtype=torch.uint8)
    if kind == "affine4m":
        scale = torch.rand(n, groups) / 10
        return of(codes, scale.half(), zero=(scale * -torch.rand(n, groups) * 15).half(), group=group)
    if kind == "book4":
        return of(codes, torch.rand(n, groups) / 10, book=torch.randn(16), group=group)
    scale, zero = torch.rand(n, groups).half() + 0.5, (torch.rand(n, groups) * 15).half()
    return of(codes, scale, zero=zero, row_scale=2.0 ** torch.randint(-9, -4, (n,)), group=group)


def dense(operands: tuple) -> Tensor:
    return Operands(*operands[:-1]).decoded(operands[-1], torch.float64)


cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(sorted(KINDS)),
        "m": st.sampled_from([1, 2, 3, 5, 8, 9, 31, 33, 70, 600]),
        "n": st.sampled_from([1, 3, 7, 31, 64, 129, 200]),
        "k": st.sampled_from([1, 2, 31, 33, 64, 95, 128, 200, 515, 1100]),
        "group": st.sampled_from([32, 64, 128]),
        "dtype": st.sampled_from(list(DTYPES)),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


@given(cases)
@MANY
def test_forward(case):
    torch.manual_seed(case["seed"])
    dtype, operands = DTYPES[case["dtype"]], weight(case["kind"], case["n"], case["k"], case["group"])
    x = torch.randn(case["m"], case["k"]).to(dtype)
    bias = torch.randn(case["n"]).to(dtype) if case["bias"] else None
    w = dense(operands)
    exact = torch.nn.functional.linear(x.double(), w, None if bias is None else bias.double())
    plain = torch.nn.functional.linear(x, w.to(dtype), bias)
    check_product(fwd(x, *operands[:5], bias, *operands[5:], False), plain, exact, x.double().abs() @ w.abs().T)


@given(cases)
@MANY
def test_gradient_of_the_input(case):
    torch.manual_seed(case["seed"])
    dtype, operands = DTYPES[case["dtype"]], weight(case["kind"], case["n"], case["k"], case["group"])
    grad = torch.randn(case["m"], case["n"]).to(dtype)
    w = dense(operands)
    check_product(bwd(grad, *operands), grad @ w.to(dtype), grad.double() @ w, grad.double().abs() @ w.abs())


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_leading_dimensions(kind: str, m: int):
    operands = weight(kind, 24, 96)
    whole = torch.randn(m, 3, 200)
    for x in (whole[..., 5:101], whole.transpose(0, 1)[..., :96], whole[..., ::2][..., :96], whole[:, 0, :96]):
        found = fwd(x, *operands[:5], None, *operands[5:], False)
        assert found.shape == (*x.shape[:-1], 24) and found.is_contiguous()
        torch.testing.assert_close(found, (x.double() @ dense(operands).T).float(), rtol=1e-4, atol=1e-4)
        assert torch.equal(found, fwd(x.contiguous(), *operands[:5], None, *operands[5:], False))


@pytest.mark.parametrize("kind", KINDS)
def test_no_elements(kind: str):
    bias = torch.randn(5)
    operands = weight(kind, 5, 0)
    assert torch.equal(fwd(torch.randn(3, 0), *operands[:5], bias, *operands[5:], False), bias.expand(3, 5))
    assert bwd(torch.randn(3, 5), *operands).shape == (3, 0)
    operands = weight(kind, 5, 64)
    assert fwd(torch.randn(0, 64), *operands[:5], bias, *operands[5:], False).shape == (0, 5)
    operands = weight(kind, 0, 64)
    assert fwd(torch.randn(2, 64), *operands[:5], None, *operands[5:], False).shape == (2, 0)
    assert torch.equal(bwd(torch.randn(2, 0), *operands), torch.zeros(2, 64))


@pytest.mark.parametrize("m", [1, 4, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_every_code(kind: str, m: int):
    """One element a row of the weight, so that nothing hides a code that is read wrongly."""
    operands = list(weight(kind, 256, 33))
    codes = torch.arange(256, dtype=torch.uint8)
    if kind in ("int8", "fp8", "int8g"):
        operands[0] = codes.view(torch.uint8 if kind == "fp8" else torch.int8)[:, None].repeat(1, 33)
    else:
        operands[0] = codes[:, None].repeat(1, 17)
    w = dense(tuple(operands)).float()
    x = torch.eye(33)[:m] if m <= 33 else torch.eye(33).repeat(2, 1)[:m]
    found = fwd(x, *operands[:5], None, *operands[5:], False)
    expected = w.T[:m] if m <= 33 else w.T.repeat(2, 1)[:m]
    if kind == "fp8":  # a NaN times zero is one as well
        keep = ~w.isnan().any(1)
        assert found[:, ~keep].isnan().all()
        found, expected = found[:, keep], expected[:, keep]
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("m", [1, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_know_of_each_other(kind: str, m: int):
    """A NaN stays in its row, and rows of the same values get the same bits, wherever they are."""
    operands = weight(kind, 70, 200)
    x = torch.randn(1, 200).repeat(m, 1).bfloat16()
    found = fwd(x, *operands[:5], None, *operands[5:], False)
    assert torch.equal(found, found[:1].expand(m, -1))
    if m > 1:
        x[m // 2, 3] = float("nan")
        again = fwd(x, *operands[:5], None, *operands[5:], False)
        others = torch.arange(m) != m // 2
        assert again[m // 2].isnan().all() and torch.equal(again[others], found[others])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 65}, "rows of 65"),
        ({"codes": lambda t: t.short()}, "codes"),
        ({"scale": lambda t: t.double()}, "scale"),
        ({"scale": lambda t: t[:-1]}, "scale"),
        ({"codes": lambda t: t[..., None]}, "matrix"),
        ({"zero": lambda t: None}, "zero"),
        ({"group": 48}, "groups of 48"),
    ],
)
def test_operands_that_do_not_fit(change: dict, message: str):
    names = (*Operands._fields, "k")
    operands = dict(zip(names, weight("affine4", 10, 64), strict=True))
    for name, value in change.items():
        operands[name] = value(operands[name]) if callable(value) else value
    with pytest.raises(RuntimeError, match=message):
        fwd(torch.randn(2, 64), *list(operands.values())[:5], None, *list(operands.values())[5:], False)


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, m: int):
    operands = weight(kind, 40, 96)
    x, bias = torch.randn(m, 96), torch.randn(40)
    torch.library.opcheck(fwd.default, (x, *operands[:5], bias, *operands[5:], False))
    torch.library.opcheck(bwd.default, (torch.randn(m, 40), *operands))


@given(cases)
@MANY
def test_tokens_rounded_to_8_bits(case):
    """Integers are multiplied exactly: what differs from the reference is the rounding of the result."""
    torch.manual_seed(case["seed"])
    operands = weight("int8", case["n"], case["k"])
    x = (torch.randn(case["m"], case["k"]) * 10.0 ** torch.randint(-3, 3, (case["m"], 1))).to(DTYPES[case["dtype"]])
    bias = torch.randn(case["n"]).to(x.dtype) if case["bias"] else None
    found = fwd(x, *operands[:5], bias, *operands[5:], True)
    tokens, scale = op.round_tokens(x.float())
    exact = (tokens.double() @ dense(operands).T) * scale.double()
    exact = exact if bias is None else exact + bias.double()
    check_product(found, exact.to(x.dtype), exact, torch.zeros(()))


def test_every_product_of_8_bits():
    """Every code times every rounded token: no overflow, no saturation, at the longest row that is exact."""
    codes = torch.arange(-127, 128, dtype=torch.int8)[:, None].repeat(1, 512)
    x = torch.arange(-127, 128).float()[:, None].repeat(1, 512)
    x[:, 0] = 127.0  # so that the scale is 1
    found = fwd(x, codes, torch.ones(255), None, None, None, None, 0, INT8.number, 512, True)
    assert torch.equal(found, x @ codes.float().T)
    long = fwd(
        torch.full((2, 2**17), -3.0),
        torch.full((3, 2**17), -127, dtype=torch.int8),
        torch.ones(3),
        None,
        None,
        None,
        None,
        0,
        INT8.number,
        2**17,
        True,
    )
    torch.testing.assert_close(long, torch.full((2, 3), 3.0 * 127 * 2**17), rtol=1e-6, atol=0)


def test_tokens_of_zeros_and_of_no_number():
    operands = weight("int8", 40, 70)
    x = torch.randn(5, 70)
    x[0] = 0.0
    x[1, 3], x[2, 69], x[3] = float("nan"), float("inf"), 1e-44
    found = fwd(x, *operands[:5], None, *operands[5:], True)
    assert found[0].eq(0).all() and found[1:3].isnan().all() and found[3:].isfinite().all()
