"""fp8-dynamic: tokens in floats of 8 bits, by the kernels that there are and as GPUs multiply them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels import functional
from bigkernels._compare import compare
from bigkernels.ops import quantized_linear, routes
from bigkernels.ops.grouped_linear import grouped_linear
from bigkernels.ops.quantized_linear import _backward_fp8
from bigkernels.quantization import FP8Dynamic, prepare_qat

E4M3 = torch.float8_e4m3fn


def rounded(t: torch.Tensor) -> torch.Tensor:
    """The rows of t in e4m3, in float64."""
    scale = t.float().abs().amax(-1, keepdim=True) / 448
    return (t.float() / scale).to(E4M3).double() * scale.double()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    w = torch.randn(48, 160) * torch.rand(48, 1)
    return functional.quantize_weight(w, "fp8-dynamic"), torch.randn(48)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_it_is_the_product_of_rounded_tokens_and_weights(layer, backend, dtype, tokens):
    qweight, bias = layer
    x = (torch.randn(2, tokens, 160) * torch.logspace(-2, 2, tokens)[:, None]).to(dtype)
    exact = rounded(x) @ qweight.dequantize(torch.float64).T + bias.double()
    with bigkernels.use(backend) if backend else bigkernels.use("cpu"):
        found = functional.quantized_linear(x, qweight, bias)
    assert found.dtype == dtype and found.shape == (2, tokens, 48)
    assert compare(found, exact.to(dtype), exact, roundings=4, scale="row").ok
    assert not torch.allclose(found.double(), x.double() @ qweight.dequantize(torch.float64).T + bias, rtol=1e-4)


@pytest.mark.parametrize("coarse", [False, True])
def test_gradients(coarse):
    """That of the weight alone or, where it is asked for, of a gradient that is rounded too."""
    qweight = functional.quantize_weight(torch.randn(48, 160), FP8Dynamic(gradients=coarse))
    x, grad = torch.randn(7, 160, requires_grad=True), torch.randn(7, 48)
    bias = torch.zeros(48, requires_grad=True)
    dx, dbias = torch.autograd.grad(functional.quantized_linear(x, qweight, bias), (x, bias), grad)
    wide = qweight.dequantize(torch.float64)
    codes, scale = (qweight.tensors[n] for n in ("codes", "scale"))
    expected = rounded(grad * scale) @ codes.view(E4M3).double() if coarse else grad.double() @ wide
    torch.testing.assert_close(dx.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dbias, grad.sum(0))
    if coarse:
        assert 0.001 < ((dx - grad @ wide.float()).norm() / dx.norm()).item() < 0.05


def test_a_gradient_as_gpus_multiply_it(monkeypatch):
    """`torch._scaled_mm` with scales by rows, which CPUs have too. Forward: tests/interpreter."""
    multiplied = []
    original = torch._scaled_mm

    def noted(a, b, scale_a, scale_b, **options):
        assert a.is_contiguous() and b.t().is_contiguous() and a.dtype == b.dtype == E4M3
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        multiplied.append((tuple(a.shape), tuple(b.shape)))
        return original(a, b, scale_a, scale_b, **options)

    monkeypatch.setattr(quantized_linear, "scaled_mm", noted)
    monkeypatch.setattr(routes, "takes_scaled_mm", lambda x, codes: True)
    operands = functional.quantize_weight(torch.randn(48, 160), FP8Dynamic(gradients=True)).operands()
    grad = torch.randn(2, 16, 48).bfloat16()
    try:
        found = _backward_fp8(grad, *operands[:2])
    except RuntimeError as error:
        pytest.skip(f"this torch's CPU multiplies no fp8 by rows: {error}")
    assert multiplied == [((32, 48), (48, 160))]
    expected = rounded(grad.float() * operands[1]) @ operands[0].view(E4M3).double()
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    "case, by",
    [
        ((torch.bfloat16, 48, 160, (9, 0)), True),
        ((torch.bfloat16, 48, 160, (10, 0)), True),
        ((torch.bfloat16, 48, 160, (8, 9)), False),
        ((torch.float16, 48, 160, (9, 0)), False),
        ((torch.bfloat16, 40, 160, (9, 0)), False),
        ((torch.bfloat16, 48, 152, (9, 0)), False),
        ((torch.bfloat16, 48, 160, None), False),
    ],
    ids=str,
)
def test_which_calls_go_to_the_units_of_8_bits(case, by, monkeypatch):
    dtype, n, k, capability = case
    monkeypatch.setattr(routes, "capability_of", lambda t: capability)
    assert routes.takes_scaled_mm(torch.ones(3, k, dtype=dtype), torch.ones(n, k, dtype=torch.uint8)) is by


def test_models(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    x, expected = torch.randn(5, 64), None
    expected = model(x)
    fp8 = copy.deepcopy(model)
    bigkernels.quantize(fp8, FP8Dynamic(gradients=True))
    assert "FP8Dynamic" in repr(fp8) and (fp8(x) - expected).norm() / expected.norm() < 0.06
    again = copy.deepcopy(model)
    bigkernels.quantize(again, FP8Dynamic(gradients=True))
    torch.save(fp8.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(again(x), fp8(x))
    with pytest.raises(RuntimeError, match="fp8"):
        other = copy.deepcopy(model)
        bigkernels.quantize(other, "fp8")
        other.load_state_dict(fp8.state_dict())
    aware = copy.deepcopy(model)
    prepare_qat(aware, "fp8-dynamic")
    torch.testing.assert_close(
        aware(x), bigkernels.quantize(copy.deepcopy(model), "fp8-dynamic") and fp8(x), rtol=1e-4, atol=1e-5
    )


def test_experts_are_multiplied_with_rounded_tokens():
    experts, rows, k = 3, 16, 64
    qweight = functional.quantize_weight(torch.randn(experts * rows, k), "fp8-dynamic")
    x, ends = torch.randn(9, k), torch.tensor([4, 4, 9], dtype=torch.int32)
    found = grouped_linear(x, qweight, ends)
    wide = qweight.dequantize(torch.float64).view(experts, rows, k)
    tokens = rounded(x)
    expected = torch.cat((tokens[:4] @ wide[0].T, tokens[4:] @ wide[2].T))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
