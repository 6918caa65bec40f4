"""One head has one distribution: every loss sees its logits as they were accumulated, never rounded to 16 bits."""

from __future__ import annotations

import pytest
import torch
from heads import SIXTEEN_BITS, make

import bigkernels.functional as B
from bigkernels.ops.linear import _fwd as linear_fwd
from bigkernels.ops.quantized_linear import _fwd as quantized_fwd

pytestmark = pytest.mark.usefixtures("library")
TOKENS, VOCABULARY, SIZE = 70, 300, 64
FORMATS = ("int8", "int8-dynamic", "int4", "nf4", "fp8")
OPTIONS = ({}, {"softcap": 30.0}, {"logit_scale": 0.5})


def head(dtype, form=None):
    """Logits in the tens, as trained heads make them: one place of bfloat16 is 0.125 there."""
    hidden, weight, _ = make(TOKENS, VOCABULARY, SIZE, dtype, bias=False, spread=12.0)
    return hidden, weight if form is None else B.quantize_weight(weight, form)


def exact_logits(hidden, weight, softcap=None, logit_scale=1.0):
    dense = weight.double() if isinstance(weight, torch.Tensor) else weight.dequantize().double()
    z = logit_scale * (hidden.double() @ dense.T)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", [None, "int4", "nf4", "fp8"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_log_probabilities_are_those_of_float64(dtype, form, options):
    hidden, weight = head(dtype, form)
    target = torch.randint(VOCABULARY, (TOKENS,))
    log_p = exact_logits(hidden, weight, **options).log_softmax(-1)
    exact = log_p.gather(1, target[:, None])[:, 0]
    # A quantized weight is decoded to 16 bits before it is multiplied.
    bound = 1e-4 if form is None else 0.1
    found = {
        "log probabilities": B.linear_logprobs(hidden, weight, target, **options),
        "cross entropy": -B.linear_cross_entropy(hidden, weight, target, reduction="none", **options),
        "cross entropy in chunks": -B.linear_cross_entropy(
            hidden, weight, target, reduction="none", label_smoothing=1e-9, **options
        ),
        "distillation of a certain teacher": -B.linear_distillation(
            hidden,
            weight,
            reduction="none",
            teacher_logits=torch.full((TOKENS, VOCABULARY), -1e4).scatter(1, target[:, None], 1e4),
            **options,
        ),
    }
    for name, value in found.items():
        assert (value.double() - exact).abs().max() < bound, name
    first, *rest = found.values()
    for other in rest:  # policy ratios: exp(new - old) of one policy is 1
        torch.testing.assert_close(other, first, rtol=2e-5, atol=1e-4 if form is None else 0.1)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_a_teacher_equal_to_the_student_is_no_distance_away(dtype):
    hidden, weight = head(dtype)
    other = hidden.clone()
    loss = B.linear_distillation(hidden, weight, teacher_hidden=other, teacher_weight=weight)
    logits = exact_logits(hidden, weight).float()
    given = B.linear_distillation(hidden, weight, teacher_logits=logits)
    assert abs(loss.item()) < 1e-6 and abs(given.item()) < 1e-5


@pytest.mark.parametrize("tokens", [1, 3, 40, 600])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
def test_wide_products_round_to_the_narrow_ones(dtype, tokens):
    x, weight, bias = make(tokens, 129, SIZE, dtype)
    wide = linear_fwd(x, weight, bias, None, True)
    assert wide.dtype == torch.float32 and torch.equal(wide.to(dtype), linear_fwd(x, weight, bias, None))
    for form in FORMATS:
        q = B.quantize_weight(weight.float(), form)
        *operands, group, kind = q.operands()
        arguments = (x, *operands, bias, group, kind, SIZE, q.format.dynamic)
        wide = quantized_fwd(*arguments, True)
        assert wide.dtype == torch.float32 and torch.equal(wide.to(dtype), quantized_fwd(*arguments)), form


def test_at_every_level(isa):
    assert "passed" in isa.pytest(__file__, "-k", "round_to_the_narrow")
