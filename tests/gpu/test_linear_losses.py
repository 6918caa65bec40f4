"""Losses of a linear layer's outputs on a GPU: values, gradients, memory, and what the host waits for."""

from __future__ import annotations

import pytest
import torch
from heads import logits, make
from torch import Tensor
from torch.nn import functional as F

from bigkernels import functional
from bigkernels._compare import compare_all
from bigkernels.ops import _chunks

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100


def given(tokens, vocabulary, size, dtype=torch.bfloat16, ignored=0.2):
    inputs = [t.to(DEVICE) for t in make(tokens, vocabulary, size, dtype)]
    target = torch.randint(vocabulary, (tokens,), device=DEVICE)
    return inputs, torch.where(torch.rand(tokens, device=DEVICE) < ignored, IGNORED, target)


def results(fn, inputs, upstream) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = fn(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    grads = torch.autograd.grad(out, leaves, [u.to(o.dtype) for u, o in zip(upstream, out, strict=True)])
    return {f"output {i}": o.detach() for i, o in enumerate(out)} | {f"gradient {i}": g for i, g in enumerate(grads)}


def check(ours, formula, inputs, upstream, roundings=2.0):
    """`formula` in the dtype of the inputs and in float64, as `bigkernels._compare` has it."""
    found, plain = results(ours, inputs, upstream), results(formula, inputs, upstream)
    exact = results(formula, [t.double() for t in inputs], upstream)
    compared = compare_all(found, plain, exact, roundings=roundings, scale="row")
    wrong = {name: str(c) for name, c in compared.items() if not c.ok}
    assert not wrong


def cross_entropy(target, *, reduction="mean", softcap=None, scale=1.0, **options):
    def formula(h, w, b):
        z = logits(h, w, b, scale, softcap)
        return F.cross_entropy(z, target, ignore_index=IGNORED, reduction=reduction, **options)

    def ours(h, w, b):
        named = {"class_weight" if k == "weight" else k: v for k, v in options.items()}
        return functional.linear_cross_entropy(
            h, w, target, b, reduction=reduction, softcap=softcap, logit_scale=scale, **named
        )

    return ours, formula


@pytest.fixture(params=[None, 64], ids=["one chunk", "chunks of 64"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(_chunks, "chunk_rows", lambda *_: request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 37, 8), (200, 1000, 64), (300, 50257, 128), (70, 32000, 256)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(sizes, dtype, reduction, chunks):
    inputs, target = given(*sizes, dtype, ignored=0.2 if sizes[0] > 1 else 0.0)
    up = torch.rand(sizes[:1] if reduction == "none" else (), device=DEVICE) + 0.5
    check(*cross_entropy(target, reduction=reduction), inputs, [up])


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1}, {"softcap": 5.0}, {"scale": 0.3}, {"weight": True}], ids=str
)
def test_cross_entropy_options(options, chunks):
    inputs, target = given(200, 1000, 64)
    if "weight" in options:
        options = {"weight": torch.rand(1000, device=DEVICE)}
    ours, formula = cross_entropy(target, **options)
    if "weight" in options:  # F.cross_entropy wants one dtype
        formula = lambda h, w, b: F.cross_entropy(  # noqa: E731
            logits(h, w, b), target, options["weight"].to(torch.promote_types(h.dtype, torch.float32))
        )
    check(ours, formula, inputs, [torch.ones((), device=DEVICE)])


@pytest.mark.parametrize("ignore_index", [-1, 0, 999, 5000])
def test_any_index_may_be_ignored(ignore_index):
    """One outside the vocabulary must not make the gradient of the weight NaN."""
    inputs, target = given(200, 1000, 64, ignored=0.0)
    target[::3] = ignore_index

    def run(fn):
        leaves = [t.detach().requires_grad_() for t in inputs]
        loss = fn(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves)]

    ours = run(lambda h, w, b: functional.linear_cross_entropy(h, w, target, b, ignore_index=ignore_index))
    expected = run(lambda h, w, b: F.cross_entropy(F.linear(h, w, b).float(), target, ignore_index=ignore_index))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.01 * b.abs().max().item())


def test_ignored_tokens_are_not_read():
    inputs, target = given(100, 1000, 64)
    bias = inputs[2].clone()
    leaves = [t.detach().requires_grad_() for t in inputs]
    loss = functional.linear_cross_entropy(
        leaves[0] * torch.where(target == IGNORED, 1e30, 1)[:, None], leaves[1], target, leaves[2]
    )
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves[1:]))
    assert torch.equal(bias, inputs[2])


def logprobs(target, temperature, softcap):
    def formula(h, w, b):
        log_p = logits(h, w, b, 1.0, softcap, temperature).log_softmax(-1)
        of_target = log_p.gather(1, target.clamp_min(0)[:, None])[:, 0]
        return tuple(torch.where(target < 0, 0, v) for v in (of_target, -(log_p.exp() * log_p).sum(-1)))

    def ours(h, w, b):
        return functional.linear_logprobs(
            h, w, target, b, temperature=temperature, softcap=softcap, return_entropy=True
        )

    return ours, formula


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [(1.0, None), (0.7, 5.0)], ids=str)
@pytest.mark.parametrize("sizes", [(200, 1000, 64), (70, 50257, 128)], ids=str)
def test_logprobs(sizes, options, dtype, chunks):
    inputs, target = given(*sizes, dtype)
    check(*logprobs(target, *options), inputs, [torch.randn(sizes[0], device=DEVICE) for _ in range(2)])


def distillation(teacher, target, kind, temperature):
    hidden, weight, _ = teacher

    def formula(h, w, b):
        log_q = (logits(h, w, b) / temperature).log_softmax(-1)
        log_p = (logits(hidden.to(h.dtype), weight.to(h.dtype), None) / temperature).log_softmax(-1)
        if kind == "jsd":
            log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
            loss = ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
        else:
            first, second = (log_p, log_q) if kind == "forward_kl" else (log_q, log_p)
            loss = (first.exp() * (first - second)).sum(-1)
        return torch.where(target < 0, 0, loss).sum() / (target >= 0).sum()

    def ours(h, w, b):
        return functional.linear_distillation(
            h, w, target, b, teacher_hidden=hidden, teacher_weight=weight, divergence=kind, temperature=temperature
        )

    return ours, formula


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_distillation(kind, dtype, chunks):
    inputs, target = given(200, 5000, 64, dtype)
    check(*distillation(given(200, 5000, 96, dtype)[0], target, kind, 1.5), inputs, [torch.ones((), device=DEVICE)])


def calls() -> dict:
    inputs, target = given(512, 4096, 128)
    teacher = given(512, 4096, 64)[0]
    return {
        "cross_entropy": (cross_entropy(target)[0], inputs),
        "cross_entropy of each token": (cross_entropy(target, reduction="none")[0], inputs),
        "logprobs": (logprobs(target, 1.0, None)[0], inputs),
        "distillation": (distillation(teacher, target, "jsd", 1.0)[0], inputs),
    }


CALLS = ("cross_entropy", "cross_entropy of each token", "logprobs", "distillation")


def step(fn, leaves) -> list[Tensor]:
    out = fn(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    return [*(o.detach() for o in out), *torch.autograd.grad(sum(o.sum() for o in out), leaves)]


@pytest.mark.parametrize("name", CALLS)
def test_never_waits_for_the_device_and_repeats(name, chunks):
    fn, inputs = calls()[name]
    leaves = [t.detach().requires_grad_() for t in inputs]
    first = step(fn, leaves)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step(fn, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", CALLS)
def test_cuda_graph(name):
    fn, inputs = calls()[name]
    leaves = [t.detach().requires_grad_() for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(fn, leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(fn, leaves)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    assert all(map(torch.equal, captured, step(fn, leaves)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_over_chunks_is_in_float32(dtype, monkeypatch):
    """All terms of one sign: a sum in 16 bits would stop growing."""
    monkeypatch.setattr(_chunks, "chunk_rows", lambda *_: 32)
    hidden, weight = torch.ones(8192, 16, device=DEVICE, dtype=dtype), torch.zeros(64, 16, device=DEVICE, dtype=dtype)
    target = torch.zeros(8192, dtype=torch.int64, device=DEVICE)
    weight.requires_grad_()
    functional.linear_cross_entropy(hidden, weight, target, reduction="sum").backward()
    torch.testing.assert_close(weight.grad[1].float(), torch.full((16,), 8192 / 64, device=DEVICE), rtol=0.01, atol=0)


def test_memory():
    """Beyond the gradients: a chunk in 16 bits, and the weight's gradient in float32."""
    tokens, vocabulary, size = 8192, 65536, 1024
    (hidden, weight, _), target = given(tokens, vocabulary, size)
    leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    functional.linear_cross_entropy(leaves[0][:64], leaves[1], target[:64]).backward()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = functional.linear_cross_entropy(*leaves, target)
    chunk = 2 * vocabulary * (_chunks.chunk_rows(tokens, vocabulary, hidden.device, 2) + 32)
    assert torch.cuda.max_memory_allocated() - held < 1.05 * chunk + 4 * weight.numel() + 3 * hidden.nbytes + (16 << 20)
    del loss
