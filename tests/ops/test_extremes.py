"""Infinities, NaN, huge and tiny values, masked vocabularies, long rows, and more elements than 32 bits count."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F

import bigkernels
import bigkernels.functional as B
from bigkernels.ops.activations import ACTIVATIONS
from bigkernels.ops.registry import KERNEL_DTYPES

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
        torch.testing.assert_close(
            B.rms_norm(x, eps=0.0),
            B.rms_norm(x.double(), eps=0.0).float() if scale > 1e-15 else B.rms_norm(x, eps=0.0),
            rtol=1e-5,
            atol=1e-5,
        )
        torch.testing.assert_close(
            B.layer_norm(x, eps=0.0 if scale > 1e-15 else 1e-5),
            B.layer_norm(x.double(), eps=0.0 if scale > 1e-15 else 1e-5).float(),
            rtol=1e-5,
            atol=1e-5,
        )
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


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64])
def test_relu_passes_the_gradient_on_at_nan(dtype):
    x = torch.tensor([NAN, -1.0, -0.0, 0.0, 1e-40, INF, -INF, 3.0] * 3, dtype=dtype)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    B.glu(ours, torch.ones_like(x), activation="relu").sum().backward()
    F.relu(plain).sum().backward()
    assert torch.equal(ours.grad, plain.grad)


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64])
def test_gated_units_of_scalars(dtype):
    gate, up = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (0.5, -2.0))
    out = B.glu(gate, up)
    out.backward()
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    exact = F.silu(wide[0]) * wide[1]
    exact.backward()
    assert out.shape == gate.grad.shape == () and out.dtype == dtype
    for ours, right in ((out, exact), (gate.grad, wide[0].grad), (up.grad, wide[1].grad)):
        assert ours.item() == pytest.approx(right.item(), rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64])
def test_an_offset_without_a_weight_scales_by_one(dtype):
    x = torch.randn(3, 70).to(dtype)
    with_offset, without = x.clone().requires_grad_(), x.clone().requires_grad_()
    given = torch.randn(3, 70).to(dtype)
    y, expected = B.rms_norm(with_offset, None, offset=1.0), B.rms_norm(without)
    assert torch.equal(y, expected)
    torch.testing.assert_close(y, F.rms_norm(x, (70,), eps=1e-6))
    y.backward(given)
    expected.backward(given)
    assert torch.equal(with_offset.grad, without.grad)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("queries", [1, 5, 50])
def test_windows_longer_than_any_sequence_are_none(queries, backend):
    tensors = torch.randn(1, 4, queries, 32), torch.randn(1, 2, 50, 32), torch.randn(1, 2, 50, 32)
    cache, length = torch.randn(1, 50, 2, 32), torch.tensor([50], dtype=torch.int32)
    starts = (torch.tensor([0, queries], dtype=torch.int32), torch.tensor([0, 50], dtype=torch.int32), queries, 50)

    def run(window):
        q, k, v = (t.clone().requires_grad_() for t in tensors)
        out = B.attention(q, k, v, window=window)
        packed = B.varlen_attention(*(t[0].transpose(0, 1) for t in (q, k, v)), *starts, window=window)
        decoded = B.decode_attention(tensors[0], cache, cache, length, window=window)
        return out, packed, decoded, *torch.autograd.grad((out.square().sum(), packed.square().sum()), (q, k, v))

    with bigkernels.use(backend):
        for plain in ((-1, -1), (-1, 3), (2, -1)):
            expected = run(plain)
            for end in (2**30, 2**31 - 1, 2**31, 2**62, 2**63 - 40, 2**63 - 1):
                given = tuple(end if w == -1 else w for w in plain)
                assert all(torch.equal(a, b) for a, b in zip(run(given), expected, strict=True)), given


@pytest.mark.parametrize("end", [2**40, 2**62, 2**63 - 40, 2**63 - 1, -2, -(2**63)])
def test_windows_of_raw_operators_do_not_overflow(end):
    q, k, v = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 50, 32), torch.randn(1, 2, 50, 32)

    def run(left, right):
        return torch.ops.bigkernels.attention(q, k, v, *[None] * 6, left, right, 1.0, 0.0, 0.0)

    for left, right in ((end, end), (end, 3), (2, end)):
        assert torch.equal(run(left, right), run(*(-1 if w == end else w for w in (left, right))))


def test_lengths_that_32_bits_do_not_hold_do_not_wrap_around():
    q, k = torch.randn(2, 1, 9, 8), torch.randn(2, 1, 9, 8)
    prefix = torch.tensor([2**32, 2**40 + 3])
    assert torch.equal(B.attention(q, k, k, causal=True, prefix_lengths=prefix), B.attention(q, k, k))
    starts = torch.tensor([0, 2**32 + 9])
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        B.varlen_attention(q[0].transpose(0, 1), *[k[0].transpose(0, 1)] * 2, starts, starts, 9, 9)


@pytest.mark.parametrize("softcap", [INF, NAN, 1e300, 1e-320, -INF])
def test_softcaps_that_are_none_in_float32_are_refused(softcap):
    x, w, target = torch.randn(3, 8), torch.randn(11, 8), torch.tensor([0, 5, 10])
    q, cache = torch.randn(1, 2, 1, 8), torch.randn(1, 4, 2, 8)
    for call in (
        lambda: B.cross_entropy(x, target.clamp(max=7), softcap=softcap),
        lambda: B.linear_cross_entropy(x, w, target, softcap=softcap),
        lambda: B.attention(q, q, q, softcap=softcap),
        lambda: B.decode_attention(q, cache, cache, torch.tensor([2], dtype=torch.int32), softcap=softcap),
    ):
        with pytest.raises((ValueError, RuntimeError), match="softcap|out of (its )?range"):
            call()
