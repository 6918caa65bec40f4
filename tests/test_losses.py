"""Losses on log probabilities against the formulas of their papers, token by token, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import bigkernels
from bigkernels import losses
from bigkernels.functional import linear_logprobs

GRAD = {"allow_unused": True, "materialize_grads": True}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def logps(*shape):
    return -torch.rand(*shape, dtype=torch.float64) * 3 - 0.01


def pairs(count=4, pairs=6):
    return [logps(pairs).requires_grad_() for _ in range(count)]


def same(found, formula, inputs):
    """Values and gradients by every input."""
    torch.testing.assert_close(found, formula, **CLOSE)
    ours = torch.autograd.grad(found.sum(), inputs, retain_graph=True, **GRAD)
    exact = torch.autograd.grad(formula.sum(), inputs, retain_graph=True, **GRAD)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def begins(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


# ---- sequences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_rows(average, kind):
    x = logps(4, 7).requires_grad_()
    mask = torch.rand(4, 7) > 0.4
    mask[2] = False
    with torch.no_grad():
        x[~mask] = torch.nan  # what does not count does not matter
    formula = torch.stack([row[m].sum() / (max(m.sum(), 1) if average else 1) for row, m in zip(x, mask, strict=True)])
    found = losses.sequence_logprobs(x, mask.to(kind), average=average)
    torch.testing.assert_close(found, formula, **CLOSE)
    found.sum().backward()
    assert x.grad.isfinite().all() and not x.grad[~mask].any()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [9], [0], []])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed(average, lengths, dtype):
    x = logps(sum(lengths)).requires_grad_()
    mask = torch.rand(sum(lengths)) > 0.3
    formula = (
        torch.stack(
            [
                part[m].sum() / (max(m.sum(), 1) if average else 1)
                for part, m in zip(x.split(lengths), mask.split(lengths), strict=True)
            ]
        )
        if lengths
        else x.new_zeros(0)
    )
    found = losses.sequence_logprobs(x, mask, cu_seqlens=begins(lengths).to(dtype), average=average)
    if x.numel():
        same(found, formula, [x])
    else:
        torch.testing.assert_close(found, formula)


def test_sums_without_a_mask():
    x = logps(4, 7)
    torch.testing.assert_close(losses.sequence_logprobs(x), x.sum(1), **CLOSE)
    packed = losses.sequence_logprobs(x.flatten(), cu_seqlens=begins([7] * 4))
    torch.testing.assert_close(packed, x.sum(1), **CLOSE)
    assert losses.sequence_logprobs(x.bfloat16()).dtype == torch.float32


# ---- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(beta, smoothing):
    c, r, rc, rr = inputs = pairs()
    found = losses.dpo_loss(*inputs, beta=beta, label_smoothing=smoothing)
    p = sigmoid(beta * (c / 1 - rc - r + rr))
    formula = -(1 - smoothing) * p.log() - smoothing * (1 - p).log()
    same(found.losses, formula, inputs)
    same(found.loss, formula.mean(), inputs)
    torch.testing.assert_close(found.chosen_rewards, (beta * (c - rc)).detach(), **CLOSE)
    torch.testing.assert_close(found.margins, (beta * ((c - rc) - (r - rr))).detach(), **CLOSE)
    assert found.accuracy == sum(m > 0 for m in found.margins.tolist()) / 6
    assert not found.rejected_rewards.requires_grad


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo(beta):
    c, r, rc, rr = inputs = pairs()
    h = (c.exp() * rr.exp() / (r.exp() * rc.exp())).log()
    same(losses.ipo_loss(*inputs, beta=beta).losses, (h - 1 / beta / 2) ** 2, inputs)


@pytest.mark.parametrize("own", [None, "each", "scalar"])
def test_orpo(own):
    c, r, nll = inputs = pairs(3)
    odds = [x.exp() / (1 - x.exp()) for x in (c, r)]
    ratio = -sigmoid((odds[0] / odds[1]).log()).log()
    first = -c if own is None else nll if own == "each" else nll.mean()
    found = losses.orpo_loss(c, r, beta=0.3, nll=None if own is None else first)
    same(found.losses, first + 0.3 * ratio, inputs)
    torch.testing.assert_close(found.rejected_rewards, 0.3 * r.detach(), **CLOSE)


def test_simpo():
    c, r = inputs = pairs(2)
    same(losses.simpo_loss(c, r, beta=2.5, gamma=0.7).losses, -sigmoid(2.5 * (c - r) - 0.7).log(), inputs)


@pytest.mark.parametrize("of_kl", [None, 0.4, -0.4])
def test_kto(of_kl):
    x, ref = inputs = pairs(2, 8)
    good = torch.arange(8) % 3 != 0
    ratios = None if of_kl is None else (of_kl + 0.1 * torch.randn(5, dtype=torch.float64)).requires_grad_()
    found = losses.kto_loss(*inputs, good, ratios, beta=0.5, desirable_weight=1.5, undesirable_weight=0.8)
    z0 = 0.0 if of_kl is None else max(0.0, ratios.mean().item())
    value = torch.where(good, 1.5 * sigmoid(0.5 * (x - ref - z0)), 0.8 * sigmoid(0.5 * (z0 - (x - ref))))
    formula = torch.where(good, 1.5 - value, 0.8 - value)
    same(found.losses, formula, inputs)
    same(found.loss, formula.mean(), inputs)
    assert math.isclose(found.kl, z0) and not found.kl.requires_grad
    torch.testing.assert_close(found.rewards, 0.5 * (x - ref).detach(), **CLOSE)


# ---- groups ---------------------------------------------------------------------------------------------------------


def grpo_by_tokens(lp, old, advantages, mask, ref, beta, low, high, importance, loss_type, max_length, num_tokens):
    """Sequence by sequence and token by token."""
    sequences, total, count = [], 0.0, 0
    for i in range(len(lp)):
        chosen = [t for t in range(len(lp[i])) if mask[i][t]]
        ratios = {t: (lp[i][t] - old[i][t]).exp() for t in chosen}
        if importance == "sequence" and chosen:
            whole = (sum(lp[i][t] - old[i][t] for t in chosen) / len(chosen)).exp()
            ratios = dict.fromkeys(chosen, whole)
        each = []
        for t in chosen:
            a, w = advantages[i][t], ratios[t]
            clipped = w.clamp(1 - low, 1 + high)
            loss = -torch.min(w * a, clipped * a)
            if ref is not None:
                ratio = (ref[i][t] - lp[i][t]).exp()
                loss = loss + beta * (ratio - ratio.log() - 1)
            each.append(loss)
        sequences.append(sum(each) / len(each) if each else lp[i].sum() * 0)
        total, count = total + sum(each), count + len(each)
    if loss_type == "grpo":
        return sum(sequences) / len(sequences)
    if loss_type == "dr_grpo":
        return total / (len(sequences) * max_length)
    return total / (num_tokens or count)


GRPO = [*itertools.product(("grpo", "bnpo", "dr_grpo", "dapo"), ("token", "sequence"), (0.0, 0.3), (False, True))]


@pytest.mark.parametrize("loss_type, importance, beta, packed", GRPO)
@pytest.mark.parametrize("each", [False, True])
def test_grpo(loss_type, importance, beta, packed, each):
    lengths = [5, 1, 7, 3]
    cu = begins(lengths)
    lp, old, ref = (logps(sum(lengths)) for _ in range(3))
    lp = (old + 0.6 * torch.randn(len(old), dtype=torch.float64)).requires_grad_()
    mask = torch.rand(len(lp)) > 0.2
    mask[5] = False  # the second sequence has no token
    advantages = torch.randn(len(lp) if each else 4, dtype=torch.float64)
    of_tokens = advantages if each else advantages.repeat_interleave(torch.tensor(lengths))
    options = {"max_length": 9 if loss_type == "dr_grpo" else None, "num_tokens": 31 if loss_type == "dapo" else None}
    parts = [t.split(lengths) for t in (lp, old, of_tokens, mask, ref)]
    formula = grpo_by_tokens(
        *parts[:4], parts[4] if beta else None, beta, 0.2, 0.28, importance, loss_type, *options.values()
    )
    options |= {"beta": beta, "clip_high": 0.28, "importance": importance, "loss_type": loss_type}
    if packed:
        found = losses.grpo_loss(
            lp, old, advantages, mask, cu_seqlens=cu, ref_logprobs=ref if beta else None, **options
        )
    else:

        def rows(t):
            return torch.nn.utils.rnn.pad_sequence(t.split(lengths), batch_first=True)

        found = losses.grpo_loss(
            rows(lp),
            rows(old),
            rows(advantages) if each else advantages,
            rows(mask),
            ref_logprobs=rows(ref) if beta else None,
            **options,
        )
    same(found.loss, formula, [lp])
    assert (found.kl is None) == (beta == 0)
    if beta:
        ratio = (ref - lp.detach())[mask].exp()
        torch.testing.assert_close(found.kl, (ratio - 1 - ratio.log()).mean(), **CLOSE)


def test_grpo_defaults():
    """On policy the loss is minus the mean advantage, and its gradient the policy gradient."""
    lp, advantages = logps(3, 5).requires_grad_(), torch.randn(3, dtype=torch.float64)
    found = losses.grpo_loss(lp, None, advantages)
    torch.testing.assert_close(found.loss, -advantages.mean(), **CLOSE)
    found.loss.backward()
    torch.testing.assert_close(lp.grad, (-advantages / 15)[:, None].expand(3, 5), **CLOSE)
    assert found.kl is None and found.clipped == 0
    whole = losses.grpo_loss(lp, None, advantages, loss_type="dapo").loss
    torch.testing.assert_close(whole, -advantages.mean(), **CLOSE)


def test_grpo_counts_what_it_clips():
    old = torch.zeros(1, 6, dtype=torch.float64)
    lp = torch.tensor([[1.5, 1.1, 0.5, 1.5, 0.5, 5.0]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    found = losses.grpo_loss(lp, old, advantages, mask, clip_low=0.2)
    assert found.clipped == 2 / 5
    found.loss.backward()
    assert (lp.grad != 0).tolist() == [[False, True, True, True, False, False]]


def test_grpo_ignores_what_is_masked():
    lp = logps(2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    inputs = [torch.where(mask, t, torch.nan).requires_grad_() for t in (lp, lp - 0.1, lp + 0.1)]
    for importance in ("token", "sequence"):
        found = losses.grpo_loss(
            inputs[0], inputs[1], torch.ones(2), mask, ref_logprobs=inputs[2], beta=0.1, importance=importance
        )
        (grad,) = torch.autograd.grad(found.loss, inputs[0])
        assert found.loss.isfinite() and found.kl.isfinite() and grad.isfinite().all() and not grad[~mask].any()


def test_no_tokens():
    lp = logps(2, 4).requires_grad_()
    for loss_type in ("grpo", "bnpo", "dapo"):
        found = losses.grpo_loss(lp, lp.detach(), torch.ones(2), torch.zeros(2, 4), loss_type=loss_type)
        assert found.loss == 0 and not torch.autograd.grad(found.loss, lp)[0].any()


# ---- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [0.0, -1e-30, -1e-7, -0.7, -50.0, -1e4])
def test_extremes_are_finite(x):
    c, r = (torch.tensor([v], requires_grad=True) for v in (x, -1.0))
    ref = torch.tensor([-1.0])
    for found in (
        losses.dpo_loss(c, r, ref, ref),
        losses.ipo_loss(c, r, ref, ref),
        losses.orpo_loss(c, r),
        losses.orpo_loss(r, c),
        losses.simpo_loss(c, r),
        losses.kto_loss(torch.cat((c, r)), torch.cat((ref, ref)), torch.tensor([True, False]), None),
    ):
        grads = torch.autograd.grad(found.loss, (c, r))
        assert found.loss.isfinite() and all(g.isfinite().all() for g in grads)


def test_the_odds_of_a_likely_completion():
    """log(p / (1 - p)) near p = 1, in float32, where 1 - p has lost its digits."""
    x = torch.tensor([-1e-6])
    found = losses.orpo_loss(torch.tensor([-0.7]), x, beta=1.0, nll=torch.zeros(1)).losses
    odds = [math.log(math.exp(v) / -math.expm1(v)) for v in (float(torch.tensor(-0.7)), x.double().item())]
    assert math.isclose(found.item(), math.log1p(math.exp(odds[1] - odds[0])), rel_tol=1e-5)


def test_16_bits_are_computed_in_float32():
    x = [t.detach().bfloat16() for t in pairs()]
    assert losses.dpo_loss(*x).loss.dtype == torch.float32
    torch.testing.assert_close(losses.dpo_loss(*x).loss, losses.dpo_loss(*(t.float() for t in x)).loss)


def test_on_linear_logprobs():
    """The composition of the module's docstring: the gradient reaches the head."""
    hidden, weight = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(11, (4, 6))
    labels[:, :2] = -100
    of_tokens = linear_logprobs(hidden[:, :-1], weight, labels[:, 1:])
    found = losses.dpo_loss(*losses.sequence_logprobs(of_tokens).chunk(2), *torch.zeros(4).chunk(2), beta=0.1)
    grads = torch.autograd.grad(found.loss, (hidden, weight))
    log_p = (hidden @ weight.T)[:, :-1].log_softmax(-1)
    log_p = log_p.gather(2, labels[:, 1:, None].clamp_min(0))[..., 0]
    total = torch.where(labels[:, 1:] == -100, 0, log_p).sum(1)
    formula = -sigmoid(0.1 * (total[:2] - total[2:])).log().mean()
    torch.testing.assert_close(found.loss, formula)
    for a, b in zip(grads, torch.autograd.grad(formula, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert bigkernels.losses is losses


def test_compiles():
    x = [t.detach() for t in pairs()]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: losses.dpo_loss(*t).loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*x), losses.dpo_loss(*x).loss)
    lp, mask = logps(3, 5), torch.ones(3, 5)
    grpo = torch.compile(
        lambda t: losses.grpo_loss(t, t - 0.1, torch.ones(3), mask).loss, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(grpo(lp), losses.grpo_loss(lp, lp - 0.1, torch.ones(3), mask).loss)


P, S = torch.zeros(3), torch.zeros(3, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.sequence_logprobs(P), r"sequence_logprobs: logprobs has shape \(3,\), expected \(B, S\)"),
        (lambda: losses.sequence_logprobs(S, S[:2]), r"sequence_logprobs: mask has shape \(2, 4\)"),
        (lambda: losses.sequence_logprobs(S, average=True), "sequence_logprobs: mask is None, expected given"),
        (
            lambda: losses.sequence_logprobs(S, cu_seqlens=begins([3])),
            r"sequence_logprobs: logprobs has shape \(3, 4\)",
        ),
        (lambda: losses.dpo_loss(P, P, P, P[:2]), r"dpo_loss: ref_rejected has shape \(2,\)"),
        (lambda: losses.dpo_loss(P, P, P, P, beta=0), "dpo_loss: beta is 0"),
        (lambda: losses.dpo_loss(P, P, P, P, label_smoothing=0.5), "dpo_loss: label_smoothing is 0.5"),
        (lambda: losses.ipo_loss(P, P[:2], P, P), r"ipo_loss: rejected has shape \(2,\)"),
        (lambda: losses.orpo_loss(P, P, nll=P[:2]), r"orpo_loss: nll has shape \(2,\)"),
        (lambda: losses.simpo_loss(P, P, beta=-1), "simpo_loss: beta is -1"),
        (lambda: losses.kto_loss(P, P, P[:2].bool(), None), r"kto_loss: desirable has shape \(2,\)"),
        (lambda: losses.kto_loss(P, P, P.bool(), None, desirable_weight=-1.0), "kto_loss: desirable_weight is -1.0"),
        (lambda: losses.grpo_loss(S, S, P[:2]), r"grpo_loss: advantages has shape \(2,\), expected \(3,\)"),
        (lambda: losses.grpo_loss(S, S[:2], P), r"grpo_loss: old_logprobs has shape \(2, 4\)"),
        (lambda: losses.grpo_loss(S, S, P, beta=0.1), "grpo_loss: ref_logprobs is None"),
        (lambda: losses.grpo_loss(S, S, P, importance="x"), "grpo_loss: importance is 'x', expected one of token, seq"),
        (lambda: losses.grpo_loss(S, S, P, loss_type="x"), "grpo_loss: loss_type is 'x'"),
        (lambda: losses.grpo_loss(S, S, P, loss_type="dr_grpo"), "grpo_loss: max_length is None"),
        (lambda: losses.grpo_loss(S, S, P, max_length=4), "grpo_loss: max_length is 4, expected None"),
        (lambda: losses.grpo_loss(S, S, P, num_tokens=4), "grpo_loss: num_tokens is 4, expected None"),
        (lambda: losses.grpo_loss(S, S, P, clip_high=-0.1), "grpo_loss: clip_high is -0.1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=r"bigkernels\.losses\." + message):
        call()
