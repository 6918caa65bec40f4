"""Losses from hidden states in one call, against the logits of a model and of its reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bigkernels import losses
from bigkernels.bench.memory import extra_peak
from bigkernels.functional import quantize_weight

V, H, G, SEQ = 37, 16, 12, 7
HEAD = {"logit_scale": 0.7, "softcap": 5.0}


def z_of(hidden, weight, bias, temperature=1.0):
    z = HEAD["logit_scale"] * F.linear(hidden, weight, bias)
    return HEAD["softcap"] * torch.tanh(z / HEAD["softcap"]) / temperature


def of_tokens(hidden, weight, bias, labels, temperature=1.0):
    """log p a token, 0 where it does not count, by the softmax written out."""
    p = z_of(hidden, weight, bias, temperature).exp()
    p = p / p.sum(-1, keepdim=True)
    return torch.where(labels == -100, 0, p.gather(-1, labels.clamp_min(0)[..., None])[..., 0].log())


class Case:
    def __init__(self, count, dtype=torch.float64, packed=False):
        self.lengths = [SEQ] * count if not packed else [3, 7, 1, 5][:count]
        shape = (sum(self.lengths),) if packed else (count, SEQ)
        self.cu = torch.tensor([0, *self.lengths]).cumsum(0) if packed else None
        self.inputs = [torch.randn(*shape, H), torch.randn(V, H), torch.randn(V)]
        self.inputs = [t.to(dtype).requires_grad_() for t in self.inputs]
        self.reference = {
            "ref_hidden": torch.randn(*shape, G),
            "ref_weight": torch.randn(V, G),
            "ref_bias": torch.randn(V),
        }
        self.reference = {k: t.to(dtype) for k, t in self.reference.items()}
        self.labels = torch.randint(V, shape)
        self.labels[torch.rand(shape) < 0.3] = -100
        self.labels.view(-1)[0] = 1  # one token at least
        if not packed:
            self.labels[-1] = -100  # nothing of the last completion counts

    def sums(self, t):
        return torch.stack([part.sum() for part in t.split(self.lengths)]) if self.cu is not None else t.sum(1)

    def logprobs(self):
        ours = of_tokens(*self.inputs, self.labels)
        theirs = of_tokens(*self.reference.values(), self.labels)
        return *(self.sums(t) for t in (ours, theirs)), self.sums((self.labels != -100).double())


def same(found, expected, inputs, close=1e-9):
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero", ("sigmoid", "sft")])
def test_dpo(loss_type, packed):
    case = Case(4, packed=packed)
    ours, theirs, tokens = case.logprobs()
    found = losses.linear_dpo_loss(
        case.inputs[0],
        case.inputs[1],
        case.labels,
        case.inputs[2],
        **case.reference,
        cu_seqlens=case.cu,
        loss_type=loss_type,
        beta=0.3,
        **HEAD,
    )
    n = tokens.chunk(2)
    expected = losses.dpo_loss(
        *ours.chunk(2), *theirs.chunk(2), loss_type=loss_type, beta=0.3, chosen_tokens=n[0], rejected_tokens=n[1]
    )
    same(found.loss, expected.loss, case.inputs)
    given = losses.linear_dpo_loss(
        case.inputs[0],
        case.inputs[1],
        case.labels,
        case.inputs[2],
        ref_logprobs=theirs,
        cu_seqlens=case.cu,
        loss_type=loss_type,
        beta=0.3,
        **HEAD,
    )
    torch.testing.assert_close(given.loss, found.loss)
    torch.testing.assert_close(given.chosen_rewards, expected.chosen_rewards)


def test_a_reference_of_the_same_head():
    """As with adapters switched off: the reference's hidden states, the model's head, which gets no gradient by it."""
    case = Case(4)
    hidden, weight, bias = case.inputs
    ref_hidden = torch.randn_like(hidden).requires_grad_()
    found = losses.linear_dpo_loss(hidden, weight, case.labels, bias, ref_hidden=ref_hidden, **HEAD)
    assert torch.autograd.grad(found.loss, ref_hidden, retain_graph=True, allow_unused=True) == (None,)
    ours = case.sums(of_tokens(hidden, weight, bias, case.labels))
    theirs = case.sums(of_tokens(ref_hidden, weight, bias, case.labels)).detach()
    same(found.loss, losses.dpo_loss(*ours.chunk(2), *theirs.chunk(2)).loss, case.inputs)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo sigmoid", "cpo simpo", "cpo hinge", "cpo ipo", "cpo alphapo"])
def test_without_a_reference(name, packed):
    case = Case(4, packed=packed)
    ours, _, tokens = case.logprobs()
    means = ours / tokens.clamp_min(1)
    name, *kind = name.split()
    options = {"beta": 0.3} | ({"loss_type": kind[0]} if kind else {})
    run = getattr(losses, f"linear_{name}_loss")
    found = run(case.inputs[0], case.inputs[1], case.labels, case.inputs[2], cu_seqlens=case.cu, **HEAD, **options)
    averaged = name != "cpo" or kind[0] in ("simpo", "ipo", "alphapo")
    if name == "cpo" and kind[0] != "alphapo":
        options["nll"] = -ours[:2].sum() / tokens[:2].sum()
    expected = getattr(losses, f"{name}_loss")(*(means if averaged else ours).chunk(2), **options)
    same(found.loss, expected.loss, case.inputs)


def test_kto():
    case = Case(4)
    ours, theirs, _ = case.logprobs()
    good, ratios = torch.tensor([True, False, False, True]), torch.tensor([0.3, 0.9])
    found = losses.linear_kto_loss(
        case.inputs[0], case.inputs[1], case.labels, good, ratios, case.inputs[2], **case.reference, beta=0.4, **HEAD
    )
    same(found.loss, losses.kto_loss(ours, theirs, good, ratios, beta=0.4).loss, case.inputs)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("given", ["reference", "logprobs", "nothing"])
def test_grpo(given, packed):
    case = Case(4, packed=packed)
    mask = case.labels != -100
    tokens = torch.where(mask, case.labels, V + 5)  # what is masked may be no class at all
    ours = of_tokens(*case.inputs, case.labels, 0.8)
    theirs = of_tokens(*case.reference.values(), case.labels, 0.8)
    old, advantages = ours.detach() + 0.2, torch.randn(4, dtype=torch.float64)
    beta = 0.0 if given == "nothing" else 0.2
    more = {"reference": case.reference, "logprobs": {"ref_logprobs": theirs}, "nothing": {}}[given]
    options = {"loss_type": "dapo", "clip_high": 0.28, "beta": beta, "cu_seqlens": case.cu}
    found = losses.linear_grpo_loss(
        case.inputs[0],
        case.inputs[1],
        tokens,
        old,
        advantages,
        mask,
        case.inputs[2],
        temperature=0.8,
        **HEAD,
        **options,
        **more,
    )
    expected = losses.grpo_loss(ours, old, advantages, mask, ref_logprobs=theirs if beta else None, **options)
    same(found.loss, expected.loss, case.inputs)


def test_quantized_heads():
    """The base model's head in 4 bits is the reference's as well: hidden states alone get a gradient."""
    hidden, labels = torch.randn(4, SEQ, 64, requires_grad=True), torch.randint(V, (4, SEQ))
    head = quantize_weight(torch.randn(V, 64), "int4")
    ref_hidden = torch.randn(4, SEQ, 64)
    found = losses.linear_dpo_loss(hidden, head, labels, ref_hidden=ref_hidden)
    dense = head.dequantize()
    ours, theirs = (
        F.linear(h, dense).log_softmax(-1).gather(2, labels[..., None])[..., 0].sum(1) for h in (hidden, ref_hidden)
    )
    expected = losses.dpo_loss(*ours.chunk(2), *theirs.chunk(2))
    same(found.loss, expected.loss, [hidden], 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    case = Case(4, dtype)
    found = losses.linear_dpo_loss(
        case.inputs[0], case.inputs[1], case.labels, case.inputs[2], **case.reference, **HEAD
    )
    assert found.loss.dtype == torch.float32
    wide = Case(4)
    wide.inputs = [t.detach().double() for t in case.inputs]
    wide.reference = {k: t.double() for k, t in case.reference.items()}
    wide.labels = case.labels
    ours, theirs, _ = wide.logprobs()
    expected = losses.dpo_loss(*ours.chunk(2), *theirs.chunk(2)).loss
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(g.dtype == dtype for g in torch.autograd.grad(found.loss, case.inputs))


def test_memory():
    """Far less than the logits of one of the models would take: 4 x 512 x 16384 in float32."""
    hidden, ref_hidden = (torch.randn(4, 512, 8) for _ in range(2))
    weight, ref_weight = (torch.randn(16384, 8, requires_grad=True) for _ in range(2))
    hidden.requires_grad_()
    labels = torch.randint(16384, (4, 512))

    def step():
        losses.linear_dpo_loss(hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight).loss.backward()

    step()
    assert extra_peak(step, torch.device("cpu")) < 4 * 512 * 16384 * 4


X, W, L = torch.zeros(4, 3, 2), torch.zeros(5, 2), torch.zeros(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.linear_dpo_loss(X, W, L), "linear_dpo_loss: the reference is None, expected one of ref_hid"),
        (lambda: losses.linear_dpo_loss(X, W, L, ref_hidden=X, ref_logprobs=X), "is ref_hidden and ref_logprobs,"),
        (lambda: losses.linear_dpo_loss(X, W, L, ref_logprobs=X[:, 0, 0], ref_weight=W), "ref_weight is given"),
        (lambda: losses.linear_dpo_loss(X[:3], W, L[:3], ref_hidden=X[:3]), "labels is of 3 completions, expected two"),
        (lambda: losses.linear_dpo_loss(X, W, L, ref_logprobs=X[0, 0]), r"is of shape \(2,\), expected \(4,\)"),
        (lambda: losses.linear_orpo_loss(X[:1], W, L[:1]), "linear_orpo_loss: labels is of 1 completions"),
        (lambda: losses.linear_cpo_loss(X, W, L, nll=X), "linear_cpo_loss: nll is given"),
        (lambda: losses.linear_kto_loss(X, W, L, L[:, 0], None), "linear_kto_loss: the reference is None"),
        (lambda: losses.linear_grpo_loss(X, W, L, None, X[:, 0, 0], ref_hidden=X, ref_logprobs=X), "ref_logprobs is g"),
        (lambda: losses.linear_grpo_loss(X, W, L, None, X[:, 0, 0], ref_bias=W[:, 0]), "ref_bias is given, expected"),
        (lambda: losses.linear_grpo_loss(X, W, L, None, X[:, 0, 0], L[:2]), r"mask is of shape \(2, 3\), expected"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as info:
        call()
    assert str(info.value).startswith("bigkernels.losses.linear_")


def test_arguments_of_the_parts():
    with pytest.raises(TypeError, match="gamma"):
        losses.linear_orpo_loss(X, W, L, gamma=1.0)
    with pytest.raises(ValueError, match="simpo_loss: beta is 0"):
        losses.linear_simpo_loss(X, W, L, beta=0)
    with pytest.raises(ValueError, match="linear_logprobs: target has shape"):
        losses.linear_dpo_loss(X, W, L[:, :2], ref_hidden=X)
