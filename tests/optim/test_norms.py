"""Norms and clipping outside of a step, against torch's."""

from __future__ import annotations

import math

import pytest
import torch

from bigkernels import optim
from bigkernels.optim import clip_grad_norm_, clip_grad_value_, get_total_norm

NORMS = (0.0, 0.5, 1.0, 2.0, 3.0, math.inf, -math.inf)


def parameters(dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64)) -> list[torch.nn.Parameter]:
    shapes = ((70, 80), (5,), (), (0,), (40_000,), (3, 4, 5), (1,))
    found = []
    for i, shape in enumerate(shapes):
        p = torch.nn.Parameter(torch.zeros(shape, dtype=dtypes[i % len(dtypes)]))
        p.grad = torch.randn(shape).to(p.dtype)
        found.append(p)
    found.append(torch.nn.Parameter(torch.zeros(3)))  # without a gradient
    strided = torch.nn.Parameter(torch.zeros(20, 30))
    strided.grad = torch.randn(30, 40).T[::2]
    return [*found, strided]


@pytest.mark.parametrize("p", NORMS)
def test_the_norm_is_that_of_one_vector(p: float) -> None:
    grads = [q.grad for q in parameters() if q.grad is not None and (q.numel() or p != -math.inf)]
    whole = torch.cat([g.double().reshape(-1) for g in grads])
    assert get_total_norm(grads, p).item() == pytest.approx(torch.linalg.vector_norm(whole, p).item(), rel=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e6])
def test_clipping_is_torchs(p: float, largest: float) -> None:
    def made() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        # torch's largest magnitude of nothing is an error.
        return [q for q in parameters((torch.float32,)) if q.numel() or p != math.inf]

    ours, theirs = made(), made()
    for q in theirs:  # torch's float32 sums depend on where tensors lie
        q.data, q.grad = q.data.double(), None if q.grad is None else q.grad.double()
    found, expected = clip_grad_norm_(ours, largest, p), torch.nn.utils.clip_grad_norm_(theirs, largest, p)
    torch.testing.assert_close(found, expected.to(found.dtype))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, None if b.grad is None else b.grad.float())


def test_clipping_of_many_dtypes() -> None:
    params = parameters()
    before = [None if q.grad is None else q.grad.double() for q in params]
    norm = clip_grad_norm_(params, 0.5)
    assert norm.dtype == torch.float64
    for q, g in zip(params, before, strict=True):
        if g is not None:
            eps = torch.finfo(q.grad.dtype).eps
            torch.testing.assert_close(q.grad.double(), g * (0.5 / norm), rtol=2 * eps, atol=1e-7)
    assert get_total_norm([q.grad for q in params if q.grad is not None]).item() == pytest.approx(0.5, rel=1e-2)


def test_edges() -> None:
    assert get_total_norm([]) == 0.0 and clip_grad_norm_([], 1.0) == 0.0
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([3.0, 4.0, 0.0])
    assert clip_grad_norm_(p, 10.0) == 5.0 and torch.equal(p.grad, torch.tensor([3.0, 4.0, 0.0]))
    for bad in (math.inf, math.nan):
        p.grad = torch.tensor([1.0, bad, 0.0])
        for order in (2.0, math.inf, 3.0):
            assert not get_total_norm([p.grad], order).isfinite()
            kept = p.grad.clone()
            with pytest.raises(RuntimeError, match="not finite"):
                clip_grad_norm_(p, 1.0, order, error_if_nonfinite=True)
            torch.testing.assert_close(p.grad, kept, equal_nan=True)
    with pytest.raises(ValueError, match="norm_type"):
        get_total_norm([p.grad], math.nan)


def test_large_gradients_do_not_overflow_the_sum() -> None:
    g = torch.full((1000,), 1e18)
    assert get_total_norm([g]).item() == pytest.approx(1e18 * math.sqrt(1000), rel=1e-6)


def test_sparse_gradients() -> None:
    table = torch.nn.Embedding(20, 6, sparse=True)
    (table(torch.tensor([1, 3, 3])) * torch.arange(6.0)).sum().backward()
    dense = table.weight.grad.to_dense()
    norm = clip_grad_norm_(table.parameters(), 1.0)
    assert norm.item() == pytest.approx(dense.norm().item())
    torch.testing.assert_close(table.weight.grad.to_dense(), dense / (norm + 1e-6))


def test_values() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([-3.0, 0.5, 3.0, 1.0])
    clip_grad_value_([p], 1.0)
    assert torch.equal(p.grad, torch.tensor([-1.0, 0.5, 1.0, 1.0]))
    with pytest.raises(ValueError, match="clip_value"):
        clip_grad_value_([p], 0.0)


def test_the_optimizers_norm_is_the_same() -> None:
    params = parameters((torch.float32, torch.bfloat16))
    optimizer = optim.SGD(params, lr=0.0, max_grad_norm=1.0)
    optimizer.step()
    expected = get_total_norm([q.grad for q in params if q.grad is not None])
    assert optimizer.grad_norm.item() == pytest.approx(expected.item(), rel=1e-7)
    double = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    double.grad = torch.full((4,), 2.0, dtype=torch.float64)
    mixed = optim.SGD([*params, double], lr=0.0, max_grad_norm=1.0)
    mixed.step()
    assert mixed.grad_norm.item() == pytest.approx(math.hypot(expected.item(), 4.0), rel=1e-6)
