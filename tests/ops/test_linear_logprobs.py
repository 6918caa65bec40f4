"""Log probabilities and entropies from hidden states, against their definitions in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from heads import SIXTEEN_BITS, check, logits, make, results
from torch.utils.checkpoint import checkpoint

from bigkernels import use
from bigkernels.bench.memory import extra_peak
from bigkernels.functional import linear_logprobs, quantize_weight
from bigkernels.ops import _chunks
from bigkernels.ops._chunks import Call, per_token, total
from bigkernels.ops.linear_logprobs import LogProbs

DTYPES = (torch.float64, torch.float32, *SIXTEEN_BITS)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(_chunks, "chunk_rows", lambda *_: 32)


def targets(tokens, vocabulary, ignored=(0.2,)):
    target = torch.randint(vocabulary, (tokens,))
    return torch.where(torch.rand(tokens) < ignored[0], -100, target)


def definition(target, scale=1.0, softcap=None, temperature=1.0):
    def formula(hidden, weight, bias):
        log_p = logits(hidden, weight, bias, scale, softcap, temperature).log_softmax(-1)
        of_target = log_p[torch.arange(len(target)), target.clamp_min(0).long()]
        entropy = -(log_p.exp() * log_p).sum(-1)
        return torch.where(target < 0, 0, of_target), torch.where(target < 0, 0, entropy)

    return formula


def ours(target, scale=1.0, softcap=None, temperature=1.0):
    options = {"logit_scale": scale, "softcap": softcap, "temperature": temperature}
    return lambda h, w, b: linear_logprobs(h, w, target, b, return_entropy=True, **options)


def upstream(tokens, outputs=2):
    return [torch.randn(tokens, dtype=torch.float64) for _ in range(outputs)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 37, 5), (33, 37, 40), (100, 1000, 40), (0, 37, 5), (70, 1, 3)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_sizes(dtype, sizes, strided):
    target = targets(*sizes[:2])
    check(ours(target), definition(target), make(*sizes, dtype, strided=strided), upstream(sizes[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "scale, softcap, temperature, bias", [*itertools.product((1.0, 0.3), (None, 2.0), (1.0, 0.7), (False, True))]
)
def test_options(dtype, scale, softcap, temperature, bias):
    target = targets(41, 37)
    options = scale, softcap, temperature
    check(ours(target, *options), definition(target, *options), make(41, 37, 40, dtype, bias=bias), upstream(41))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_some_are_frozen(frozen):
    target = targets(41, 37)
    check(ours(target), definition(target), make(41, 37, 40, torch.bfloat16), upstream(41), frozen=frozen)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_through_one_of_two_results(which):
    target = targets(41, 37)
    check(
        lambda *inputs: ours(target)(*inputs)[which : which + 1],
        lambda *inputs: definition(target)(*inputs)[which : which + 1],
        make(41, 37, 40),
        upstream(41, 1),
    )


def test_without_entropy():
    target = targets(41, 37)
    check(
        lambda h, w, b: [linear_logprobs(h, w, target, b)],
        lambda *inputs: definition(target)(*inputs)[:1],
        make(41, 37, 40),
        upstream(41, 1),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_in_the_ten_thousands(dtype):
    target = targets(41, 37)
    inputs, up = make(41, 37, 40, dtype, spread=1e4), [u / 64 for u in upstream(41)]
    check(ours(target), definition(target), inputs, up)
    assert all(t.isfinite().all() for t in results(ours(target), inputs, up).values())


def test_the_gradient_of_a_token_that_is_nearly_certain():
    """1 - p has all its digits although p has none left."""
    hidden = torch.tensor([[12.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    linear_logprobs(hidden, weight, torch.tensor([0])).backward(torch.ones(1))
    exact = torch.sigmoid(torch.tensor(-12.0, dtype=torch.float64))
    torch.testing.assert_close(hidden.grad[0, 0].double(), exact, rtol=1e-4, atol=0)


def test_classes_of_probability_zero():
    hidden, weight, bias = make(9, 37, 5)
    bias[3] = bias[20] = -torch.inf
    seen = bias.isfinite()
    target = torch.zeros(9, dtype=torch.int64)
    check(
        lambda h, w: ours(target)(h, w, bias),
        lambda h, w: definition(target)(h, w[seen], bias[seen]),
        (hidden, weight),
        upstream(9),
    )


def test_no_token_counts():
    target = torch.full((41,), 7)
    hidden, weight, bias = (t.requires_grad_() for t in make(41, 37, 5))
    out = linear_logprobs(hidden, weight, target, bias, ignore_index=7, return_entropy=True)
    (out[0] + out[1]).sum().backward()
    for t in (*out, hidden.grad, weight.grad, bias.grad):
        assert not t.any()


def test_shapes_and_index_types():
    hidden, weight, bias = make(12, 37, 5)
    target = targets(12, 37)
    flat = linear_logprobs(hidden, weight, target, bias)
    turned = hidden.view(3, 4, 5).transpose(0, 1)
    found = linear_logprobs(turned, weight, target.view(3, 4).T.int(), bias)
    assert found.shape == (4, 3) and torch.equal(found.T.flatten(), flat)
    assert linear_logprobs(hidden[0], weight, target[0].clamp_min(0), bias).shape == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_matter(dtype, monkeypatch):
    target = targets(200, 37)
    inputs, up = make(200, 37, 40, dtype), upstream(200)
    parts = results(ours(target), inputs, up)
    monkeypatch.setattr(_chunks, "chunk_rows", lambda *_: 1000)
    whole = results(ours(target), inputs, up)
    for name, value in whole.items():
        rtol = 3 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(parts[name], value, rtol=rtol, atol=rtol * value.abs().max().item())


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("summed", [False, True])
def test_many_chunks_lose_no_digits_of_the_gradients_of_the_head(dtype, summed):
    """All terms of one sign: a sum in 16 bits would stop growing."""
    hidden, weight, bias = make(4096, 7, 3, dtype)
    target = torch.zeros(4096, dtype=torch.int64)
    call = Call(LogProbs(target, False))

    def formula(*inputs):
        of_target = definition(target)(*inputs)[0]
        return [of_target.sum() if summed else of_target]

    check(
        lambda *inputs: [total(*inputs, None, call)] if summed else per_token(*inputs, call),
        formula,
        (hidden.abs(), weight, bias),
        [torch.tensor(1.0) if summed else torch.ones(4096)],
    )


@pytest.mark.parametrize("skip", [None, True, False])
def test_ignored_tokens_may_be_computed_in_vain(skip):
    """As on GPUs, where leaving them out would wait for the device."""
    target = targets(70, 37)
    kept = target >= 0
    call = Call(LogProbs(target.clamp_min(0), True), kept, skip=skip, softcap=3.0)
    check(lambda *inputs: per_token(*inputs, call), definition(target, softcap=3.0), make(70, 37, 5), upstream(70))
    count = kept.sum()
    check(
        lambda *inputs: [total(*inputs, count, call)],
        lambda *inputs: [definition(target, softcap=3.0)(*inputs)[0].sum() / count],
        make(70, 37, 5),
        [torch.tensor(2.0)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_plain_pytorch_where_no_kernel_is(dtype):
    target = targets(41, 37)
    with use("reference"):
        check(ours(target), definition(target), make(41, 37, 40, dtype), upstream(41))


def test_gradients_too_small_for_float16_are_not_lost():
    target = targets(41, 37, (0.0,))
    inputs = make(41, 37, 40, torch.float16)
    small = [u * 2.0**-20 for u in upstream(41)]
    found = results(ours(target), inputs, small)
    exact = results(definition(target), [t.double() for t in inputs], small)
    for i in range(3):
        error = (found[f"gradient {i}"].double() - exact[f"gradient {i}"]).abs().max()
        assert error <= 2.0**-24 + 2e-3 * exact[f"gradient {i}"].abs().max()


@pytest.mark.parametrize("config", ["int8", "nf4"])
def test_quantized_head(config):
    target = targets(41, 37)
    hidden, weight, bias = make(41, 37, 64, torch.float32)
    head = quantize_weight(weight, config)
    stored = head.dequantize(torch.float64)
    check(
        lambda h, b: ours(target, 0.5, 3.0)(h, head, b),
        lambda h, b: definition(target, 0.5, 3.0)(h, stored.to(h.dtype), b),
        (hidden, bias),
        upstream(41),
    )


@pytest.mark.parametrize("lowered", SIXTEEN_BITS, ids=str)
def test_autocast(lowered):
    """Hidden states are cast, the weight is read as it is, and gradients have the dtypes of what they are for."""
    target = targets(41, 37)
    hidden, weight, bias = make(41, 37, 40, torch.float32)

    def run(h, w, b):
        with torch.autocast("cpu", lowered):
            return ours(target)(h, w, b)

    def cast(h, w, b):
        return (
            definition(target)(h, w, b)
            if h.dtype == torch.float64
            else definition(target)(*(t.to(lowered) for t in (h, w, b)))
        )

    check(run, cast, (hidden, weight, bias), upstream(41), roundings=8.0)


def test_checkpoint_and_compile():
    target, up = targets(41, 37), upstream(41)
    inputs = make(41, 37, 40, torch.float32)
    run = ours(target)
    once = results(run, inputs, up)
    again = results(lambda *t: checkpoint(run, *t, use_reentrant=False), inputs, up)
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w, b: [2 * o for o in run(h * 1, w, b)], backend="aot_eager")
    doubled = results(compiled, inputs, up)
    for name, value in once.items():
        assert torch.equal(again[name], value)
        torch.testing.assert_close(doubled[name], 2 * value)


def test_transforms_see_through_it():
    target = targets(9, 37)
    inputs = make(9, 37, 5)
    found = torch.func.grad(lambda h, w, b: ours(target)(h, w, b)[0].sum(), argnums=(0, 1, 2))(*inputs)
    expected = results(lambda *t: ours(target)(*t)[:1], inputs, [torch.ones(9)])
    for i, g in enumerate(found):
        torch.testing.assert_close(g, expected[f"gradient {i}"])


def test_gradcheck():
    target = targets(5, 7, (0.3,))
    inputs = [t.requires_grad_() for t in make(5, 7, 3)]
    assert torch.autograd.gradcheck(ours(target, 0.5, 2.0, 0.8), inputs)


def test_inputs_stay_and_backward_repeats():
    target = targets(41, 37)
    inputs = make(41, 37, 40, torch.bfloat16)
    before = [t.clone() for t in (*inputs, target)]
    leaves = [t.requires_grad_() for t in inputs]
    out = ours(target)(*leaves)
    first = torch.autograd.grad(out[0].sum() + out[1].sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out[0].sum() + out[1].sum(), leaves)
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, before, (*inputs, target)))


def test_hidden_states_written_before_backward():
    hidden, weight, _ = make(5, 7, 3)
    out = linear_logprobs(hidden, weight.requires_grad_(), torch.zeros(5, dtype=torch.int64))
    hidden.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("entropy", [False, True])
def test_memory(entropy, monkeypatch):
    """Forward and backward hold some chunks, and the gradients: nothing of the size of the logits."""
    monkeypatch.undo()
    monkeypatch.setitem(_chunks._LEAST, "cpu", 0)
    tokens, vocabulary, size = 2048, 2048, 16
    hidden, weight, _ = (t.requires_grad_() for t in make(tokens, vocabulary, size, torch.bfloat16))
    target = targets(tokens, vocabulary)

    def step():
        out = linear_logprobs(hidden, weight, target, return_entropy=entropy)
        (out[0].sum() + out[1].sum() if entropy else out.sum()).backward()

    of_16_bit_logits = 2 * tokens * vocabulary
    peak = extra_peak(step, "cpu")
    assert peak < 4 * 0.05 * of_16_bit_logits + 8 * vocabulary * size + 4 * tokens * size + 64 * tokens
    assert peak > 32 * vocabulary * 4  # the measurement sees a chunk


def test_a_frozen_head_needs_no_gradient_of_its_size():
    hidden, weight, _ = make(64, 32, 20000, torch.bfloat16)
    hidden = hidden[:, :].requires_grad_()
    target = targets(64, 32)

    def peak(trained):
        weight.grad = None
        weight.requires_grad_(trained)
        return extra_peak(lambda: linear_logprobs(hidden, weight, target).sum().backward(), "cpu")

    assert peak(True) - peak(False) > 4 * weight.numel()


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"hidden": torch.zeros(4, 6)}, ValueError, r"hidden has shape \(4, 6\), expected \(\.\.\., 5\)"),
        ({"hidden": torch.zeros(4, 5).int()}, TypeError, "hidden is int32"),
        ({"weight": torch.zeros(7, 5).half()}, TypeError, "weight is float16 and hidden is float32"),
        ({"weight": torch.zeros(0, 5)}, ValueError, r"weight has shape \(0, 5\)"),
        ({"weight": [1.0]}, TypeError, "weight is list"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias has shape \(6,\), expected \(7,\)"),
        ({"target": torch.zeros(4)}, TypeError, "target is float32"),
        ({"target": torch.zeros(5).long()}, ValueError, r"target has shape \(5,\)"),
        ({"target": torch.tensor([0, 1, 2, 7])}, ValueError, r"target holds 7, outside the vocabulary \[0, 7\)"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan"),
    ],
)
def test_errors(changed, error, message):
    arguments = {"hidden": torch.zeros(4, 5), "weight": torch.zeros(7, 5), "target": torch.zeros(4).long()}
    with pytest.raises(error, match="bigkernels.functional.linear_logprobs: " + message):
        linear_logprobs(**{**arguments, **changed})
