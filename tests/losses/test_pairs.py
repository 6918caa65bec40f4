"""The losses of pairs against the formulas of their papers, written out a pair at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch

from bigkernels import losses
from bigkernels.losses import _free, _pairs

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
P = 7
BETA, E, TAU = 0.3, 0.2, 0.4


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def cross(x, e):
    return -(1 - e) * sigmoid(x).log() - e * (1 - sigmoid(x)).log()


def make(count=4):
    return [(-torch.rand(P, dtype=torch.float64) * 5 - 0.1).requires_grad_() for _ in range(count)]


# From one pair's log ratios c and r and their difference in the exponent, x.
def _exo(c, r, x):
    return sum(q * (q / p).log() for q, p in ((sigmoid(x), 1 - E), (1 - sigmoid(x), E)))


def _discopop(c, r, x):
    m = sigmoid(x / TAU)
    return (1 - m) * (1 + (-x).exp()).log() + m * (-x).exp()


FORMULAS = {
    "sigmoid": lambda c, r, x: cross(x, E),
    "hinge": lambda c, r, x: torch.maximum(1 - x, x * 0),
    "exo_pair": _exo,
    "nca_pair": lambda c, r, x: (
        -(sigmoid(BETA * c).log() + 0.5 * (1 - sigmoid(BETA * c)).log() + 0.5 * (1 - sigmoid(BETA * r)).log())
    ),
    "robust": lambda c, r, x: (-(1 - E) * sigmoid(x).log() + E * (1 - sigmoid(x)).log()) / (1 - 2 * E),
    "bco_pair": lambda c, r, x: -(sigmoid(BETA * c) * (1 - sigmoid(BETA * r))).log(),
    "sppo_hard": lambda c, r, x: (c - (1 - 0.5) / BETA) ** 2 + (r - (0 - 0.5) / BETA) ** 2,
    "apo_zero": lambda c, r, x: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
    "apo_down": lambda c, r, x: sigmoid(BETA * c) + 1 - sigmoid(x),
    "discopop": _discopop,
}


def options_of(name):
    more = {"label_smoothing": E} if _pairs.LOSSES[name].smooths else {}
    if _pairs.LOSSES[name].tokens:
        more |= {"chosen_tokens": torch.arange(1, P + 1), "rejected_tokens": torch.arange(P, 0, -1)}
    return {"loss_type": name, "beta": BETA, "discopop_tau": TAU} | more


def same(found, formula, inputs):
    torch.testing.assert_close(found, formula, **CLOSE)
    ours, exact = (
        torch.autograd.grad(t.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for t in (found, formula)
    )
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def of_each(formula, inputs):
    return torch.stack(
        [formula(c - rc, r - rr, BETA * (c - rc - r + rr)) for c, r, rc, rr in zip(*inputs, strict=True)]
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name):
    inputs = make()
    found = losses.dpo_loss(*inputs, **options_of(name))
    formula = of_each(FORMULAS[name], inputs)
    same(found.losses, formula, inputs)
    same(found.loss, formula.mean(), inputs)
    c, r, rc, rr = (t.detach() for t in inputs)
    torch.testing.assert_close(found.chosen_rewards, BETA * (c - rc), **CLOSE)
    torch.testing.assert_close(found.rejected_rewards, BETA * (r - rr), **CLOSE)


def test_of_means():
    c, r, rc, rr = inputs = make()
    options = options_of("ipo")
    n, m = options["chosen_tokens"], options["rejected_tokens"]
    difference = torch.stack([(c[i] - rc[i]) / float(n[i]) - (r[i] - rr[i]) / float(m[i]) for i in range(P)])
    same(losses.dpo_loss(*inputs, **options).losses, (difference - 0.5 / BETA) ** 2, inputs)
    same(losses.dpo_loss(*inputs, **options_of("sigmoid_norm")).losses, cross(BETA * difference, E), inputs)
    one = torch.ones(P)
    found = losses.dpo_loss(*inputs, loss_type="ipo", beta=BETA, chosen_tokens=one, rejected_tokens=one)
    same(found.losses, losses.ipo_loss(*inputs, beta=BETA).losses, inputs)


def test_sft_is_the_mean_over_tokens():
    per_token = [torch.rand(n, dtype=torch.float64) for n in range(P)]  # one of no token
    chosen = -torch.stack([t.sum() for t in per_token])
    found = losses.dpo_loss(chosen.requires_grad_(), *make(3), loss_type="sft", chosen_tokens=torch.arange(P))
    torch.testing.assert_close(found.loss, torch.cat(per_token).mean(), **CLOSE)
    assert found.losses.shape == (P,)
    (grad,) = torch.autograd.grad(found.loss, chosen)
    torch.testing.assert_close(grad, torch.full_like(chosen, -1 / sum(range(P))), **CLOSE)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_samples(name):
    c, r, rc, rr = inputs = make()
    pairs = (c - r, rc - rr) if name == "aot" else (c - rc, r - rr)
    first, second = ([v[i] for i in sorted(range(P), key=v.tolist().__getitem__)] for v in pairs)
    formula = torch.stack([cross(BETA * (a - b), E) for a, b in zip(first, second, strict=True)])
    same(losses.dpo_loss(*inputs, **options_of(name)).losses, formula, inputs)


def test_every_loss_has_a_formula():
    assert set(_pairs.LOSSES) == {*FORMULAS, "ipo", "sigmoid_norm", "sft", "aot", "aot_unpaired"}


@pytest.mark.parametrize("name", _pairs.LOSSES)
def test_gradcheck(name):
    inputs = [t[:3].detach().requires_grad_() for t in make()]
    options = {k: v[:3] if isinstance(v, torch.Tensor) else v for k, v in options_of(name).items()}
    assert torch.autograd.gradcheck(lambda *t: losses.dpo_loss(*t, **options).losses, inputs)


def test_several_at_once():
    inputs = make()
    tokens = torch.arange(1, P + 1)
    found = losses.dpo_loss(
        *inputs,
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        beta=BETA,
        label_smoothing=E,
        chosen_tokens=tokens,
    )
    parts = [of_each(FORMULAS[name], inputs) for name in ("sigmoid", "bco_pair")]
    formula = 0.8 * parts[0] + 0.2 * parts[1] - inputs[0].sum() / tokens.sum()
    same(found.losses, formula, inputs)
    twice = losses.dpo_loss(*inputs, loss_type=("hinge", "hinge"), beta=BETA)
    same(twice.losses, 2 * of_each(FORMULAS["hinge"], inputs), inputs)


# f'(u), up to a constant
DERIVATIVES = {
    "reverse_kl": (lambda u: u.log() + 1, {}),
    "forward_kl": (lambda u: -1 / u, {}),
    "js_divergence": (lambda u: (2 * u / (1 + u)).log(), {}),
    "alpha_divergence": (lambda u: (1 - u**-0.7) / 0.7, {"f_alpha_divergence_coef": 0.3}),
}


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "exo_pair", "robust", "discopop"])
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_divergences(loss_type, kind):
    c, r, rc, rr = inputs = make()
    derivative, options = DERIVATIVES[kind]
    x = BETA * (derivative((c - rc).exp()) - derivative((r - rr).exp()))
    formula = torch.stack([FORMULAS[loss_type](None, None, v) for v in x])
    found = losses.dpo_loss(*inputs, **options_of(loss_type), f_divergence_type=kind, **options)
    same(found.losses, formula, inputs)


def test_alpha_of_one_is_the_reverse_divergence():
    inputs = make()
    expected = losses.dpo_loss(*inputs).losses
    for alpha in (1.0, 1.0 + 1e-9):
        found = losses.dpo_loss(*inputs, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha).losses
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


# ---- without a reference --------------------------------------------------------------------------------------------

CPO = {
    "sigmoid": lambda c, r: cross(BETA * (c - r), E),
    "hinge": lambda c, r: torch.maximum(1 - BETA * (c - r), c * 0),
    "ipo": lambda c, r: (c - r - 0.5 / BETA) ** 2,
    "simpo": lambda c, r: cross(BETA * (c - r) - 0.7, E),
    "alphapo": lambda c, r: cross(BETA * (c - r) - 0.7, E),
}


@pytest.mark.parametrize("power", [0.0, 0.3, -0.2])
@pytest.mark.parametrize(
    "name, nll",
    [(name, nll) for name in _free.CPO for nll in ("none", "paper", "each", "scalar")[: 1 if name == "alphapo" else 4]],
)
def test_cpo(name, nll, power):
    c, r, own = inputs = make(3)
    smoothing = 0.0 if name in ("hinge", "ipo") else E
    given = {"paper": None, "each": own, "scalar": own.mean(), "none": None}[nll]
    alpha = 0.0 if nll == "none" else 0.4
    found = losses.cpo_loss(
        c,
        r,
        loss_type=name,
        beta=BETA,
        label_smoothing=smoothing,
        simpo_gamma=0.7,
        nll=given,
        cpo_alpha=alpha,
        alpha=power,
    )
    rewards = [(1 - t.exp() ** -power) / power if power else t for t in (c, r)]
    formula = torch.stack([CPO[name](a, b) for a, b in zip(*rewards, strict=True)])
    same(found.losses, formula + alpha * (-c if given is None else given), inputs)
    torch.testing.assert_close(found.margins, BETA * (rewards[0] - rewards[1]).detach(), **CLOSE)
    assert torch.autograd.gradcheck(lambda *t: losses.cpo_loss(*t, loss_type=name, beta=BETA).losses, inputs[:2])


def test_alphapo():
    """Without nll, and without overflow where a completion is unlikely."""
    c, r = make(2)
    found = losses.cpo_loss(c, r, loss_type="alphapo", alpha=0.5, beta=BETA)
    expected = losses.cpo_loss(c, r, loss_type="simpo", alpha=0.5, beta=BETA, cpo_alpha=0.0)
    same(found.losses, expected.losses, [c, r])
    far = torch.tensor([-1e4, -1.0, -1e4], requires_grad=True)
    found = losses.cpo_loss(far, far.flip(0) - 1, loss_type="alphapo", alpha=0.5)
    assert found.losses.isfinite().all() and torch.autograd.grad(found.loss, far)[0].isfinite().all()


def test_simpo_with_smoothing():
    c, r = inputs = make(2)
    found = losses.simpo_loss(c, r, beta=BETA, gamma=0.7, label_smoothing=E)
    same(found.losses, CPO["simpo"](c, r), inputs)


def test_apo_zero_unpaired():
    x, ref = inputs = make(2)
    good = torch.arange(P) % 2 == 0
    found = losses.kto_loss(x, ref, good, None, loss_type="apo_zero_unpaired", beta=BETA, undesirable_weight=1.3)
    formula = torch.where(good, 1 - sigmoid(BETA * (x - ref)), 1.3 * sigmoid(BETA * (x - ref)))
    same(found.losses, formula, inputs)
    assert found.kl == 0


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", _pairs.LOSSES)
def test_extreme_ratios(name, dtype):
    """Nothing is NaN, and what is bounded below stays so; what is not a square or an exponential is exact."""
    far = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 80.0, -80.0], dtype=dtype)
    inputs = [far.clone().requires_grad_(), far.roll(1).clone().requires_grad_(), torch.zeros(7), far.roll(2) / 2]
    inputs[2] = inputs[2].to(dtype)
    divergences = DERIVATIVES if _pairs.LOSSES[name].diverges else ("reverse_kl",)
    for kind in divergences:
        found = losses.dpo_loss(*inputs, **options_of(name) | {"f_divergence_type": kind})
        grads = torch.autograd.grad(found.loss, inputs[:2], allow_unused=True, materialize_grads=True)
        assert not found.losses.isnan().any() and not any(g.isnan().any() for g in grads)
        assert found.losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if kind == "reverse_kl":
            assert found.losses.isfinite().all() or name == "discopop"
    if name == "sigmoid":
        x = BETA * (far - far.roll(1) + far.roll(2) / 2).double()
        exact = [
            (1 - E) * math.log1p(math.exp(-abs(v)))
            + E * math.log1p(math.exp(-abs(v)))
            + (1 - E) * max(-v, 0)
            + E * max(v, 0)
            for v in x.tolist()
        ]
        exact = torch.tensor(exact, dtype=torch.float64)
        found = losses.dpo_loss(*inputs, **options_of(name)).losses
        torch.testing.assert_close(found.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_discopop_where_a_factor_overflows():
    """exp(-x) is infinite in float32 where the sigmoid before it is 0."""
    x = torch.tensor([-100.0, -1000.0, 1000.0], requires_grad=True)
    zero = torch.zeros(3)
    found = losses.dpo_loss(x, zero, zero, zero, loss_type="discopop", beta=1.0).losses
    torch.testing.assert_close(found, torch.tensor([100.0, 1000.0, 0.0]))
    (grad,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(grad, torch.tensor([-1.0, -1.0, 0.0]))


@pytest.mark.parametrize("name", _pairs.LOSSES)
def test_no_pairs(name):
    inputs = [torch.zeros(0, requires_grad=True) for _ in range(4)]
    options = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in options_of(name).items()}
    found = losses.dpo_loss(*inputs, **options)
    assert found.losses.shape == (0,) and found.losses.sum() == 0 and found.margins.shape == (0,)


@pytest.mark.parametrize("name", _pairs.LOSSES)
def test_transforms(name):
    inputs, options = [t.detach() for t in make()], options_of(name)

    def loss(*t):
        return losses.dpo_loss(*t, **options).loss

    grads = torch.func.grad(loss, (0, 1))(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    for a, b in zip(
        grads, torch.autograd.grad(loss(*leaves), leaves[:2], allow_unused=True, materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(a, b, **CLOSE)


def test_all_in_one_graph():
    inputs = [t.detach() for t in make()]

    def every(*t):
        return [losses.dpo_loss(*t, **options_of(name)).loss for name in _pairs.LOSSES]

    torch._dynamo.reset()
    for a, b in zip(torch.compile(every, backend="eager", fullgraph=True)(*inputs), every(*inputs), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


Z = torch.zeros(3)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: losses.dpo_loss(Z, Z, Z, Z, loss_type="dpo"),
            "dpo_loss: loss_type is 'dpo', expected one of sigmoid,",
        ),
        (lambda: losses.dpo_loss(Z, Z, Z, Z, loss_type=()), r"dpo_loss: loss_type is \(\), expected at least one"),
        (lambda: losses.dpo_loss(Z, Z, Z, Z, loss_weights=(1, 2)), "dpo_loss: loss_weights is .* expected 1 numbers"),
        (lambda: losses.dpo_loss(Z, Z, Z, Z, loss_type="exo_pair"), "dpo_loss: label_smoothing is 0.0, expected posit"),
        (lambda: losses.dpo_loss(Z, Z, Z, Z, loss_type="robust", label_smoothing=0.5), "label_smoothing is 0.5"),
        (
            lambda: losses.dpo_loss(Z, Z, Z, Z, loss_type="hinge", label_smoothing=0.1),
            "dpo_loss: label_smoothing is 0.1, expected 0, as loss_type is 'hinge'",
        ),
        (lambda: losses.dpo_loss(Z, Z, Z, Z, discopop_tau=0.0), "dpo_loss: discopop_tau is 0.0"),
        (lambda: losses.dpo_loss(Z, Z, Z, Z, loss_type="ipo"), "dpo_loss: chosen_tokens is None, expected given"),
        (
            lambda: losses.dpo_loss(Z, Z, Z, Z, loss_type="ipo", chosen_tokens=Z),
            "dpo_loss: rejected_tokens is None, expected given, as loss_type is 'ipo'",
        ),
        (lambda: losses.dpo_loss(Z, Z, Z, Z, chosen_tokens=Z[:2]), r"dpo_loss: chosen_tokens has shape \(2,\)"),
        (lambda: losses.dpo_loss(Z, Z, Z, Z, f_divergence_type="kl"), "dpo_loss: f_divergence_type is 'kl'"),
        (
            lambda: losses.dpo_loss(Z, Z, Z, Z, loss_type="apo_down", f_divergence_type="forward_kl"),
            "dpo_loss: f_divergence_type is 'forward_kl', expected 'reverse_kl', as",
        ),
        (lambda: losses.cpo_loss(Z, Z, loss_type="x"), "cpo_loss: loss_type is 'x', expected one of sigmoid, hinge"),
        (lambda: losses.cpo_loss(Z, Z, loss_type="ipo", label_smoothing=0.1), "cpo_loss: label_smoothing is 0.1"),
        (lambda: losses.cpo_loss(Z, Z, cpo_alpha=-1.0), "cpo_loss: cpo_alpha is -1.0"),
        (lambda: losses.cpo_loss(Z, Z, nll=Z, loss_type="alphapo"), "cpo_loss: nll is given, expected None, as loss"),
        (lambda: losses.cpo_loss(Z, Z, alpha=float("inf")), "cpo_loss: alpha is inf, expected a finite number"),
        (lambda: losses.cpo_loss(Z, Z, nll=Z[:2]), r"cpo_loss: nll has shape \(2,\)"),
        (lambda: losses.simpo_loss(Z, Z, label_smoothing=0.5), "simpo_loss: label_smoothing is 0.5"),
        (lambda: losses.kto_loss(Z, Z, Z, None, loss_type="x"), "kto_loss: loss_type is 'x'"),
        (lambda: losses.kto_loss(Z, Z, Z, Z, loss_type="apo_zero_unpaired"), "kto_loss: kl_logratios is given"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as info:
        call()
    assert str(info.value).startswith("bigkernels.losses.")
