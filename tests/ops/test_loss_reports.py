"""What the loss of a head reports beside itself, against the logits: predicted classes, their accuracy, the z-loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from heads import make
from torch.utils.checkpoint import checkpoint

import bigkernels
from bigkernels.functional import linear_cross_entropy, quantize_weight, quantized_linear
from bigkernels.nn import LinearCrossEntropyLoss
from bigkernels.ops import linear_cross_entropy as op
from bigkernels.ops.codes import NUMBERS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ALL = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.03},
    "softcap": {"softcap": 2.5},
    "focal": {"focal_gamma": 1.5},
    "scale": {"logit_scale": -0.6},
    "class": {"class_weight": True},
    "token": {"token_weight": True},
    "everything": {
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 4.0,
        "focal_gamma": 1.0,
        "logit_scale": 0.7,
        "class_weight": True,
        "token_weight": True,
    },
}


@pytest.fixture(params=["kernel", "chunks", "chunks without kernels", "reference"])
def way(request, monkeypatch):
    if request.param != "kernel":
        monkeypatch.setattr(op, "_kernel_serves", lambda *_: False)
    if request.param == "chunks without kernels":
        monkeypatch.setattr(op._logits.OPERATOR, "uses_kernel", lambda *_: False)
    if request.param == "reference":
        with bigkernels.use("reference"):
            yield request.param
        return
    yield request.param


def integers(tokens, vocabulary, size, dtype):
    """Products are exact in every dtype, and many of them equal."""
    return [torch.randint(-2, 3, shape).to(dtype) for shape in ((tokens, size), (vocabulary, size), (vocabulary,))]


def logits_of(hidden, weight, bias, options):
    z = F.linear(*(t if t is None else t.double() for t in (hidden, weight, bias))) * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    return z if cap is None else cap * torch.tanh(z / cap)


def targets(tokens, vocabulary):
    target = torch.randint(vocabulary, (tokens,))
    target[1::4] = -100
    return target


def of_z(z, target, options, reduction):
    kept = target != -100
    found = options.get("z_loss", 0.0) * z.logsumexp(-1) ** 2 * kept
    if "token_weight" in options:
        found = found * options["token_weight"].double()
    if reduction == "none":
        return found
    weight = options["class_weight"].double() if "class_weight" in options else torch.ones(z.shape[1]).double()
    return found.sum() / (weight[target[kept]].sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name, reduction",
    [(name, "mean") for name in OPTIONS]
    + [(name, reduction) for name in ("plain", "z_loss", "everything") for reduction in ("sum", "none")],
)
def test_reports(name, reduction, dtype, way):
    inputs = integers(41, 300, 7, dtype)
    target = targets(41, 300)
    options = {k: v for k, v in OPTIONS[name].items() if v is not True} | {"reduction": reduction}
    if OPTIONS[name].get("class_weight"):
        options["class_weight"] = torch.rand(300).to(dtype) + 0.2
    if OPTIONS[name].get("token_weight"):
        options["token_weight"] = torch.randn(41).to(dtype)
    leaves = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
    plain = linear_cross_entropy(*leaves[0][:2], target, leaves[0][2], **options)
    found = linear_cross_entropy(*leaves[1][:2], target, leaves[1][2], **options, **ALL)
    assert torch.equal(found.loss, plain)
    z = logits_of(*inputs, options)
    kept = target != -100
    best = torch.where(kept, z.argmax(-1), -1)
    if "softcap" in options:  # what rounds to the same tanh may differ by a rounding from function to function
        chosen = z[kept].gather(1, found.predicted_tokens[kept][:, None])[:, 0]
        torch.testing.assert_close(chosen, z[kept].amax(-1), rtol=1e-5, atol=1e-6)
        assert (found.predicted_tokens[~kept] == -1).all() and (found.predicted_tokens[kept] >= 0).all()
    else:
        assert torch.equal(found.predicted_tokens, best)
    right = (found.predicted_tokens == target) & kept
    expected = right.double() if reduction == "none" else right.sum().double() / kept.sum()
    torch.testing.assert_close(found.token_accuracy.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.z_loss.double(), of_z(z, target, options, reduction), rtol=1e-5, atol=1e-5)
    assert found.predicted_tokens.dtype == torch.int64 and found.loss.requires_grad
    assert not any(t.requires_grad for t in found[1:])
    assert found.token_accuracy.dtype == found.z_loss.dtype == found.loss.dtype
    for run in (plain, found.loss):
        run.sum().backward()
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("asked", [(name,) for name in ALL] + [tuple(ALL)[:2]], ids="+".join)
def test_only_what_is_asked_for(asked, way):
    hidden, weight, bias = integers(9, 30, 4, torch.float32)
    found = linear_cross_entropy(hidden, weight, targets(9, 30), bias, **dict.fromkeys(asked, True))
    fields = dict(zip(ALL, found[1:], strict=True))
    assert {name for name, value in fields.items() if value is not None} == set(asked)
    assert type(found).__name__ == "CrossEntropyOutput" and found.loss.shape == ()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 256, 3), (33, 257, 32), (300, 513, 33), (5, 70_001, 2)], ids=str)
def test_sizes(sizes):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, bias = integers(*sizes, dtype)
        found = linear_cross_entropy(hidden, weight, torch.zeros(sizes[0], dtype=torch.int64), bias, **ALL)
        assert torch.equal(found.predicted_tokens, logits_of(hidden, weight, bias, {}).argmax(-1))


def test_the_largest_anywhere():
    """At every place of a block of the vocabulary, once alone and once with an equal one behind it."""
    weight = torch.zeros(600, 4)
    weight[:, 0] = -1.0
    hidden, target = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([300])
    for at in (0, 1, 15, 16, 31, 32, 255, 256, 299, 300, 301, 511, 512, 599):
        for equal in (at, min(at + 1, 599), min(at + 40, 599), min(at + 256, 599), 599):
            w = weight.clone()
            w[at, 0] = w[equal, 0] = 2.0
            found = linear_cross_entropy(hidden, w, target, **ALL)
            assert found.predicted_tokens.tolist() == [at], (at, equal)
            assert found.token_accuracy == (at == 300)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_is_not_a_number(dtype, way):
    """As torch.argmax: the first NaN is the largest, then the first infinity; where all are -inf, the first."""
    nan, inf = torch.nan, torch.inf
    hidden, weight = torch.zeros(1, 4, dtype=dtype), torch.zeros(600, 4, dtype=dtype)
    for at in (
        {300: nan},
        {0: nan},
        {599: nan},
        {20: nan, 300: nan},
        {300: nan, 400: nan},
        {300: nan, 310: nan},
        {290: nan, 300: nan},
        {5: inf, 300: nan},
        {5: inf},
        {300: inf},
        {5: inf, 300: inf, 599: inf},
        {5: inf, 310: nan},
        {i: -inf for i in range(600)},
        {i: -inf for i in range(600)} | {77: nan},
        {i: -inf for i in range(599)},
    ):
        bias = torch.zeros(600, dtype=dtype)
        bias[list(at)] = torch.tensor(list(at.values()), dtype=dtype)
        for target in (300, 3):
            found = linear_cross_entropy(hidden, weight, torch.tensor([target]), bias, **ALL)
            assert found.predicted_tokens.item() == bias.argmax().item(), (at, target)


def test_rows_of_nan(way):
    hidden, weight, _ = make(70, 300, 16, torch.float32)
    hidden[3], hidden[40, 5], hidden[69] = torch.nan, torch.inf, torch.nan
    weight[7, 5] = 0.0  # times infinity
    target = targets(70, 300)
    target[torch.tensor([3, 40, 69])] = torch.tensor([0, 7, 299])
    found = linear_cross_entropy(hidden, weight, target, **ALL)
    expected = F.linear(hidden, weight).argmax(-1)
    kept = target != -100
    assert torch.equal(found.predicted_tokens[kept], expected[kept]) and found.loss.isnan()


def test_softcap_makes_ties(way):
    """Beyond some 9 times the cap all logits are the cap in float32, and the first one wins."""
    hidden, weight = torch.ones(2, 1), torch.arange(600.0)[:, None].clone()
    weight[:30] = -1.0
    found = linear_cross_entropy(hidden, weight, torch.tensor([40, 3]), softcap=2.0, **ALL)
    capped = 2.0 * torch.tanh(F.linear(hidden, weight) / 2.0)
    assert abs(found.predicted_tokens - capped.argmax(-1)).max() <= 2 and found.predicted_tokens.max() < 60


@pytest.mark.parametrize("tokens", [0, 12])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_counts(tokens, reduction, way):
    hidden, weight, bias = integers(tokens, 30, 4, torch.float32)
    found = linear_cross_entropy(
        hidden.requires_grad_(), weight, torch.full((tokens,), -100), bias, z_loss=0.1, reduction=reduction, **ALL
    )
    assert (found.predicted_tokens == -1).all() and found.predicted_tokens.shape == (tokens,)
    if reduction == "none":
        assert found.token_accuracy.shape == found.z_loss.shape == (tokens,)
        assert not found.token_accuracy.any() and not found.z_loss.any()
    else:
        assert found.token_accuracy.isnan() and (found.z_loss.isnan() if reduction == "mean" else found.z_loss == 0)


def test_dimensions_and_int32(way):
    hidden, weight, bias = integers(12, 30, 4, torch.float32)
    target = targets(12, 30).view(3, 4).int()
    found = linear_cross_entropy(hidden.view(3, 4, 4), weight, target, bias, reduction="none", **ALL)
    assert {t.shape for t in found} == {(3, 4)}
    turned = linear_cross_entropy(hidden.view(3, 4, 4).transpose(0, 1), weight, target.T, bias, reduction="none", **ALL)
    assert torch.equal(turned.predicted_tokens.T, found.predicted_tokens)


@pytest.mark.parametrize("config", ["int8", "int8-dynamic", "int4", "nf4", "fp8"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_quantized_heads(config, smoothing):
    hidden, weight, _ = make(40, 300, 128, torch.float32)
    head, target = quantize_weight(weight, config), targets(40, 300)
    hidden.requires_grad_()
    found = linear_cross_entropy(hidden, head, target, label_smoothing=smoothing, **ALL)
    z = quantized_linear(hidden.detach(), head)
    kept = target != -100
    chosen = z[kept].gather(1, found.predicted_tokens[kept][:, None])[:, 0]
    torch.testing.assert_close(chosen, z[kept].amax(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.token_accuracy, ((z.argmax(-1) == target) & kept).sum() / kept.sum())
    found.loss.backward()
    assert hidden.grad.any()


def test_autocast():
    hidden, weight, bias = integers(12, 300, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets(12, 300), bias, **ALL)
    assert found.loss.dtype == torch.float32
    expected = torch.where(targets(12, 300) != -100, F.linear(hidden, weight, bias).argmax(-1), -1)
    assert torch.equal(found.predicted_tokens, expected)


def test_any_number_of_threads():
    hidden, weight, bias = integers(333, 517, 20, torch.bfloat16)
    target = targets(333, 517)
    expected = torch.where(target != -100, logits_of(hidden, weight, bias, {}).argmax(-1), -1)
    before = torch.get_num_threads()
    try:
        for threads in range(1, 8):
            torch.set_num_threads(threads)
            hidden.requires_grad_(threads % 2 == 1)
            found = linear_cross_entropy(hidden, weight, target, bias, **ALL)
            assert torch.equal(found.predicted_tokens, expected)
    finally:
        torch.set_num_threads(before)


def test_every_level(isa):
    chosen = "not chunks and not reference and (everything or number or rows or sizes or anywhere or of_logits)"
    assert "passed" in isa.pytest(__file__, "-k", chosen)


def test_derivatives_of_gradients(way):
    if way == "chunks without kernels":
        pytest.skip("as chunks")
    hidden, weight, bias = (t.requires_grad_() for t in make(6, 40, 5, torch.float32))
    target = targets(6, 40)
    seconds = []
    for reports in ({}, ALL):
        loss = linear_cross_entropy(hidden, weight, target, bias, z_loss=0.1, **reports)
        loss = loss.loss if reports else loss
        grads = torch.autograd.grad(loss, (hidden, weight, bias), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (hidden, weight, bias)))
    for a, b in zip(*seconds, strict=True):
        assert torch.equal(a, b)


def test_transforms_graphs_and_checkpoints():
    hidden, weight, bias = make(6, 40, 5, torch.float32)
    target = targets(6, 40)

    def loss(h):
        found = linear_cross_entropy(h, weight, target, bias, z_loss=0.1, **ALL)
        return found.loss, found

    plain = loss(hidden)[1]
    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf)[0], leaf)
    grad, found = torch.func.grad(loss, has_aux=True)(hidden)
    torch.testing.assert_close(grad, expected)
    assert torch.equal(found.predicted_tokens, plain.predicted_tokens)
    batched = torch.func.vmap(lambda h: loss(h)[1])(torch.stack((hidden, -hidden)))
    assert torch.equal(batched.predicted_tokens[0], plain.predicted_tokens) and batched.loss.shape == (2,)
    again = checkpoint(lambda h: loss(h)[1], leaf, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.loss, leaf)[0], expected)
    torch._dynamo.reset()
    compiled = torch.compile(lambda h: loss(h)[1], backend="aot_eager", fullgraph=True)
    found = compiled(leaf)
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaf)[0], expected)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("report", [False, True])
def test_raw_operator(report, library):
    hidden, weight, bias = integers(9, 300, 4, torch.bfloat16)
    target = targets(9, 300)
    args = (
        hidden,
        weight,
        None,
        None,
        None,
        None,
        0,
        NUMBERS,
        bias.float(),
        target,
        None,
        None,
        -100,
        1,
        0.0,
        0.1,
        0.0,
        0.0,
        1.0,
        False,
        False,
        False,
        report,
    )
    raw = torch.ops.bigkernels.linear_cross_entropy_fwd.default
    torch.library.opcheck(raw, args)
    *_, predicted, lse = raw(*args)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    fallback = raw.redispatch(keys, *args)
    assert torch.equal(predicted, fallback[-2])
    torch.testing.assert_close(lse, fallback[-1])
    assert predicted.shape == lse.shape == (9 if report else 0,)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("vocabulary", [1, 7, 128, 600, 5001])
def test_raw_operator_of_logits(vocabulary, softcap, dtype, library):
    logits = torch.randint(-9, 10, (23, vocabulary)).to(dtype)
    target = targets(23, vocabulary)
    for row, at, value in (
        (0, -1, torch.nan),
        (2, 0, torch.nan),
        (3, vocabulary // 2, torch.inf),
        (4, vocabulary // 3, torch.nan),
    ):
        logits[row, at] = value
    logits[6], logits[7, : vocabulary - 1] = -torch.inf, -torch.inf
    logits[8, vocabulary // 2 :] = torch.nan
    args = (logits, target, None, None, -100, 0, 0.1, 0.0, softcap, 0.0)
    raw = torch.ops.bigkernels.cross_entropy_predict.default
    *found, predicted = raw(*args)
    expected = torch.ops.bigkernels.cross_entropy_fwd(*args)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert torch.equal(predicted, torch.where(target == -100, -1, logits.argmax(-1)))
    if (vocabulary, softcap, dtype) == (7, 3.0, torch.bfloat16):
        torch.library.opcheck(raw, (torch.randn(5, 7), torch.randint(7, (5,)), *args[2:]))


def test_module():
    loss = LinearCrossEntropyLoss(4, 30, bias=True, return_predicted_tokens=True, return_token_accuracy=True)
    hidden, target = torch.randn(9, 4), targets(9, 30)
    found = loss(hidden, target)
    z = F.linear(hidden, loss.weight, loss.bias)
    assert torch.equal(found.predicted_tokens, torch.where(target == -100, -1, z.argmax(-1)))
    assert found.z_loss is None and "return_token_accuracy=True" in repr(loss)
    assert "return" not in repr(LinearCrossEntropyLoss(4, 30))
    found.loss.backward()
    assert loss.weight.grad.any()
