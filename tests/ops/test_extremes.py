"""Infinities, NaN, huge and tiny values, masked vocabularies, long rows, and more elements than 32 bits count."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F

import bigkernels.functional as B
from bigkernels.ops._registry import KERNEL_DTYPES
from bigkernels.ops.glu import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("library")
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_the_ends_of_the_line(activation, dtype):
    big = torch.finfo(dtype).max
    values = torch.tensor([NAN, INF, -INF, big, -big, 0.0, -0.0, 200.0, -200.0, 1e-6], dtype=dtype)
    gate, up = values.clone().requires_grad_(), torch.ones_like(values)
    out = B.glu(gate, up, activation=activation)
    wide = values.double().requires_grad_()
    exact = ACTIVATIONS[activation](wide)
    exact_grad, grad = torch.autograd.grad(exact.sum(), wide)[0], torch.autograd.grad(out.sum(), gate)[0]
    for found, expected in ((out, exact.to(dtype)), (grad, exact_grad.to(dtype))):
        for value, f, e in zip(values.tolist(), found.tolist(), expected.tolist(), strict=True):
            # No value by the formula x * s(x) at -inf, and no slope at infinities and NaN: PyTorch gives NaN, 0 or 1.
            if value != -INF and (found is out or math.isfinite(value)):
                assert f == pytest.approx(e, rel=2e-2, abs=1e-6, nan_ok=True), (activation, value)
    assert out[0].isnan()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_nan_or_an_infinity_stays_in_its_row(dtype):
    x = torch.randn(4, 100).to(dtype)
    x[1, 7], x[2, 50] = NAN, INF
    w = torch.ones(100, dtype=dtype)
    for found, expected in (
        (B.rms_norm(x, w), F.rms_norm(x, (100,), w, 1e-6)),
        (B.layer_norm(x, w), F.layer_norm(x, (100,), w)),
    ):
        assert found[1].isnan().all() and found[2, 50].isnan()
        torch.testing.assert_close(found[[0, 3]], expected[[0, 3]], rtol=2e-2, atol=1e-5)


def test_norms_of_huge_and_tiny_rows():
    for scale in (1e-25, 1e-12, 1.0, 1e12):
        x = torch.randn(3, 333) * scale
        torch.testing.assert_close(B.rms_norm(x, eps=0.0), B.rms_norm(x.double(), eps=0.0).float() if scale > 1e-15 else
                                   B.rms_norm(x, eps=0.0), rtol=1e-5, atol=1e-5)  # fmt: skip
        torch.testing.assert_close(B.layer_norm(x, eps=0.0 if scale > 1e-15 else 1e-5),
                                   B.layer_norm(x.double(), eps=0.0 if scale > 1e-15 else 1e-5).float(),
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
    assert torch.equal(B.rms_norm(torch.zeros(2, 8)), torch.zeros(2, 8))
    assert torch.equal(B.layer_norm(torch.full((2, 8), 3.0)), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_layer_norm_of_rows_whose_first_values_mislead(dtype):
    """The kernel guesses the mean from the first values; here the guess is as wrong as can be."""
    x = torch.randn(4, 1000)
    x[:, :64] += 1000.0
    x = x.to(dtype)
    found, exact = B.layer_norm(x).double(), B.layer_norm(x.double())
    assert (found - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("masked", [slice(0, 2500), slice(100, None), slice(0, 16), slice(2048, 4096)])
def test_masked_vocabulary(masked, dtype):
    logits = torch.randn(3, 5000)
    logits[:, masked] = -INF
    keep = torch.ones(5000, dtype=torch.bool)
    keep[masked] = False
    target = keep.nonzero()[[0, 1, -1], 0]
    logits = logits.to(dtype).requires_grad_()
    loss = B.cross_entropy(logits, target, reduction="none")
    exact = F.cross_entropy(logits.detach().double(), target, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert (grad[:, masked] == 0).all() and grad.isfinite().all()


def test_logits_that_grow_along_the_row():
    """Each block's maximum exceeds the one before it, by far, and far down again."""
    logits = torch.randn(4, 20000) + torch.linspace(-500, 500, 20000)
    logits[2:] = logits[2:].flip(1)
    logits[3, 9000] = 2e4
    logits.requires_grad_()
    target = torch.tensor([19999, 5, 0, 9000])
    loss = B.cross_entropy(logits, target, reduction="none")
    exact_logits = logits.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_logits, target, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-4)
    (grad,), (exact_grad,) = torch.autograd.grad(loss.sum(), logits), torch.autograd.grad(exact.sum(), exact_logits)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-5)


def test_a_confident_token_keeps_the_digits_of_its_gradient():
    for margin in (5.0, 8.0, 12.0):
        logits = torch.zeros(1, 3)
        logits[0, 1] = margin
        leaves = logits.clone().requires_grad_(), logits.double().requires_grad_()
        ours, exact = (torch.autograd.grad(B.cross_entropy(x, torch.tensor([1])), x)[0] for x in leaves)
        # 1 - p is e^-margin, and the sum of the exponentials, near 1, holds it to 2^-24.
        assert ((ours.double() - exact) / exact).abs().max() < 2**-23 * math.exp(margin)


def test_no_row_is_written_outside_its_view():
    base = torch.zeros(6, 40)
    x = base[:, :33]
    x.normal_()
    before = base.clone()
    B.rms_norm(x, torch.ones(33)), B.layer_norm(x), B.glu(x, x), B.cross_entropy(x, torch.zeros(6, dtype=torch.int64))
    assert torch.equal(base, before)


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 20e9:
        pytest.skip("needs 20 GB of free memory")
    rows = (1 << 31) // 2048 + 3
    x = torch.zeros(rows, 2048, dtype=torch.bfloat16)
    x[-1] = torch.randn(2048)
    assert torch.equal(B.rms_norm(x)[-1], B.rms_norm(x[-1:].clone())[0])
    assert torch.equal(B.glu(x, x)[-1], B.glu(x[-1:].clone(), x[-1:].clone())[0])
    target = torch.zeros(rows, dtype=torch.int64)
    assert B.cross_entropy(x, target, reduction="none")[-1] == B.cross_entropy(x[-1:].clone(), target[:1])
