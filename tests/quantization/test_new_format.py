"""A format that is one file: everything that takes a weight in codes takes it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_format import BLOCK, TOY3, Toy3

import bigkernels
from bigkernels.functional import linear_cross_entropy, quantize_weight, quantized_linear
from bigkernels.nn import LoRALinear, QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from bigkernels.ops.codes import INT8, KINDS, Kind, register
from bigkernels.ops.grouped_linear import grouped_linear


def test_values_are_the_nearest():
    w = torch.randn(9, 75)
    found = quantize_weight(w, "toy3")
    assert found.format == Toy3() and found.nbytes == 9 * (3 * 12 + 3 * 2)
    step = found.tensors["scale"].float().repeat_interleave(BLOCK, 1)[:, :75]
    values = found.dequantize()
    assert ((values - w).abs() <= step * 0.5 + w.abs() * 2**-9).all()
    assert torch.equal(values, (values / step).round() * step)
    assert torch.equal(found.rows(2, 5).dequantize(), values[2:5])
    assert quantize_weight(torch.zeros(2, 64), "toy3").dequantize().abs().max() == 0
    for shape in ((0, 40), (4, 0)):
        assert quantize_weight(torch.zeros(shape), "toy3").dequantize().shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_products_and_gradients(tokens: int, dtype: torch.dtype):
    q, x, bias = quantize_weight(torch.randn(24, 100), "toy3"), torch.randn(tokens, 100, dtype=dtype), torch.randn(24)
    x.requires_grad_()
    found = quantized_linear(x, q, bias.to(dtype))
    exact = F.linear(x.double(), q.dequantize(torch.float64), bias.to(dtype).double())
    tolerance = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(found.double(), exact, **tolerance)
    up = torch.randn(tokens, 24)
    (got,) = torch.autograd.grad(found, x, up.to(dtype))
    torch.testing.assert_close(got.double(), up.to(dtype).double() @ q.dequantize(torch.float64), **tolerance)
    with torch.no_grad():
        assert torch.equal(quantized_linear(x, q, bias.to(dtype)), found)


def test_a_model_of_it():
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 40), nn.SiLU(), nn.Linear(40, 20, bias=False))
    dense, ids = copy.deepcopy(model), torch.arange(12).view(3, 4)
    report = bigkernels.quantize(model, "toy3", embeddings=True)
    assert len(report.quantized) == 3 and type(model[0]) is QuantizedEmbedding and type(model[1]) is QuantizedLinear
    expected = model(ids)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), expected)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    bigkernels.quantize(dense, Toy3(), embeddings=True)
    dense.load_state_dict(torch.load(stream))
    assert torch.equal(dense(ids), expected)
    adapted = LoRALinear(model[1], rank=2)
    nn.init.normal_(adapted.lora_b)
    adapted(torch.randn(5, 64)).square().mean().backward()
    assert adapted.lora_a.grad.abs().sum() > 0 and adapted.lora_b.grad.abs().sum() > 0
    bigkernels.dequantize(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)


def test_a_head_and_experts():
    q, hidden, target = quantize_weight(torch.randn(50, 64), "toy3"), torch.randn(7, 64), torch.arange(7)
    hidden.requires_grad_()
    found = linear_cross_entropy(hidden, q, target)
    expected = F.cross_entropy(hidden @ q.dequantize().T, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, hidden)[0] for y in (found, expected)))
    experts = QuantizedExperts.from_parameter(torch.randn(3, 10, 64), "toy3")
    x, ends = torch.randn(7, 64), torch.tensor([2, 2, 7])
    parts = experts.dequantize()
    torch.testing.assert_close(
        grouped_linear(x, experts.qweight, ends), torch.cat((x[:2] @ parts[0].T, x[2:] @ parts[2].T))
    )


def test_compiled():
    layer, x = QuantizedLinear(quantize_weight(torch.randn(24, 64), "toy3")), torch.randn(5, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_kinds_have_names_of_their_own():
    assert not TOY3.has_kernels and KINDS[TOY3.number] is TOY3
    with pytest.raises(ValueError, match="int8"):
        register(Kind("int8", 8, INT8.decode))
    again = register(Kind("toy3", 3, TOY3.decode, scale=torch.float16, blocked=True))  # a cell that runs again
    assert again == TOY3
