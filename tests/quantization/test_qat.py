"""Quantization-aware training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels.functional import quantize_weight
from bigkernels.quantization import FakeQuantizedLinear, Int4, fake_quantize, prepare_qat

FORMATS = ("int8", "int8-dynamic", Int4(32, "rtn"), "nf4", "fp8")


@pytest.mark.parametrize("config", FORMATS, ids=str)
def test_it_computes_what_the_quantized_layer_will(config):
    linear = nn.Linear(96, 40)
    layer = FakeQuantizedLinear.from_linear(linear, config)
    model = nn.Sequential(layer)
    assert layer.weight is linear.weight and list(model.state_dict()) == ["0.weight", "0.bias"]
    x = torch.randn(7, 96)
    expected = model(x)
    bigkernels.quantize(model, config)
    assert type(model[0]).__name__ == "QuantizedLinear"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", FORMATS, ids=str)
def test_gradients_go_straight_through(config):
    layer = FakeQuantizedLinear.from_linear(nn.Linear(96, 40), config)
    x, grad = torch.randn(7, 96, requires_grad=True), torch.randn(7, 40)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ quantize_weight(layer.weight, config).dequantize())
    found = layer.weight.grad
    assert (found - grad.T @ x.detach()).norm() < (0.02 if config == "int8-dynamic" else 1e-5) * found.norm()


def test_training_makes_up_for_the_rounding():
    """A layer whose inputs depend on each other: trained with rounding, its outputs get nearer to the original's."""
    torch.manual_seed(0)
    x = torch.randn(512, 16) @ torch.randn(16, 64) + 0.3 * torch.randn(512, 64)
    original, config = nn.Linear(64, 8), Int4(32, "rtn")
    target = original(x).detach()

    def error_after(steps: int) -> float:
        model = nn.Sequential(copy.deepcopy(original))
        assert prepare_qat(model, config) == ["0"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
        for _ in range(steps):
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bigkernels.quantize(model, config)
        return nn.functional.mse_loss(model(x), target).item()

    assert error_after(300) < 0.5 * error_after(0)


def test_what_is_left_alone_and_refused():
    model = nn.Sequential()
    model.add_module("lm_head", nn.Linear(8, 8))
    model.add_module("body", nn.Linear(8, 8))
    assert prepare_qat(model, "int8") == ["body"]
    with pytest.raises(ValueError, match="calibrated"):
        prepare_qat(nn.Sequential(nn.Linear(8, 8)), Int4(32, "gptq"))
    with pytest.raises(ValueError, match="accepted are"):
        fake_quantize(torch.randn(4, 4), "int3")


def test_transforms_see_the_straight_through_gradient():
    layer, w = torch.nn.Sequential(torch.nn.Linear(64, 8)), torch.randn(3, 8, 64)
    prepare_qat(layer, "int8", skip=())
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    x = torch.randn(4, 64)

    def loss(parameters, one):
        return torch.func.functional_call(layer, parameters, (one[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, one in enumerate(x):
        layer.zero_grad()
        layer(one[None]).square().sum().backward()
        torch.testing.assert_close(found["0.weight"][i], layer[0].weight.grad)
    stacked = torch.stack([fake_quantize(each, "int8") for each in w])
    assert torch.equal(torch.func.vmap(lambda each: fake_quantize(each, "int8"))(w), stacked)
    _, tangent = torch.func.jvp(lambda each: fake_quantize(each, "int8"), (w[0],), (torch.ones_like(w[0]),))
    assert torch.equal(tangent, torch.ones_like(w[0]))
