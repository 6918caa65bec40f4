"""Loaders refill their buffers before backward ran: gradients are those of what forward was given."""

from __future__ import annotations

import pytest
import torch

import bigkernels.functional as B

pytestmark = pytest.mark.usefixtures("library")
TOKENS, VOCABULARY, SIZE = 70, 40, 33


def _labels() -> torch.Tensor:
    return torch.randint(VOCABULARY, (TOKENS,))


def _packed(x, buffers, **options):
    return B.varlen_attention(x, x, x, buffers["starts"], buffers["starts"], TOKENS, TOKENS, **options)


def _distilled(x, w, buffers, **options):
    topk = buffers["log_p"], buffers["classes"]
    return B.linear_distillation(x, w, teacher_topk=topk, mask=buffers["mask"], reduction="none", **options)


def _loss(function, **options):
    def run(x, w, buffers):
        return function(x, w, buffers["target"], token_weight=buffers["token_weight"], **options)

    return run


LABELS = {"target": _labels, "token_weight": lambda: torch.rand(TOKENS)}
# name: (loss of (x, w, buffers), the buffers, and what a loader puts into them before backward)
CASES = {
    "cross_entropy": (lambda x, w, b: B.cross_entropy(x @ w.T, b["target"], token_weight=b["token_weight"]), LABELS),
    "linear_cross_entropy": (_loss(B.linear_cross_entropy), LABELS),
    "linear_cross_entropy, none": (_loss(B.linear_cross_entropy, reduction="none"), LABELS),
    "linear_cross_entropy, in chunks": (
        _loss(B.linear_cross_entropy, reduction="none", label_smoothing=0.1, softcap=9.0),
        LABELS,
    ),
    "linear_logprobs": (
        lambda x, w, b: torch.stack(B.linear_logprobs(x, w, b["target"], return_entropy=True)),
        {"target": _labels},
    ),
    "linear_distillation": (
        _distilled,
        {
            "mask": lambda: torch.rand(TOKENS) < 0.6,
            "log_p": lambda: torch.randn(TOKENS, 3) - 9,
            "classes": lambda: torch.rand(TOKENS, VOCABULARY).topk(3).indices,
        },
    ),
    "varlen_attention": (
        lambda x, w, b: _packed(x.view(TOKENS, 1, SIZE), b, prefix_lengths=b["prefix"], causal=True),
        {
            "starts": lambda: torch.tensor([0, 9, 40, TOKENS], dtype=torch.int32),
            "prefix": lambda: torch.tensor([3, 5, 1], dtype=torch.int32),
        },
    ),
    "attention": (
        lambda x, w, b: B.attention(*[x.view(2, 1, TOKENS // 2, SIZE)] * 3, prefix_lengths=b["prefix"], causal=True),
        {"prefix": lambda: torch.tensor([3, 5], dtype=torch.int32)},
    ),
}
WAYS = {
    "numpy": lambda t, values: t.numpy().__setitem__(..., values.numpy()),
    "data": lambda t, values: t.data.copy_(values),
    "in place": lambda t, values: t.copy_(values),
}
REFILLS = {
    "padding": lambda t: torch.full_like(t, -100) if t.dtype == torch.int64 else torch.zeros_like(t),
    "out of range": lambda t: torch.full_like(t, 2**30) if not t.is_floating_point() else torch.full_like(t, 1e30),
    "another batch": lambda t: t.flip(0),
}


@pytest.mark.parametrize("refill", REFILLS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_what_forward_was_given(name: str, way: str, refill: str) -> None:
    loss_of, make = CASES[name]
    buffers = {key: fill() for key, fill in make.items()}
    x, w = torch.randn(TOKENS, SIZE), torch.randn(VOCABULARY, SIZE)

    def gradients(buffers, before_backward):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = loss_of(*leaves, buffers)
        before_backward()
        return torch.autograd.grad(loss.sum(), leaves, allow_unused=True)

    expected = gradients({key: t.clone() for key, t in buffers.items()}, lambda: None)
    given = {key: t.clone() for key, t in buffers.items()}

    def refilled():
        for t in given.values():
            WAYS[way](t, REFILLS[refill](t))

    for ours, right in zip(gradients(given, refilled), expected, strict=True):
        assert right is None or torch.equal(ours, right)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_gradients_are_those_of_what_forward_was_given(name: str) -> None:
    loss_of, make = CASES[name]
    buffers = {key: fill() for key, fill in make.items()}
    tensors = torch.randn(TOKENS, SIZE), torch.randn(VOCABULARY, SIZE)

    def penalty(buffers, before_backward):
        x, w = (t.clone().requires_grad_() for t in tensors)
        loss = loss_of(x, w, buffers).square().sum()
        before_backward()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    expected = penalty({key: t.clone() for key, t in buffers.items()}, lambda: None)
    found = penalty(buffers, lambda: [t.numpy().__setitem__(..., t.flip(0).numpy()) for t in buffers.values()])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("label", [-100, 3])
def test_a_second_backward_is_of_the_same_labels(label: int) -> None:
    x, w = (torch.randn(n, SIZE, requires_grad=True) for n in (TOKENS, VOCABULARY))
    target = _labels()
    loss = B.linear_cross_entropy(x, w, target)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    target.numpy()[:] = label
    for ours, right in zip(torch.autograd.grad(loss, (x, w)), first, strict=True):
        assert torch.equal(ours, right)
