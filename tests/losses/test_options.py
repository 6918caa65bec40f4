"""Options that change what log probabilities weigh (LD-DPO, WPO, BCO's shift, no reference), written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from bigkernels import losses
from bigkernels.functional import linear_logprobs, quantize_weight

LENGTHS = (3, 7, 5, 2)
CHOSEN = (0, 1)


def rows(seed=0):
    """(log probabilities (4, 9), mask) with tokens that do not count before and after."""
    torch.manual_seed(seed)
    mask = torch.zeros(4, 9, dtype=torch.int64)
    for i, n in enumerate(LENGTHS):
        mask[i, 1 : 1 + n] = 1
    mask[1, 4], mask[1, 8] = 0, 1  # one of them in the middle, as between turns
    return (-torch.rand(4, 9, dtype=torch.float64)).requires_grad_(), mask


def pack(t, mask):
    return t[mask.bool()], torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_alpha(alpha):
    logprobs, mask = rows()
    expected = []
    for i, other in ((0, 2), (1, 3), (2, 0), (3, 1)):
        values = [logprobs[i, k] for k in range(9) if mask[i, k]]
        shared = min(LENGTHS[i], LENGTHS[other])
        expected.append(sum(values[:shared]) + alpha * sum(values[shared:], torch.zeros(())))
    expected = torch.stack(expected)
    found = losses.sequence_logprobs(logprobs, mask, ld_alpha=alpha)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(4, dtype=torch.float64)
    a, b = (torch.autograd.grad((t * weights).sum(), logprobs, retain_graph=True)[0] for t in (found, expected))
    torch.testing.assert_close(a, b)
    packed, cu = pack(logprobs, mask)
    found = losses.sequence_logprobs(packed, torch.ones_like(packed), cu_seqlens=cu, ld_alpha=alpha)
    torch.testing.assert_close(found, expected)


def test_wpo_weights_are_those_of_the_distribution():
    torch.manual_seed(1)
    hidden, weight = torch.randn(4, 9, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    _, mask = rows()
    target = torch.randint(11, (4, 9))
    p = torch.softmax(hidden @ weight.T, -1)
    of_token = p.gather(-1, target[..., None])[..., 0] / p.square().sum(-1)
    expected = torch.stack([of_token[i][mask[i].bool()].log().mean().exp() for i in range(4)])
    logprobs, collisions = linear_logprobs(hidden, weight, target, reports=("log_sum_sq_probs",))
    torch.testing.assert_close(losses.wpo_weights(logprobs, collisions, mask), expected)
    packed, cu = pack(logprobs, mask)
    found = losses.wpo_weights(packed, collisions[mask.bool()], cu_seqlens=cu)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    labels = torch.where(mask.bool(), target, -100)
    ref = torch.randn(4, dtype=torch.float64)
    loss = losses.linear_dpo_loss(hidden, weight, labels, ref_logprobs=ref, use_weighting=True, beta=0.2)
    logprobs = torch.stack([p[i, k, target[i, k]].log() for i in range(4) for k in range(9) if mask[i, k]])
    ratio = torch.stack([part.sum() for part in logprobs.split(mask.sum(1).tolist())]) - ref
    x = 0.2 * (ratio[:2] - ratio[2:])
    torch.testing.assert_close(loss.losses, torch.log1p(torch.exp(-x)) * expected[:2] * expected[2:])
    alone = losses.linear_dpo_loss(hidden, weight, labels, ref_logprobs=ref, beta=0.2)
    torch.testing.assert_close(alone.losses, torch.log1p(torch.exp(-x)))


def test_ld_alpha_is_of_the_reference_too():
    torch.manual_seed(2)
    hidden, ref_hidden = torch.randn(2, 4, 9, 6, dtype=torch.float64)
    weight = torch.randn(11, 6, dtype=torch.float64)
    _, mask = rows()
    target = torch.randint(11, (4, 9))
    logprobs = [
        losses.sequence_logprobs(
            (h @ weight.T).log_softmax(-1).gather(-1, target[..., None])[..., 0], mask, ld_alpha=0.4
        )
        for h in (hidden, ref_hidden)
    ]
    expected = losses.dpo_loss(*logprobs[0].chunk(2), *logprobs[1].chunk(2))
    labels = torch.where(mask.bool(), target, -100)
    found = losses.linear_dpo_loss(hidden, weight, labels, ref_hidden=ref_hidden, ld_alpha=0.4)
    torch.testing.assert_close(found.losses, expected.losses)


def test_without_a_reference():
    torch.manual_seed(3)
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
    x = 0.7 * (chosen - rejected)
    found = losses.dpo_loss(chosen, rejected, None, None, beta=0.7)
    torch.testing.assert_close(found.losses, -torch.log(1 / (1 + torch.exp(-x))))
    torch.testing.assert_close(found.chosen_rewards, 0.7 * chosen)
    hidden, weight = torch.randn(4, 9, 6), torch.randn(11, 6)
    labels = torch.randint(11, (4, 9))
    free = losses.linear_dpo_loss(hidden, weight, labels, reference_free=True)
    zero = losses.linear_dpo_loss(hidden, weight, labels, ref_logprobs=torch.zeros(4))
    assert torch.equal(free.losses, zero.losses)
    with pytest.raises(ValueError, match="ref_rejected is given, expected as ref_chosen is"):
        losses.dpo_loss(chosen, rejected, None, rejected)
    with pytest.raises(ValueError, match="the reference is ref_logprobs and reference_free"):
        losses.linear_dpo_loss(hidden, weight, labels, reference_free=True, ref_logprobs=torch.zeros(4))
    with pytest.raises(ValueError, match="linear_kto_loss: reference_free is given"):
        losses.linear_kto_loss(hidden, weight, labels, torch.ones(4), None, reference_free=True)


@pytest.mark.parametrize("shift", [0.0, -1.3, torch.tensor(0.4)])
def test_bco(shift):
    torch.manual_seed(4)
    logprobs, ref = torch.randn(2, 6, dtype=torch.float64)
    logprobs.requires_grad_()
    good, weights = torch.tensor([1, 0, 0, 1, 1, 0]), torch.rand(6, dtype=torch.float64)
    reward = 0.3 * (logprobs - ref)
    sigmoid = lambda x: 1 / (1 + torch.exp(-x))  # noqa: E731
    expected = -torch.where(good > 0, sigmoid(reward - shift), sigmoid(shift - reward)).log() * weights
    found = losses.bco_loss(logprobs, ref, good, shift=shift, beta=0.3, weights=weights)
    torch.testing.assert_close(found.losses, expected)
    a, b = (torch.autograd.grad(t, logprobs, retain_graph=True)[0] for t in (found.loss, expected.mean()))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(found.rewards, reward.detach())
    pairs = losses.dpo_loss(
        logprobs[:3], logprobs[3:], ref[:3], ref[3:], loss_type="bco_pair", bco_shift=shift, beta=0.3
    )
    expected = -sigmoid(reward[:3] - shift).log() - sigmoid(-(reward[3:] - shift)).log()
    torch.testing.assert_close(pairs.losses, expected)
    with pytest.raises(ValueError, match="bco_shift is 0.5, expected 0, as loss_type is 'sigmoid'"):
        losses.dpo_loss(logprobs[:3], logprobs[3:], ref[:3], ref[3:], bco_shift=0.5)


def test_the_shift_follows_the_rewards():
    torch.manual_seed(5)
    shift, kept = losses.RewardShift(), losses.RewardShift(decay=0.9)
    assert shift.value == 0
    good, bad = [], []
    mean = [None, None]
    for step in range(4):
        new = [torch.randn(step + 1), torch.randn(3 if step != 2 else 0)]
        good.append(new[0]), bad.append(new[1])
        found = shift.update(*new)
        torch.testing.assert_close(found, (torch.cat(good).mean() + torch.cat(bad).mean()) / 2)
        for kind, t in enumerate(new):
            if t.numel():
                mean[kind] = t.mean() if mean[kind] is None else 0.9 * mean[kind] + 0.1 * t.mean()
        torch.testing.assert_close(kept.update(*new), (mean[0] + mean[1]) / 2)
    again = losses.RewardShift()
    again.load_state_dict(shift.state_dict())
    assert again.value == shift.value == copy.deepcopy(shift).value
    logprobs, ref, labels = torch.randn(4).requires_grad_(), torch.randn(4), torch.tensor([1, 1, 0, 0])
    before = shift.value.clone()
    with torch.no_grad():
        measured = losses.bco_loss(logprobs, ref, labels, shift=shift)
    assert shift.value == before
    torch.testing.assert_close(measured.losses, losses.bco_loss(logprobs, ref, labels, shift=before).losses)
    trained = losses.bco_loss(logprobs, ref, labels, shift=shift)
    assert shift.value != before
    torch.testing.assert_close(trained.losses, losses.bco_loss(logprobs, ref, labels, shift=shift.value).losses)
    only = losses.RewardShift()
    assert only.update(torch.tensor([2.0, 4.0]), torch.zeros(0)) == 3


def test_bco_from_hidden_states():
    torch.manual_seed(6)
    hidden, weight = torch.randn(3, 5, 6), torch.randn(11, 6)
    labels = torch.randint(11, (3, 5))
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[..., None])[..., 0].sum(1)
    good, ref = torch.tensor([1, 0, 0]), torch.randn(3)
    found = losses.linear_bco_loss(hidden, weight, labels, good, ref_logprobs=ref, shift=0.2)
    torch.testing.assert_close(found.losses, losses.bco_loss(logprobs, ref, good, shift=0.2).losses)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ld_alpha": 0.5}, "mask is None, expected given, as ld_alpha is"),
        ({"ld_alpha": 1.5, "mask": torch.ones(4, 9)}, r"ld_alpha is 1.5, expected in \[0, 1\]"),
        ({"ld_alpha": 0.5, "average": True, "mask": torch.ones(4, 9)}, "without average"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        losses.sequence_logprobs(torch.zeros(4, 9), options.pop("mask", None), **options)
    with pytest.raises(ValueError, match="given for 3 sequences, expected two a pair"):
        losses.sequence_logprobs(torch.zeros(3, 9), torch.ones(3, 9), ld_alpha=0.5)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reports_of_log_probabilities(dtype, quantized):
    torch.manual_seed(7)
    hidden, weight, bias = torch.randn(3, 40, 64).to(dtype), torch.randn(70, 64).to(dtype), torch.randn(70).to(dtype)
    target = torch.randint(70, (3, 40))
    head = quantize_weight(weight.float(), "int8") if quantized else weight
    wide = head.dequantize().double() if quantized else weight.double()
    z = 2.0 * torch.tanh(0.3 * (hidden.double() @ wide.T + bias.double()) / 2.0) / 0.8
    target[0] = z[0].argmax(-1)  # some that are right
    target[1, :9] = -100
    kept = target >= 0
    p = torch.softmax(z, -1)
    expected = {
        "is_top1": (z.argmax(-1) == target) & kept,
        "log_sum_sq_probs": p.square().sum(-1).log() * kept,
        "mean_logits": z.mean(-1) * kept,
    }
    hidden.requires_grad_()
    options = {"logit_scale": 0.3, "softcap": 2.0, "temperature": 0.8}
    logprobs, entropy, *found = linear_logprobs(
        hidden, head, target, bias, return_entropy=True, reports=tuple(expected), **options
    )
    close = {"rtol": 2e-5, "atol": 2e-5} if dtype != torch.bfloat16 or not quantized else {"rtol": 0.02, "atol": 0.02}
    for t, (name, value) in zip(found, expected.items(), strict=True):
        assert not t.requires_grad
        if name == "is_top1":
            assert t.dtype == torch.bool and torch.equal(t, value) and t[0].all()
        else:
            torch.testing.assert_close(t.double(), value, **close)
    alone = linear_logprobs(hidden, head, target, bias, **options)
    assert torch.equal(alone, logprobs)
    grads = [torch.autograd.grad(t.sum(), hidden, retain_graph=True)[0] for t in (logprobs, alone)]
    assert torch.equal(*grads)
    with pytest.raises(ValueError, match="reports are"):
        linear_logprobs(hidden, head, target, bias, reports=("accuracy",))


def test_reports_of_log_probabilities_as_the_reference_computes_them():
    torch.manual_seed(8)
    hidden, weight, target = torch.randn(9, 6), torch.randn(11, 6), torch.randint(11, (9,))
    target[3] = -100
    names = ("is_top1", "mean_logits", "log_sum_sq_probs")
    expected = linear_logprobs(hidden, weight, target, reports=names)
    found = torch.func.vmap(lambda h: linear_logprobs(h, weight, target, reports=names))(hidden[None])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-5, atol=1e-5)
