"""Distillation from hidden states, against the formulas of the papers in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from heads import SIXTEEN_BITS, check, logits, make, results
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bigkernels.bench.memory import extra_peak
from bigkernels.functional import linear_distillation, quantize_weight
from bigkernels.ops import _chunks

DTYPES = (torch.float64, torch.float32, *SIXTEEN_BITS)
KINDS = ("forward_kl", "reverse_kl", "jsd")
TEACHERS = ("hidden", "logits", "topk")
ONE = [torch.tensor(1.3, dtype=torch.float64)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(_chunks, "chunk_rows", lambda *_: 32)


def between(kind, p, q, beta):
    """From probabilities, as the papers write it."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if kind == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    return kl(p, q) if kind == "forward_kl" else kl(q, p)


class Case:
    """A teacher and options; `ours` and `formula` are functions of (hidden, weight, bias)."""

    def __init__(
        self,
        tokens,
        vocabulary,
        dtype,
        teacher="hidden",
        kind="forward_kl",
        beta=0.5,
        temperature=1.0,
        squared=False,
        alpha=0.0,
        masked=True,
        reduction="mean",
        scale=1.0,
        softcap=None,
        teacher_scale=1.0,
        teacher_softcap=None,
        k=5,
        size=7,
        spread=1.0,
    ):
        self.kind, self.beta, self.temperature, self.alpha, self.reduction = kind, beta, temperature, alpha, reduction
        self.factor = temperature**2 if squared else 1.0
        self.head = scale, softcap
        self.kept = torch.rand(tokens) > 0.25 if masked else torch.ones(tokens, dtype=torch.bool)
        self.target = torch.where(self.kept, torch.randint(vocabulary, (tokens,)), -100)
        self.options = {
            "divergence": kind,
            "temperature": temperature,
            "temperature_squared": squared,
            "alpha": alpha,
            "reduction": reduction,
            "logit_scale": scale,
            "softcap": softcap,
        }
        if kind == "jsd":
            self.options["beta"] = beta
        if alpha or masked:
            self.options["target"] = self.target
        hidden, weight, bias = make(tokens, vocabulary, size, dtype, spread=spread)
        self.teacher_dtype = dtype
        self.hidden, self.weight, self.bias, self.of_teacher = hidden, weight, bias, (teacher_scale, teacher_softcap)
        self.classes = None
        if teacher == "hidden":
            self.options |= {
                "teacher_hidden": hidden,
                "teacher_weight": weight,
                "teacher_bias": bias,
                "teacher_logit_scale": teacher_scale,
                "teacher_softcap": teacher_softcap,
            }
        elif teacher == "logits":
            self.options["teacher_logits"] = self.z = logits(hidden, weight, bias, *self.of_teacher).to(dtype)
            self.hidden = None
        else:
            log_p = (logits(hidden, weight, bias, *self.of_teacher) / temperature).log_softmax(-1)
            self.log_p, self.classes = log_p.topk(k, -1)
            self.options["teacher_topk"] = self.log_p.to(dtype), self.classes.int()
            self.log_p = self.log_p.to(dtype)

    def ours(self, hidden, weight, bias):
        return [linear_distillation(hidden, weight, bias=bias, **self.options)]

    def formula(self, hidden, weight, bias):
        exact = hidden.dtype == torch.float64
        wide = torch.float64 if exact else torch.float32
        z = logits(hidden, weight, bias, *self.head)
        q = (z / self.temperature).softmax(-1)
        if self.classes is not None:
            p = self.log_p.to(wide).exp()
            q_few = q.gather(1, self.classes)
            if self.classes.shape[1] < z.shape[1]:
                others = torch.ones_like(q).scatter(1, self.classes, 0)
                p = torch.cat((p, (1 - p.sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).eps)), 1)
                q_few = torch.cat((q_few, (q * others).sum(-1, keepdim=True)), 1)
            p, q = p / p.sum(-1, keepdim=True), q_few
        elif self.hidden is not None:
            teacher = [
                t.to(torch.float64 if exact else self.teacher_dtype) for t in (self.hidden, self.weight, self.bias)
            ]
            p = (logits(*teacher, *self.of_teacher) / self.temperature).softmax(-1)
        else:
            p = (self.z.to(wide) / self.temperature).softmax(-1)
        loss = (1 - self.alpha) * self.factor * between(self.kind, p.to(wide), q, self.beta)
        loss = loss + self.alpha * F.cross_entropy(z, self.target.clamp_min(0), reduction="none")
        loss = torch.where(self.kept, loss, 0)
        if self.reduction == "none":
            return [loss]
        return [loss.sum() / self.kept.sum() if self.reduction == "mean" else loss.sum()]

    def check(self, inputs, **options):
        tokens = inputs[0].shape[0]
        up = [torch.randn(tokens, dtype=torch.float64)] if self.reduction == "none" else ONE
        check(self.ours, self.formula, inputs, up, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_teacher_and_divergence(dtype, teacher, kind, reduction):
    Case(41, 37, dtype, teacher, kind, reduction=reduction).check(make(41, 37, 40, dtype), roundings=4.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher, kind", [*itertools.product(TEACHERS, KINDS)])
@pytest.mark.parametrize("tokens, vocabulary, size", [(1, 37, 5), (33, 1000, 40), (70, 6, 3)])
def test_sizes(dtype, teacher, kind, tokens, vocabulary, size):
    masked = tokens > 1
    Case(tokens, vocabulary, dtype, teacher, kind, masked=masked).check(
        make(tokens, vocabulary, size, dtype, strided=True, bias=False), roundings=4.0
    )


@pytest.mark.parametrize("teacher, kind", [*itertools.product(TEACHERS, KINDS)])
@pytest.mark.parametrize("temperature, squared", [(2.0, False), (2.0, True), (0.5, True)])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_temperature_and_labels(teacher, kind, temperature, squared, alpha, reduction):
    for dtype in (torch.float64, torch.float32):
        Case(
            41, 37, dtype, teacher, kind, temperature=temperature, squared=squared, alpha=alpha, reduction=reduction
        ).check(make(41, 37, 40, dtype), roundings=4.0)


@pytest.mark.parametrize("teacher, kind", [*itertools.product(TEACHERS, KINDS)])
@pytest.mark.parametrize("scale, softcap", [(0.3, None), (1.5, 2.0)])
@pytest.mark.parametrize("teacher_scale, teacher_softcap", [(0.4, None), (1.7, 3.0)])
def test_scale_and_softcap_of_each(teacher, kind, scale, softcap, teacher_scale, teacher_softcap):
    case = Case(
        41,
        37,
        torch.float64,
        teacher,
        kind,
        scale=scale,
        softcap=softcap,
        teacher_scale=teacher_scale,
        teacher_softcap=teacher_softcap,
        alpha=0.2,
        temperature=1.5,
    )
    case.check(make(41, 37, 40))


@pytest.mark.parametrize("beta", [0.1, 0.9])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_beta(beta, teacher):
    Case(41, 37, torch.float64, teacher, "jsd", beta=beta).check(make(41, 37, 40))


def test_small_beta_is_the_forward_divergence():
    inputs = make(41, 37, 40)
    near, limit = (Case.__new__(Case) for _ in range(2))
    case = Case(41, 37, torch.float64, "logits", "forward_kl")
    near.options = case.options | {"divergence": "jsd", "beta": 1e-7}
    limit.options = case.options
    torch.testing.assert_close(near.ours(*inputs)[0] / 1e-7, limit.ours(*inputs)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 36, 37])
def test_number_of_classes(kind, k):
    Case(41, 37, torch.float64, "topk", kind, k=k).check(make(41, 37, 40))


@pytest.mark.parametrize("kind", KINDS)
def test_all_classes_are_the_whole_distribution(kind):
    inputs = make(41, 37, 40)
    torch.manual_seed(1)
    few = Case(41, 37, torch.float64, "topk", kind, k=37)
    torch.manual_seed(1)
    whole = Case(41, 37, torch.float64, "hidden", kind)
    torch.testing.assert_close(few.ours(*inputs), whole.ours(*inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_the_student_teaches_nothing(kind):
    hidden, weight, bias = (t.requires_grad_() for t in make(41, 37, 40))
    loss = linear_distillation(
        hidden, weight, bias=bias, teacher_hidden=hidden, teacher_weight=weight, teacher_bias=bias, divergence=kind
    )
    loss.backward()
    assert abs(loss) < 1e-15 and all(t.grad.abs().max() < 1e-15 for t in (hidden, weight, bias))


def test_the_teacher_gets_no_gradient():
    hidden, weight, _ = make(9, 37, 5)
    teacher = [t.requires_grad_() for t in make(9, 37, 7)]
    names = dict(zip(("teacher_hidden", "teacher_weight", "teacher_bias"), teacher, strict=True))
    linear_distillation(hidden.requires_grad_(), weight, **names).backward()
    assert hidden.grad.any() and all(t.grad is None for t in teacher)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher, kind", [*itertools.product(TEACHERS, ("forward_kl", "jsd"))])
def test_student_logits_in_the_ten_thousands(dtype, teacher, kind):
    """The formula from logarithms: probabilities as the papers have them are zero here."""
    case = Case(41, 37, dtype, teacher, kind, masked=False)
    inputs = make(41, 37, 40, dtype, spread=1e4)

    def formula(hidden, weight, bias):
        z = logits(hidden, weight, bias)
        wide = z.dtype
        log_q = z.log_softmax(-1)
        if teacher == "topk":
            others = z.scatter(1, case.classes, -torch.inf).logsumexp(-1, keepdim=True)
            log_q = torch.cat((z.gather(1, case.classes), others), 1).log_softmax(-1)
            p = case.log_p.to(wide).exp()
            p = torch.cat((p, (1 - p.sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).eps)), 1)
            log_p = p.log().log_softmax(-1)
        elif teacher == "hidden":
            own = torch.float64 if wide == torch.float64 else dtype
            log_p = logits(*(t.to(own) for t in (case.hidden, case.weight, case.bias))).to(wide).log_softmax(-1)
        else:
            log_p = case.z.to(wide).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        if kind == "forward_kl":
            return [(p * (log_p - log_q)).sum(-1).mean()]
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0, dtype=wide).log()
        return [((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)).mean() / 2]

    check(case.ours, formula, inputs, ONE, roundings=4.0)
    assert all(t.isfinite().all() for t in results(case.ours, inputs, ONE).values())


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_some_are_frozen(frozen, reduction):
    case = Case(41, 37, torch.bfloat16, alpha=0.5, reduction=reduction)
    case.check(make(41, 37, 40, torch.bfloat16), frozen=frozen, roundings=4.0)


def test_mask_and_target_both_leave_out():
    hidden, weight, bias = make(41, 37, 40)
    teacher = {"teacher_logits": torch.randn(41, 37)}
    mask, target = torch.rand(41) > 0.3, torch.where(torch.rand(41) > 0.3, 3, 11)
    both = linear_distillation(hidden, weight, target, bias, mask=mask, ignore_index=11, **teacher)
    each = linear_distillation(hidden, weight, bias=bias, reduction="none", **teacher)
    kept = mask & (target != 11)
    torch.testing.assert_close(both, each[kept].mean())
    apart = linear_distillation(hidden, weight, target, bias, mask=mask, ignore_index=11, reduction="none", **teacher)
    torch.testing.assert_close(apart, torch.where(kept, each, 0))


def test_more_dimensions():
    hidden, weight, bias = make(12, 37, 40)
    of_teacher = torch.randn(12, 37)
    flat = linear_distillation(hidden, weight, bias=bias, teacher_logits=of_teacher, reduction="none")
    turned = [t.view(3, 4, -1).transpose(0, 1) for t in (hidden, of_teacher)]
    found = linear_distillation(turned[0], weight, bias=bias, teacher_logits=turned[1], reduction="none")
    assert found.shape == (4, 3)
    torch.testing.assert_close(found.T.flatten(), flat)


@pytest.mark.parametrize("tokens", [0, 41])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_counts(tokens, reduction):
    inputs = [t.requires_grad_() for t in make(tokens, 37, 5)]
    target = torch.full((tokens,), -100)
    loss = linear_distillation(
        *inputs[:2], target, inputs[2], teacher_logits=torch.randn(tokens, 37), alpha=0.5, reduction=reduction
    )
    assert loss.isnan() if reduction == "mean" else not loss.any()
    loss.sum().backward()
    assert not any(t.grad.any() for t in inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_do_not_matter(dtype, reduction, monkeypatch):
    case, inputs = Case(200, 37, dtype, kind="jsd", alpha=0.5, reduction=reduction), make(200, 37, 40, dtype)
    up = [torch.randn(200)] if reduction == "none" else ONE
    parts = results(case.ours, inputs, up)
    monkeypatch.setattr(_chunks, "chunk_rows", lambda *_: 1000)
    for name, value in results(case.ours, inputs, up).items():
        rtol = 4 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(parts[name], value, rtol=rtol, atol=rtol * value.abs().max().item())


def test_quantized_heads():
    case = Case(41, 37, torch.float32, size=64)
    hidden, weight, bias = make(41, 37, 64, torch.float32)
    student, teacher = quantize_weight(weight, "int8"), quantize_weight(case.weight, "nf4")
    case.weight = teacher.dequantize(torch.float64)
    case.options["teacher_weight"] = teacher
    stored = student.dequantize(torch.float64)
    check(
        lambda h, b: case.ours(h, student, b),
        lambda h, b: case.formula(h, stored.to(h.dtype), b),
        (hidden, bias),
        ONE,
        roundings=8.0,
    )


def test_autocast():
    case, inputs = Case(41, 37, torch.float32), make(41, 37, 40, torch.float32)

    def ours(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return case.ours(*tensors)

    def formula(*tensors):
        exact = tensors[0].dtype == torch.float64
        case.teacher_dtype = torch.bfloat16
        return case.formula(*(tensors if exact else (t.bfloat16() for t in tensors)))

    check(ours, formula, inputs, ONE, roundings=8.0)


def test_checkpoint_and_compile():
    case, inputs = Case(41, 37, torch.float32, alpha=0.5), make(41, 37, 40, torch.float32)
    once = results(case.ours, inputs, ONE)
    again = results(lambda *t: checkpoint(case.ours, *t, use_reentrant=False), inputs, ONE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w, b: [2 * case.ours(h * 1, w, b)[0]], backend="aot_eager")
    doubled = results(compiled, inputs, ONE)
    for name, value in once.items():
        assert torch.equal(again[name], value)
        torch.testing.assert_close(doubled[name], 2 * value)


@pytest.mark.parametrize("teacher, kind", [*itertools.product(TEACHERS, KINDS)])
def test_transforms_see_through_it(teacher, kind):
    case, inputs = Case(9, 37, torch.float64, teacher, kind, alpha=0.5), make(9, 37, 5)
    found = torch.func.grad(lambda *t: case.ours(*t)[0], argnums=(0, 1, 2))(*inputs)
    expected = results(case.ours, inputs, [torch.tensor(1.0)])
    for i, g in enumerate(found):
        torch.testing.assert_close(g, expected[f"gradient {i}"])


@pytest.mark.parametrize("teacher, kind", [*itertools.product(TEACHERS, KINDS)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(teacher, kind, reduction):
    case = Case(5, 7, torch.float64, teacher, kind, temperature=1.3, alpha=0.4, softcap=2.0, k=3, reduction=reduction)
    inputs = [t.requires_grad_() for t in make(5, 7, 3)]
    assert torch.autograd.gradcheck(lambda *t: case.ours(*t)[0], inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_stay_and_backward_repeats(reduction):
    case = Case(41, 37, torch.bfloat16, "logits", "jsd", alpha=0.5, reduction=reduction)
    leaves = [t.requires_grad_() for t in make(41, 37, 40, torch.bfloat16)]
    kept = [t.detach().clone() for t in (*leaves, case.z, case.target)]
    loss = case.ours(*leaves)[0].sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, kept, (*leaves, case.z, case.target)))


@pytest.mark.parametrize("teacher", ["hidden", "topk"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory(teacher, kind, reduction, monkeypatch):
    """Eight chunks of float32 logits, and the gradients: nothing of the size of the logits."""
    monkeypatch.undo()
    monkeypatch.setitem(_chunks._LEAST, "cpu", 0)
    tokens, vocabulary, size = 2048, 2048, 16
    hidden, weight, _ = (t.requires_grad_() for t in make(tokens, vocabulary, size, torch.bfloat16))
    case = Case(tokens, vocabulary, torch.bfloat16, teacher, kind, reduction=reduction, size=size)
    peak = extra_peak(lambda: case.ours(hidden, weight, None)[0].sum().backward(), "cpu")
    of_16_bit_logits = 2 * tokens * vocabulary
    assert peak < 8 * 0.05 * of_16_bit_logits + 8 * vocabulary * size + 4 * tokens * size + 64 * tokens
    assert peak > 2 * 32 * vocabulary * 4  # the measurement sees a chunk


def given(**changed):
    arguments = {"hidden": torch.zeros(4, 5), "weight": torch.zeros(7, 5)}
    if not any(name.startswith("teacher_") for name in changed):
        changed["teacher_logits"] = torch.zeros(4, 7)
    return arguments | changed


TOPK = (torch.full((4, 2), -1.0), torch.tensor([[0, 1]] * 4))
HIDDEN = {"teacher_hidden": torch.zeros(4, 3), "teacher_weight": torch.zeros(7, 3)}


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"hidden": torch.zeros(4, 6)}, ValueError, r"hidden has shape \(4, 6\)"),
        ({"teacher_logits": None}, ValueError, "no teacher given"),
        ({"teacher_topk": TOPK, "teacher_logits": torch.zeros(4, 7)}, ValueError, "teacher_logits and teacher_topk"),
        ({"teacher_topk": TOPK, "teacher_softcap": 3.0}, ValueError, "teacher_softcap is given, and means nothing"),
        ({"teacher_topk": TOPK, "teacher_logit_scale": 3.0}, ValueError, "teacher_logit_scale is given, and means"),
        ({"teacher_topk": TOPK, "teacher_bias": torch.zeros(7)}, ValueError, "teacher_bias is given, and means"),
        ({"teacher_logits": torch.zeros(4, 6)}, ValueError, r"teacher_logits has shape \(4, 6\), expected \(4, 7\)"),
        ({"teacher_topk": (TOPK[0] + 1.5, TOPK[1])}, ValueError, r"teacher_topk\[0\] has probabilities that sum"),
        ({"teacher_topk": (TOPK[0], TOPK[1] + 6)}, ValueError, r"teacher_topk\[1\] holds 7, outside the vocabulary"),
        ({"teacher_topk": (TOPK[0], TOPK[1] * 0)}, ValueError, r"teacher_topk\[1\] holds a class twice"),
        ({"teacher_topk": (TOPK[0], TOPK[1].float())}, TypeError, r"teacher_topk\[1\] is float32"),
        ({"teacher_topk": (TOPK[0][:3], TOPK[1][:3])}, ValueError, r"teacher_topk has shape \(3, 2\)"),
        ({"teacher_topk": TOPK[0]}, TypeError, "teacher_topk must be"),
        ({**HIDDEN, "teacher_weight": None}, TypeError, "teacher_weight is NoneType"),
        ({**HIDDEN, "teacher_weight": torch.zeros(8, 3)}, ValueError, r"teacher_weight has shape \(8, 3\)"),
        ({**HIDDEN, "teacher_hidden": torch.zeros(3, 3)}, ValueError, r"teacher_hidden has shape \(3, 3\)"),
        ({**HIDDEN, "teacher_hidden": torch.zeros(4, 3).half()}, TypeError, "teacher_weight is float32"),
        ({**HIDDEN, "teacher_softcap": 0.0}, ValueError, "teacher_softcap is 0.0"),
        ({"divergence": "kl"}, ValueError, "divergence is 'kl'; accepted are forward_kl, reverse_kl, jsd"),
        ({"divergence": "jsd", "beta": 0.0}, ValueError, "beta is 0.0"),
        ({"beta": 0.3}, ValueError, "beta is 0.3, and means nothing to forward_kl"),
        ({"alpha": 1.0}, ValueError, "alpha is 1.0"),
        ({"alpha": 0.5}, ValueError, "alpha is 0.5, and the cross entropy needs target"),
        ({"alpha": 0.5, "target": torch.tensor([1, 2, 3, 7])}, ValueError, "target holds 7"),
        ({"reduction": "batchmean"}, ValueError, "reduction is 'batchmean'"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale is inf"),
        ({"mask": torch.ones(4)}, TypeError, "mask is float32"),
        ({"mask": torch.ones(3).bool()}, ValueError, r"mask has shape \(3,\)"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target has shape \(3,\)"),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error, match="bigkernels.functional.linear_distillation: " + message):
        linear_distillation(**given(**changed))
