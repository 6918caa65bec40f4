"""The loss of a linear layer's outputs without them, against the formula written out in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from heads import SIXTEEN_BITS, check, make, results
from pretend_gpu import PretendGpu, pretend, put
from torch.utils.checkpoint import checkpoint

from bigkernels.bench.memory import extra_peak
from bigkernels.functional import linear_cross_entropy, quantize_weight, quantized_linear
from bigkernels.nn import LinearCrossEntropyLoss
from bigkernels.ops import _chunks
from bigkernels.ops import linear_cross_entropy as op

DTYPES = (torch.float64, torch.float32, *SIXTEEN_BITS)
ONE = [torch.tensor(1.3, dtype=torch.float64)]
OPTIONS = {
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.03},
    "softcap": {"softcap": 2.5},
    "focal": {"focal_gamma": 1.5},
    "scale": {"logit_scale": -0.6},
    "class": {"class_weight": True},
    "token": {"token_weight": True},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "ignore": {"ignore_index": 3},
}
PAIRS = [
    (),
    *((a,) for a in OPTIONS),
    *itertools.combinations(OPTIONS, 2),
    tuple(n for n in OPTIONS if n != "sum"),
    tuple(n for n in OPTIONS if n not in ("smoothing", "none")),
]


class Case:
    """Targets and options; `ours` and `formula` are functions of (hidden, weight, bias)."""

    def __init__(self, tokens, vocabulary, dtype=torch.float64, *, masked=True, **options):
        ignored = options.get("ignore_index", -100)
        self.target = torch.randint(vocabulary, (tokens,))
        self.target[torch.rand(tokens) < 0.25 * masked] = ignored
        self.kept = self.target != ignored
        if options.get("class_weight"):
            options["class_weight"] = torch.rand(vocabulary).to(dtype) + 0.2
        if options.get("token_weight"):
            options["token_weight"] = torch.randn(tokens).to(dtype)
        self.options, self.tokens = options, tokens

    def ours(self, hidden, weight, bias):
        return [linear_cross_entropy(hidden, weight, self.target, bias, **self.options)]

    def formula(self, hidden, weight, bias):
        o, wide = self.options, torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Products of 16-bit numbers, added up in float32: nothing is rounded between.
        z = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
        return [self.loss(z * o.get("logit_scale", 1.0))]

    def loss(self, z):
        o, wide = self.options, z.dtype
        if o.get("softcap"):
            z = o["softcap"] * torch.tanh(z / o["softcap"])
        lse = z.logsumexp(-1)
        y = torch.where(self.kept, self.target, 0)
        nll = lse - z.gather(1, y[:, None])[:, 0]
        c = torch.ones(z.shape[1], dtype=wide) if o.get("class_weight") is None else o["class_weight"].to(wide)
        e = o.get("label_smoothing", 0.0)
        ce = (1 - e) * c[y] * nll
        if e:
            ce = ce + e / z.shape[1] * (c * (lse[:, None] - z)).sum(-1)
        if o.get("focal_gamma"):
            ce = ce * (-torch.expm1(-nll)).clamp_min(0) ** o["focal_gamma"]
        loss = ce + o.get("z_loss", 0.0) * lse**2
        if o.get("token_weight") is not None:
            loss = loss * o["token_weight"].to(wide)
        loss = torch.where(self.kept, loss, 0)
        reduction = o.get("reduction", "mean")
        if reduction == "none":
            return loss
        return loss.sum() / (c[y] * self.kept).sum() if reduction == "mean" else loss.sum()

    def check(self, inputs, **more):
        one = self.options.get("reduction") != "none"
        up = ONE if one else [torch.randn(self.tokens, dtype=torch.float64)]
        check(self.ours, self.formula, inputs, up, **{"roundings": 4.0} | more)


@pytest.fixture(params=["kernel", "chunks"])
def way(request, monkeypatch):
    if request.param == "chunks":
        monkeypatch.setattr(op, "_kernel_serves", lambda *_: False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_options_in_pairs(names, dtype, way):
    if {"none", "sum"} <= set(names):
        pytest.skip("one reduction a call")
    options = {k: v for name in names for k, v in OPTIONS[name].items()}
    Case(41, 137, dtype, **options).check(make(41, 137, 40, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 33, 300])
@pytest.mark.parametrize("size", [1, 33, 64])
@pytest.mark.parametrize("vocabulary", [37, 129, 1000])
def test_sizes_and_strides(tokens, size, vocabulary, dtype):
    for strided, bias in ((False, True), (True, False)):
        inputs = make(tokens, vocabulary, size, dtype, strided=strided, bias=bias)
        Case(tokens, vocabulary, dtype, masked=tokens > 1).check(inputs, roundings=8.0)
        Case(tokens, vocabulary, dtype, masked=tokens > 1, reduction="none", softcap=3.0).check(inputs, roundings=8.0)


def test_every_level(isa):
    assert "passed" in isa.pytest(__file__, "-k", "kernel and (focal or smoothing or jump) or sizes or confident")


def test_more_dimensions_and_int32():
    hidden, weight, bias = make(12, 37, 40, torch.float32)
    target = torch.randint(37, (3, 4))
    flat = linear_cross_entropy(hidden, weight, target.flatten().int(), bias, reduction="none")
    turned = hidden.view(3, 4, -1).transpose(0, 1)
    found = linear_cross_entropy(turned, weight, target.T, bias, reduction="none")
    assert found.shape == (4, 3) and torch.equal(found.T.flatten(), flat)


@pytest.mark.parametrize("tokens", [0, 41])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_counts(tokens, reduction, way):
    inputs = [t.requires_grad_() for t in make(tokens, 137, 5, torch.float32)]
    loss = linear_cross_entropy(*inputs[:2], torch.full((tokens,), -100), inputs[2], reduction=reduction)
    assert loss.isnan() if reduction == "mean" else not loss.any()
    if reduction != "mean":  # a mean over nothing has no gradient that anyone could want
        loss.sum().backward()
        assert not any(t.grad.any() for t in inputs)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_confident_tokens_keep_their_gradients_digits(dtype):
    """1 - p, down to 1e-9, is lost where p is rounded first. What comes from above lifts it into float16's range."""
    margins = torch.tensor([1.0, 8.0, 16.0, 20.0, 24.0])
    weight = torch.zeros(140, 8)
    weight[3, 0] = 1.0
    hidden = torch.zeros(5, 8)
    hidden[:, 0] = margins
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
    up = torch.ones(5) if dtype != torch.float16 else 2.0 ** (1.4 * margins).round()
    loss = linear_cross_entropy(*leaves, torch.full((5,), 3), reduction="none")
    loss.backward(up)
    others = 139 * torch.exp(-margins.double())
    exact = -others / (1 + others)
    torch.testing.assert_close(loss.detach().double(), torch.log1p(others), rtol=1e-5, atol=0)
    rtol = max(1e-5, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(leaves[0].grad[:, 0].double() / up.double(), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tokens", [20, 300])
def test_jump_of_a_later_logit(tokens, dtype, way):
    """The shift that the exponentials have so far is far too small, for some tokens in several places."""
    hidden, weight, bias = make(tokens, 1000, 64, dtype)
    for at, jump in ((150, 80.0), (700, 200.0), (999, 400.0)):
        weight[at] = 0
        weight[at, 0] = jump
    hidden[:, 0] = torch.where(torch.arange(tokens) % 3 == 0, 1.0, 0.01)
    Case(tokens, 1000, dtype).check([hidden, weight, bias], roundings=8.0)


@pytest.mark.parametrize("at", [3, 20, 45, 255, 256, 599])
@pytest.mark.parametrize("biased", [False, True])
def test_one_large_logit_wherever_it_is(at, biased):
    """The exponentials are shifted by the largest logit, which any lane of a block may have."""
    inputs = make(20, 600, 64, torch.float32, bias=biased)
    inputs[0][:, 0], inputs[1][at], inputs[1][at, 0] = 1.0, 0.0, 200.0
    Case(20, 600, torch.float32).check(inputs)


@pytest.mark.parametrize("first", [0, 1])
def test_upstream_gradients_far_apart(first):
    """float16 holds the factors of the tokens relative to the largest one, wherever it is."""
    case, inputs = Case(40, 600, torch.float16, reduction="none"), make(40, 600, 64, torch.float16)
    up = torch.where(torch.arange(40) % 2 == first, 1e3, 1e-3).double()
    check(case.ours, case.formula, inputs, [up], roundings=8.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_in_the_ten_thousands(dtype, way):
    inputs = make(41, 137, 40, dtype, spread=1e4)
    case = Case(41, 137, dtype)
    assert all(t.isfinite().all() for t in results(case.ours, inputs, ONE).values())
    case.check(inputs, roundings=8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_classes_ruled_out_by_the_bias(dtype, way):
    hidden, weight, bias = make(41, 300, 40, dtype)
    bias[torch.arange(300) % 7 == 2] = -torch.inf
    bias[:128] = -torch.inf  # all of the first block
    bias[[5, 290]] = 0.0
    case = Case(41, 300, dtype)
    case.target = torch.where(case.kept, torch.where(torch.arange(41) % 2 == 0, 5, 290), -100)
    found = results(case.ours, [hidden, weight, bias], ONE)
    with torch.no_grad():
        assert torch.isfinite(found["output 0"])
    allowed = bias.isfinite()
    few = Case(41, int(allowed.sum()), dtype)
    few.target = torch.where(case.kept, (allowed.cumsum(0) - 1)[case.target.clamp_min(0)], -100)
    few.kept = case.kept
    expected = results(few.formula, [t.double() for t in (hidden, weight[allowed], bias[allowed])], ONE)
    rtol = 8 * torch.finfo(dtype).eps
    for i, rows in ((0, slice(None)), (1, allowed), (2, allowed)):
        e = expected[f"gradient {i}"]
        found_rows = found[f"gradient {i}"][rows].double()
        torch.testing.assert_close(found_rows, e, rtol=rtol, atol=rtol * e.abs().max().item())
    assert not found["gradient 1"][~allowed].any() and not found["gradient 2"][~allowed].any()


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_some_are_frozen(frozen, reduction, way):
    Case(41, 137, torch.bfloat16, reduction=reduction).check(make(41, 137, 40, torch.bfloat16), frozen=frozen)


@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "int4", "nf4", "fp8"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "reduction": "none"}, {"label_smoothing": 0.1}], ids=str)
def test_quantized_heads(name, options):
    case = Case(41, 137, torch.float32, **options)
    hidden, weight, bias = make(41, 137, 64, torch.float32)
    qweight = quantize_weight(weight, name)
    stored = qweight.dequantize(torch.float64)

    def formula(hidden, bias):
        if name == "int8-dynamic":  # also rounds the tokens
            z = quantized_linear(hidden, qweight, bias)
            return [case.loss(z)]
        return case.formula(hidden, stored.to(hidden.dtype), bias)

    up = [torch.randn(41, dtype=torch.float64)] if options.get("reduction") == "none" else ONE
    check(lambda h, b: case.ours(h, qweight, b), formula, (hidden, bias), up, roundings=16.0)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(weights):
    case = Case(41, 137, torch.float32)
    hidden, weight, bias = make(41, 137, 40, torch.float32)
    inputs = hidden, weight.to(weights), bias.to(weights)

    def ours(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return case.ours(*tensors)

    def formula(hidden, weight, bias):
        # What autocast does to a linear layer.
        lowered = hidden.dtype if hidden.dtype == torch.float64 else torch.bfloat16
        return case.formula(hidden.to(lowered), weight.to(lowered), bias.to(lowered))

    check(ours, formula, inputs, ONE, roundings=8.0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_kept_and_recomputed_numbers_are_the_same(dtype, monkeypatch):
    """More tokens than features: some exponentials wait in the gradient's memory, others are made again. Features of
    zeros make room for all of them and change nothing.
    """
    case = Case(300, 300, dtype)
    hidden, weight, bias = make(300, 300, 40, dtype)
    wide = [torch.cat((t, torch.zeros(t.shape[0], 400, dtype=dtype)), 1) for t in (hidden, weight)]
    few = results(case.ours, [hidden, weight, bias], ONE)
    many = results(case.ours, [*wide, bias], ONE)
    rtol = 4 * torch.finfo(dtype).eps
    for name, value in few.items():
        other = many[name][:, :40] if value.dim() == 2 else many[name]
        torch.testing.assert_close(other, value, rtol=rtol, atol=rtol * value.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic(threads, dtype):
    case, inputs = Case(300, 1000, dtype), make(300, 1000, 64, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = results(case.ours, inputs, ONE)
        for _ in range(3):
            assert all(torch.equal(v, first[n]) for n, v in results(case.ours, inputs, ONE).items())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tokens", [20, 300])
def test_inputs_stay_and_backward_repeats(tokens, reduction, way):
    case = Case(tokens, 300, torch.bfloat16, reduction=reduction, token_weight=True, class_weight=True)
    leaves = [t.requires_grad_() for t in make(tokens, 300, 40, torch.bfloat16)]
    kept = [t.detach().clone() for t in (*leaves, case.target)]
    loss = case.ours(*leaves)[0].sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b.float(), 3 * a.float(), rtol=2**-6, atol=2**-8 * b.abs().max().item())
    assert all(map(torch.equal, kept, (*leaves, case.target)))


def test_checkpoint(way):
    case, inputs = Case(41, 137, torch.float32), make(41, 137, 40, torch.float32)
    once = results(case.ours, inputs, ONE)
    again = results(lambda *t: checkpoint(case.ours, *t, use_reentrant=False), inputs, ONE)
    assert all(torch.equal(again[name], value) for name, value in once.items())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(reduction):
    case, inputs = Case(41, 137, torch.float32, reduction=reduction), make(41, 137, 40, torch.float32)
    up = [torch.randn(41)] if reduction == "none" else ONE
    once = results(case.ours, inputs, up)
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w, b: [2 * case.ours(h * 1, w, b)[0]], backend="aot_eager", fullgraph=True)
    for name, value in results(compiled, inputs, up).items():
        torch.testing.assert_close(value, 2 * once[name])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_and_transforms(reduction):
    case = Case(
        5,
        7,
        reduction=reduction,
        label_smoothing=0.1,
        z_loss=0.2,
        class_weight=True,
        token_weight=True,
        focal_gamma=1.5,
        logit_scale=1.3,
    )
    inputs = [t.requires_grad_() for t in make(5, 7, 3)]
    assert torch.autograd.gradcheck(lambda *t: case.ours(*t)[0], inputs)
    inputs = [t.detach().float() for t in inputs]
    found = torch.func.grad(lambda *t: case.ours(*t)[0].sum(), argnums=(0, 1, 2))(*inputs)
    up = [torch.ones(5)] if reduction == "none" else [torch.tensor(1.0)]
    for i, g in enumerate(found):
        torch.testing.assert_close(g, results(case.ours, inputs, up)[f"gradient {i}"])


@pytest.mark.parametrize("seed", range(60))
def test_fuzz(seed):
    draw = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=draw))]

    torch.manual_seed(seed)
    dtype, tokens, size = pick(*DTYPES[1:]), pick(1, 2, 31, 32, 65, 200), pick(1, 7, 32, 63, 130, 300)
    vocabulary = pick(2, 31, 128, 129, 255, 640)
    names = [name for name in OPTIONS if name != "ignore" and pick(True, False, False)]
    options = {k: v for name in names for k, v in OPTIONS[name].items()}
    if "z_loss" in names and "logit_scale" in options:
        options["logit_scale"] = 0.6
    case = Case(tokens, vocabulary, dtype, masked=tokens > 2, **options)
    case.check(make(tokens, vocabulary, size, dtype, bias=pick(True, False), strided=pick(True, False)), roundings=8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(dtype):
    """Forward and backward need less than a twentieth of the logits beyond the gradients."""
    tokens, size, vocabulary = 2048, 256, 16000
    hidden, weight, _ = (
        None if t is None else t.requires_grad_() for t in make(tokens, vocabulary, size, dtype, bias=False)
    )
    target = torch.randint(vocabulary, (tokens,))
    width = hidden.element_size()
    gradients = (tokens + vocabulary) * size * width

    def step():
        linear_cross_entropy(hidden, weight, target).backward()

    used = extra_peak(step, "cpu") - gradients
    assert used < 0.05 * tokens * vocabulary * width + 2**20
    hidden.grad = weight.grad = None


@pytest.mark.parametrize("vocabulary", [50_000, 250_000])
def test_large_vocabularies(vocabulary, way):
    """Sums over a vocabulary, one number far above many small ones, stay exact."""
    Case(14, vocabulary, torch.float32).check(make(14, vocabulary, 8, torch.float32, bias=False), roundings=8.0)


def test_module():
    torch.manual_seed(0)
    theirs = torch.nn.LinearCrossEntropyLoss(16, 90, bias=True, label_smoothing=0.1, ignore_index=4, reduction="sum")
    ours = LinearCrossEntropyLoss(16, 90, bias=True, label_smoothing=0.1, ignore_index=4, reduction="sum")
    assert ours.weight.shape == theirs.linear.weight.shape and ours.weight.abs().max() <= 0.25
    assert ours.weight.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.1)
    ours.load_state_dict({name.removeprefix("linear."): t for name, t in theirs.state_dict().items()})
    hidden, target = torch.randn(11, 16), torch.randint(90, (11,))
    torch.testing.assert_close(ours(hidden, target), theirs(hidden, target))
    assert "label_smoothing=0.1" in repr(ours) and "num_classes=90" in repr(ours)

    embedding = torch.nn.Embedding(90, 16)
    tied = LinearCrossEntropyLoss(16, 90, class_weight=torch.rand(90), z_loss=0.1)
    tied.weight = embedding.weight
    tied(embedding(target), target, torch.rand(11)).backward()
    assert embedding.weight.grad is not None and set(tied.state_dict()) == {"weight", "class_weight"}
    assert LinearCrossEntropyLoss(4, 5, dtype=torch.bfloat16, device="meta").weight.is_meta


@pytest.mark.parametrize("worth, capturing, computed", [(1, False, 13), (2**30, False, 40), (1, True, 40)])
def test_ignored_tokens_are_left_out_on_a_gpu(worth, capturing, computed, monkeypatch):
    """Where counting them costs less than it saves, and nothing goes into a CUDA graph."""
    tokens, split = [], _chunks._split
    monkeypatch.setattr(_chunks, "_WORTH_WAITING", worth)
    monkeypatch.setattr(_chunks, "_split", lambda *args: tokens.extend(split(*args)) or split(*args))
    pretend(monkeypatch, capturing)
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    target = torch.randint(50, (40,))
    target[13:] = -100
    expected = F.cross_entropy(hidden @ weight.T, target)
    put(hidden, weight, target)
    with PretendGpu(waits="refused" if computed == 40 else "allowed"):
        loss = linear_cross_entropy(hidden, weight, target)
        found = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (hidden, weight)))
    counts = [len(range(*t.indices(40))) if isinstance(t, slice) else len(t) for t in tokens]
    assert sum(counts) == computed
