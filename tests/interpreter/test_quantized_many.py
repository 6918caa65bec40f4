"""Quantized layers of many tokens as GPUs compute them: codes decoded once, or rounded tokens, and products of cuBLAS,
which is torch's CPU library here.
"""

from __future__ import annotations

import pytest
import torch

from bigkernels import use
from bigkernels._compare import worst
from bigkernels._samples import widen
from bigkernels._samples.quantized_linear import weight_sample
from bigkernels.functional import quantize_weight, quantized_linear
from bigkernels.ops import routes
from bigkernels.quantization import NF4, Int4
from bigkernels.triton import _quantized_many as many

pytestmark = pytest.mark.usefixtures("launchers_serve_cpu_tensors")

HALF = torch.float16
FORMATS = ("int8", "fp8", "int4", "nf4", "q4_1", "q8_0", Int4(32, "rtn"), NF4(128, double_quant=False))


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors that pass for those of a GPU of this generation; notes which libraries multiply."""
    monkeypatch.setattr(routes, "capability_of", lambda t: (9, 0))
    monkeypatch.setattr(routes, "MANY_TOKENS", 20)
    called: list[str] = []

    def noting(name, original):
        def noted(*args, **options):
            called.append(name)
            return original(*args, **options)

        return noted

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, noting(name, getattr(torch, name)))
    monkeypatch.setattr(many, "int_mm", noting("_int_mm", many.int_mm))
    return called


def check(sample, dtype=HALF):
    inputs = sample.inputs(dtype)
    ours = sample.results(inputs)
    plain = sample.results(inputs, backend="reference")
    exact = sample.results(widen(inputs), backend="reference")
    name, comparison = worst(sample.judge(ours, plain, exact, gradient_roundings=1))
    assert comparison.ok, f"{name}: {comparison}"


@pytest.mark.parametrize("config", FORMATS, ids=str)
def test_codes_are_decoded_once(gpu, config):
    check(weight_sample("", config, (2, 12, 160), 44))
    assert gpu == ["addmm", "mm"]  # forward, and the gradient


def test_a_weight_larger_than_the_workspace_is_decoded_in_parts(gpu, monkeypatch):
    monkeypatch.setattr(many, "WORKSPACE", 160 * 20)
    check(weight_sample("", "int4", (24, 160), 44, bias=False))
    assert gpu == ["mm", "mm", "mm"]  # 20, 20 and 4 rows; the gradient, whose depth they are, in one kernel of ours


@pytest.mark.parametrize("tokens, n, by", [(17, 48, ["_int_mm"]), (16, 48, []), (40, 46, [])])
def test_rounded_tokens_are_integers_to_cublas(gpu, tokens, n, by):
    sample = weight_sample("", "int8-dynamic", (tokens, 160), n)
    check(sample)
    assert [name for name in gpu if name == "_int_mm"] == by


def test_tokens_that_are_not_finite_give_nan_for_themselves_alone(gpu):
    inputs = weight_sample("", "int8-dynamic", (20, 160), 48).inputs(HALF)
    inputs["x"][3, 5] = float("inf")
    found = weight_sample("", "int8-dynamic", (20, 160), 48).results(inputs, backward=False)["out0"]
    assert gpu == ["_int_mm"] and found[3].isnan().all() and found[torch.arange(20) != 3].isfinite().all()


@pytest.mark.parametrize("what", ["few tokens", "float32", "a bias of another dtype", "forced", "an older table"])
def test_the_rest_is_ours(gpu, what, monkeypatch):
    dtype = torch.float32 if what == "float32" else HALF
    sample = weight_sample("", "int8", (20 if what == "few tokens" else 24, 160), 44)
    inputs = sample.inputs(dtype)
    if what == "a bias of another dtype":
        inputs["bias"] = inputs["bias"].float()
    if what == "an older table":
        rows = [r for r in routes.TABLE if r.call != "many tokens"]
        row = next(r for r in routes.TABLE if r.call == "many tokens")
        monkeypatch.setattr(
            routes,
            "TABLE",
            (*rows, type(row)(*(row.operator, row.call, row.since, row.before), "triton", "measured", "here")),
        )
    if what == "forced":
        with use("triton"):
            sample.results(inputs, backward=False)
    else:
        sample.results(inputs, backward=False)
    assert gpu == []


def test_tokens_in_fp8_are_those_of_torch():
    """Every value of 16 bits between the codes, and the codes: to the nearest, ties to even, as torch does."""
    x = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(HALF)
    x = x[x.isfinite() & (x <= 448)].float()
    x = torch.cat((x, -x))
    x = torch.cat((x, torch.full((-len(x) % 64,), 448.0))).view(-1, 64).contiguous()
    x[:, 0] = 448.0  # scales of one
    codes, scale = many.rounded_tokens(x, torch.uint8)
    assert torch.equal(scale, torch.ones(len(x)))
    assert torch.equal(codes, x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_tokens_in_fp8_take_the_whole_range():
    x = torch.randn(5, 70) * torch.tensor([1e-3, 1.0, 300.0, 0.0, 1.0])[:, None]
    x[4, 3] = float("nan")
    codes, scale = many.rounded_tokens(x, torch.uint8)
    assert torch.equal(scale[:4], x[:4].abs().amax(1) / 448) and scale[4].isnan() and not codes[4].any()
    values = codes[:4].view(torch.float8_e4m3fn).float() * scale[:4, None]
    assert ((values - x[:4]).abs() <= x[:4].abs() / 16 + scale[:4, None] / 1024).all()


def test_tokens_of_8_bits_times_codes_of_8_bits():
    """`torch._scaled_mm` by rows. In float32: the interpreter knows no bfloat16."""
    qweight = quantize_weight(torch.randn(48, 160) * torch.rand(48, 1), "fp8-dynamic")
    x, bias = torch.randn(33, 160) * torch.logspace(-2, 2, 33)[:, None], torch.randn(48)
    codes, scale = qweight.operands()[:2]
    try:
        found = many.forward_by_scaled_mm(x, codes, scale, bias)
    except RuntimeError as error:
        pytest.skip(f"this torch's CPU multiplies no fp8 by rows: {error}")
    with use("reference"):
        expected = quantized_linear(x, qweight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
