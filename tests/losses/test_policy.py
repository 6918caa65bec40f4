"""Losses of groups of completions against the formulas of their papers, written out token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch

from bigkernels import losses
from bigkernels.losses import _policy

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
LENGTHS = [5, 1, 7, 3]
LOW, HIGH, DELTA, MOST, POS, NEG = 0.1, 0.25, 1.6, 1.4, 0.8, 1.3
VESPO = {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 0.7, "vespo_lambda_neg": 0.3}


class Batch:
    """Four sequences, the second of which has no token; packed, or in rows."""

    def __init__(self, packed: bool, each: bool = False):
        count = sum(LENGTHS)
        self.old, self.ref = (-torch.rand(count, dtype=torch.float64) * 3 - 0.1 for _ in range(2))
        self.logprobs = (self.old + 0.5 * torch.randn(count, dtype=torch.float64)).requires_grad_()
        self.mask = torch.rand(count) > 0.2
        self.mask[5] = False
        self.advantages = torch.randn(count if each else 4, dtype=torch.float64)
        self.packed, self.each = packed, each
        self.cu = torch.tensor([0, *LENGTHS]).cumsum(0) if packed else None

    def arrange(self, t):
        """As `grpo_loss` takes it; what is masked is not a number."""
        if t is None or t.shape[0] == 4:
            return t
        t = t if t.dtype == torch.bool else torch.where(self.mask, t, torch.nan)
        return t if self.packed else torch.nn.utils.rnn.pad_sequence(t.split(LENGTHS), batch_first=True)

    def sequences(self, of_sampler):
        """For each, its (logprob, difference to old, ref, advantage, sampler's ratio) of tokens that count."""
        a = self.advantages if self.each else self.advantages.repeat_interleave(torch.tensor(LENGTHS))
        if of_sampler is None:
            s = torch.ones_like(a)
        else:
            s = of_sampler if len(of_sampler) > 4 else of_sampler.repeat_interleave(torch.tensor(LENGTHS))
        rows = list(zip(self.logprobs, self.logprobs - self.old, self.ref, a, s, self.mask, strict=True))
        cuts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
        return [[row[:5] for row in rows[b:e] if row[5]] for b, e in zip(cuts, cuts[1:], strict=False)]

    def loss(self, of_sampler=None, beta=0.0, **options):
        return losses.grpo_loss(
            *(self.arrange(t) for t in (self.logprobs, self.old, self.advantages, self.mask)),
            cu_seqlens=self.cu,
            ref_logprobs=self.arrange(self.ref) if beta else None,
            sampler_ratio=self.arrange(of_sampler),
            beta=beta,
            **options,
        )


def clip(w, a, options):
    unclipped = w * a
    if options.get("delta"):
        unclipped = w.clamp(max=options["delta"]) * a
    return -torch.minimum(unclipped, w.clamp(1 - LOW, 1 + HIGH) * a)


def policy(name, lp, w, whole, a, options):
    if name == "cispo":
        return -min(w.item(), MOST) * a * lp
    if name == "sapo":
        tau = POS if a > 0 else NEG
        return -a * 4 / tau / (1 + torch.exp(-tau * (w - 1)))
    if name == "vespo":
        k, rate = (VESPO[f"vespo_{n}_{'pos' if a >= 0 else 'neg'}"] for n in ("k", "lambda"))
        return -(whole**k * math.exp(rate * (1 - whole))) * a * lp
    return clip(w, a, options)


def formula(name, sequences, beta, importance, options):
    sums, count = [], 0
    for tokens in sequences:
        each = []
        mean = sum((d for _, d, *_ in tokens), torch.zeros(())) / max(len(tokens), 1)
        whole = math.exp(sum(d.item() + math.log(s) for _, d, _, _, s in tokens)) if name == "vespo" else None
        for lp, d, ref, a, s in tokens:
            w = (d if importance == "token" else mean).exp()
            loss = policy(name, lp, w, whole, a, options)
            loss = loss if name == "vespo" else loss * s
            if beta:
                k3 = (ref - lp).exp() - (ref - lp) - 1
                loss = loss + beta * (k3 * w if options.get("bias_correction_kl") else k3)
            each.append(loss)
        sums.append((sum(each, torch.zeros((), dtype=torch.float64)), len(each)))
        count += len(each)
    total = sum(s for s, _ in sums)
    if name in ("grpo", "sapo"):
        return sum(s / max(n, 1) for s, n in sums) / len(sums)
    if name == "luspo":
        return total / len(sums)
    if name == "dr_grpo":
        return total / (len(sums) * options["max_length"])
    return total / options.get("num_tokens", count)


def options_of(name, importance):
    options = {"loss_type": name, "importance": importance}
    if _policy.LOSSES[name].losses is _policy._clip:
        options |= {"clip_low": LOW, "clip_high": HIGH}
    if name == "dr_grpo":
        options["max_length"] = 9
    if name in ("dapo", "cispo", "vespo"):
        options["num_tokens"] = 31
    of_name = {
        "cispo": {"cispo_max": MOST},
        "vespo": VESPO,
        "sapo": {"sapo_temperature_pos": POS, "sapo_temperature_neg": NEG},
    }
    return options | of_name.get(name, {})


def same(found, expected, inputs):
    torch.testing.assert_close(found, expected, **CLOSE)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


CASES = [(name, importance) for name, row in _policy.LOSSES.items() for importance in row.importance]


@pytest.mark.parametrize("name, importance", CASES)
@pytest.mark.parametrize("more", ["plain", "delta", "kl", "corrected kl", "tokens' sampler", "sequences' sampler"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_formulas(name, importance, more, packed):
    batch = Batch(packed, each=more == "delta")
    options, beta, of_sampler = options_of(name, importance), 0.3 * ("kl" in more), None
    if more == "delta" and "clip_low" in options:
        options["delta"] = DELTA
        batch.advantages -= 1.0
    if more == "corrected kl":
        options["bias_correction_kl"] = True
    if "sampler" in more:
        of_sampler = torch.rand(sum(LENGTHS) if more.startswith("tokens") else 4, dtype=torch.float64) + 0.3
    sequences = batch.sequences(of_sampler)
    if name == "vespo" and more.startswith("sequences"):  # once a sequence, and not at each of its tokens
        sequences = [[(*row[:4], row[4] ** (1 / len(tokens))) for row in tokens] for tokens in sequences]
    expected = formula(name, sequences, beta, importance, options)
    found = batch.loss(of_sampler, beta, **options)
    same(found.loss, expected, [batch.logprobs])
    assert (found.kl is None) == (beta == 0)


def test_two_sided_clip():
    """The loss and the gradient of a bad token end at delta; that of a good one is as before."""
    ratio = torch.tensor([[0.5, 1.5, 3.0, 8.0]], dtype=torch.float64)
    for sign, value, moves, clipped in (
        (-1.0, [0.8, 1.5, 3.0, 4.0], [False, True, True, False], 2 / 4),
        (1.0, [-0.5, -1.2, -1.2, -1.2], [True, False, False, False], 3 / 4),
    ):
        for t, loss, moved in zip(range(4), value, moves, strict=True):
            lp = ratio.log()[:, t : t + 1].requires_grad_()
            found = losses.grpo_loss(lp, torch.zeros(1, 1), torch.tensor([sign]), delta=4.0).loss
            torch.testing.assert_close(found.item(), loss)
            assert bool(torch.autograd.grad(found, lp)[0]) == moved
        found = losses.grpo_loss(ratio.log(), torch.zeros(1, 4), torch.tensor([sign]), delta=4.0)
        assert found.clipped == clipped


def test_weights_of_cispo_are_constants():
    lp = torch.tensor([[0.3, 2.0, -4.0]], requires_grad=True)
    found = losses.grpo_loss(lp, torch.zeros(1, 3), torch.ones(1), loss_type="cispo")
    (grad,) = torch.autograd.grad(found.loss, lp)
    torch.testing.assert_close(grad, -lp.detach().exp().clamp_max(5.0) / 3)
    assert found.clipped == 1 / 3


@pytest.mark.parametrize("name, importance", CASES)
def test_extreme_ratios(name, importance):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        lp = torch.tensor([[-1e4, 0.0, 50.0, -100.0], [0.0, -1e4, -3.0, 1e3]], dtype=dtype).requires_grad_()
        old = torch.tensor([[0.0, -1e4, -50.0, 0.0], [-1e4, -3.0, -1e3, -1e3]], dtype=dtype)
        for advantages in (torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])):
            found = losses.grpo_loss(
                lp, old, advantages, ref_logprobs=old.flip(0), beta=0.1, **options_of(name, importance)
            )
            (grad,) = torch.autograd.grad(found.loss, lp)
            assert found.loss.isfinite() and grad.isfinite().all() and found.kl.isfinite()


@pytest.mark.parametrize("name, importance", CASES)
@pytest.mark.parametrize("shape", [(2, 4), (2, 0)])
def test_no_tokens(name, importance, shape):
    lp = torch.zeros(shape, requires_grad=True)
    options = {k: v for k, v in options_of(name, importance).items() if k != "num_tokens"}
    found = losses.grpo_loss(lp, lp.detach(), torch.ones(2), torch.zeros(shape), **options)
    assert found.loss == 0 and not torch.autograd.grad(found.loss, lp)[0].any() and found.clipped == 0


# The weights of the others are constants: their gradient is not that of their value.
@pytest.mark.parametrize("name, importance", [case for case in CASES if case[0] not in ("cispo", "vespo")])
def test_gradcheck(name, importance):
    batch = Batch(packed=False)
    lp = torch.tensor([[0.05, -0.4, 0.7], [-0.02, 0.3, -0.6]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(2, 3, dtype=torch.float64), batch.advantages[:2]
    assert torch.autograd.gradcheck(
        lambda t: losses.grpo_loss(t, old, advantages, **options_of(name, importance)).loss, lp
    )


def test_all_in_one_graph():
    lp, ones = -torch.rand(3, 5), torch.ones(3)

    def every(t):
        return [losses.grpo_loss(t, t - 0.1, ones, sampler_ratio=ones, **options_of(*case)).loss for case in CASES]

    torch._dynamo.reset()
    for a, b in zip(torch.compile(every, backend="eager", fullgraph=True)(lp), every(lp), strict=True):
        torch.testing.assert_close(a, b)


# ---- samplers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("limits", [(3.0, None), (1.5, 0.6), (None, 0.6)])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_sampler_ratios(mode, limits, packed):
    batch = Batch(packed)
    sampler = batch.old + 0.4 * torch.randn(len(batch.old), dtype=torch.float64)
    missing = torch.rand(len(sampler)) < 0.2
    given = torch.where(missing, torch.nan, sampler)
    found = losses.sampler_ratios(
        *(batch.arrange(t) for t in (batch.old, given, batch.mask)),
        cu_seqlens=batch.cu,
        mode=mode,
        clip_max=limits[0],
        clip_min=limits[1],
    )
    most, least = limits[0] or math.inf, limits[1] or 0.0
    difference = torch.where(missing | ~batch.mask, 0.0, batch.old - sampler)
    ratios = (
        difference.exp()
        if mode.startswith("token")
        else torch.stack([d.sum().exp() for d in difference.split(LENGTHS)])
    )
    kept = ratios.clone()
    for i, r in enumerate(ratios.tolist()):
        kept[i] = min(max(r, least), most) if mode.endswith("truncate") else r if least <= r <= most else 0.0
    if not packed and mode.startswith("token"):
        found = torch.cat([row[:n] for row, n in zip(found, LENGTHS, strict=True)])
    torch.testing.assert_close(found, kept, **CLOSE)
    assert not found.requires_grad


def test_sampler_ratios_do_not_overflow():
    far = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    found = losses.sampler_ratios(far, torch.zeros(2, 2), clip_max=None)
    assert found.isfinite().all() and found[1] == 0
    assert losses.sampler_ratios(far, torch.zeros(2, 2), clip_max=3.0).tolist() == [0.0, 0.0]
    assert losses.sampler_ratios(far, torch.zeros(2, 2), mode="sequence_truncate").tolist() == [3.0, 0.0]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_off_policy_mask(packed):
    batch = Batch(packed)
    sampler = batch.logprobs.detach() + torch.tensor([0.1] * 5 + [9.0] + [0.9] * 7 + [0.9] * 3)
    batch.advantages = torch.tensor([-1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    batch.mask[-3:] = True
    sampler[-1] = torch.nan  # says nothing: the mean over three tokens is 0.6
    given = [batch.arrange(t) for t in (batch.logprobs, sampler)]
    for threshold, expected in ((0.5, [1, 1, 1, 0]), (0.7, [1, 1, 1, 1]), (0.05, [0, 1, 1, 0])):
        found = losses.off_policy_mask(
            *given, batch.advantages, batch.arrange(batch.mask), cu_seqlens=batch.cu, threshold=threshold
        )
        assert found.tolist() == expected and not found.requires_grad


P, S = torch.zeros(3), torch.zeros(3, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.grpo_loss(S, S, P, sampler_ratio=P[:2]), r"grpo_loss: sampler_ratio has shape \(2,\)"),
        (lambda: losses.grpo_loss(S, S, P, delta=0.0), "grpo_loss: delta is 0.0, expected positive"),
        (lambda: losses.grpo_loss(S, S, P, loss_type="cispo", delta=4.0), "grpo_loss: delta is 4.0, expected None, as"),
        (lambda: losses.grpo_loss(S, S, P, loss_type="sapo", clip_low=0.1), "grpo_loss: clip_low is 0.1, expected 0.2"),
        (lambda: losses.grpo_loss(S, S, P, loss_type="cispo", clip_high=5.0), "grpo_loss: clip_high is 5.0"),
        (lambda: losses.grpo_loss(S, S, P, loss_type="cispo", cispo_max=0.0), "grpo_loss: cispo_max is 0.0"),
        (lambda: losses.grpo_loss(S, S, P, loss_type="luspo"), "importance is 'token', expected 'sequence', as loss"),
        (lambda: losses.grpo_loss(S, S, P, loss_type="vespo", importance="sequence"), "importance is 'sequence'"),
        (lambda: losses.grpo_loss(S, S, P, loss_type="sapo", num_tokens=3), "grpo_loss: num_tokens is 3"),
        (lambda: losses.grpo_loss(S, S, P, sapo_temperature_pos=0.0), "grpo_loss: sapo_temperature_pos is 0.0"),
        (lambda: losses.grpo_loss(S, S, P, vespo_k_pos=-1.0), "grpo_loss: vespo_k_pos is -1.0, expected not neg"),
        (lambda: losses.grpo_loss(S, S, P, bias_correction_kl=True), "grpo_loss: bias_correction_kl is True"),
        (lambda: losses.sampler_ratios(S, S[:2]), r"sampler_ratios: sampler_logprobs has shape \(2, 4\)"),
        (lambda: losses.sampler_ratios(S, S, mode="mask"), "sampler_ratios: mode is 'mask', expected one of token_tr"),
        (lambda: losses.sampler_ratios(S, S, clip_max=-1.0), "sampler_ratios: clip_max is -1.0"),
        (lambda: losses.sampler_ratios(S, S, clip_min=3.0), "sampler_ratios: clip_min is 3.0, expected below clip_max"),
        (lambda: losses.sampler_ratios(S, S, mode="token_truncate", clip_max=None), "clip_max is None, expected a num"),
        (lambda: losses.off_policy_mask(S, S, P, threshold=0.0), "off_policy_mask: threshold is 0.0"),
        (lambda: losses.off_policy_mask(S, S, S, threshold=1.0), r"off_policy_mask: advantages is of shape \(3, 4\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as info:
        call()
    assert str(info.value).startswith("bigkernels.losses.")
