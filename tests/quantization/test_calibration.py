"""Formats that are calibrated: the error of a layer's outputs, and how models are run for it."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

import bigkernels
from bigkernels.functional import quantize_weight, quantized_linear
from bigkernels.nn import LoRALinear, QuantizedLinear
from bigkernels.quantization import Int4, Int8, Int8Dynamic, _calibration, gptq
from bigkernels.quantization.checkpoints import to_compressed_tensors

ALGORITHMS = ("gptq", "awq")


def inputs(tokens: int, k: int) -> Tensor:
    """As in models: elements depend on each other, and few of them are large."""
    torch.manual_seed(1)
    mixed = torch.randn(tokens, k) @ (torch.randn(k, k) / k**0.5 + torch.eye(k))
    return mixed * torch.exp(torch.randn(k))


def output_error(x: Tensor, w: Tensor, found: Tensor) -> float:
    return ((x @ (w - found).T).norm() / (x @ w.T).norm()).item()


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_error_of_outputs_falls(algorithm: str, size: int):
    x, unseen = inputs(4000, 300).split(2000)
    w = torch.randn(70, 300)
    found = quantize_weight(w, Int4(size, algorithm), x.T @ x)
    assert {n: (tuple(t.shape), t.dtype) for n, t in found.tensors.items()} == found.format.layout((70, 300))
    hqq = output_error(unseen, w, quantize_weight(w, Int4(size)).dequantize())
    assert output_error(unseen, w, found.dequantize()) < (0.75 if algorithm == "gptq" else 0.9) * hqq
    torch.testing.assert_close(quantized_linear(unseen, found), unseen @ found.dequantize().T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [Int8, Int8Dynamic])
def test_the_error_of_outputs_falls_in_8_bits(kind):
    x, unseen = inputs(4000, 300).split(2000)
    w = torch.randn(70, 300) * torch.exp(torch.randn(300) / 2)  # some columns are large
    w[0] = 0
    found = quantize_weight(w, kind("gptq"), x.T @ x)
    codes, scale = found.tensors["codes"], found.tensors["scale"]
    assert {n: (tuple(t.shape), t.dtype) for n, t in found.tensors.items()} == found.format.layout((70, 300))
    assert codes.abs().max() == 127 and not codes[0].any()
    largest = w.abs().amax(1) / 127
    assert (scale <= largest * (1 + 1e-6)).all() and (scale >= 0.59 * largest).all()
    nearest = output_error(unseen, w, quantize_weight(w, kind()).dequantize())
    assert output_error(unseen, w, found.dequantize()) < 0.75 * nearest
    torch.testing.assert_close(found.dequantize(), codes.float() * scale[:, None])
    if not kind.dynamic:
        torch.testing.assert_close(quantized_linear(unseen, found), unseen @ found.dequantize().T, rtol=1e-3, atol=1e-3)
    assert found.format.exact() == Int8("gptq") and found.format.blind() == kind()
    again = pickle.loads(pickle.dumps(found))
    assert again.format == kind("gptq") and torch.equal(again.dequantize(), found.dequantize())
    with pytest.raises(ValueError, match="hessian is missing|give hessian"):
        quantize_weight(w, kind("gptq"))
    with pytest.raises(ValueError, match=f"{kind.__name__}: algorithm is 'awq'; accepted are rtn, gptq"):
        kind("awq")
    assert quantize_weight(torch.empty(3, 0), kind("gptq"), torch.empty(0, 0)).dequantize().shape == (3, 0)


def test_gptq_is_the_published_loop():
    """Against the algorithm element by element, with the inverse made anew for what is left."""
    x = inputs(500, 64).double()
    w = torch.randn(3, 64).double()
    hessian = x.T @ x
    data = gptq.Order.of(hessian)
    step, zero = torch.full((3, 2), 0.2), torch.full((3, 2), 7.0)
    found = gptq.codes(w.float(), step, zero, 32, data)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64).double()
    left, expected = w.clone(), torch.empty(3, 64)
    remaining = data.order.tolist()
    while remaining:
        at = remaining[0]
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        code = (left[:, at] / 0.2 + 7).round().clamp(0, 15)
        error = left[:, at] - (code - 7) * 0.2
        expected[:, at] = code.float()
        left[:, remaining] -= error[:, None] * inverse[0] / inverse[0, 0]
        remaining = remaining[1:]
    assert (found != expected).float().mean() < 0.02  # what lies between two codes may fall to either side


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_inputs_that_tell_nothing(algorithm: str):
    w = torch.randn(5, 70)
    for hessian in (torch.zeros(70, 70), torch.ones(70, 70), torch.eye(70), torch.diag(torch.arange(70.0) % 2)):
        found = quantize_weight(w, Int4(32, algorithm), hessian).dequantize()
        assert found.isfinite().all() and (found - w).norm() < 0.3 * w.norm()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (1, 1), (3, 33)])
def test_odd_shapes(algorithm: str, shape: tuple[int, int]):
    x = torch.randn(50, shape[1])
    found = quantize_weight(torch.randn(shape), Int4(32, algorithm), x.T @ x)
    assert found.dequantize().shape == shape


@pytest.mark.parametrize(
    "hessian, message",
    [
        (None, "give hessian"),
        (torch.eye(3), r"expected \(64, 64\)"),
        (torch.full((64, 64), float("nan")), "not finite"),
    ],
)
def test_refused(hessian: Tensor | None, message: str):
    with pytest.raises(ValueError, match=message):
        quantize_weight(torch.randn(4, 64), Int4(64, "gptq"), hessian)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.unused = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        assert not self.training
        return self.two(torch.relu(self.one(x * scale)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_models(algorithm: str):
    model = Net().train()
    x = inputs(256, 64)
    expected = model.eval()(x)
    model.train()
    batches = (b for b in (x[:64], (x[64:128],), {"x": x[128:], "scale": 1.0}))
    report = bigkernels.quantize(model, {"two": "int8", "*": Int4(32, algorithm)}, calibration=batches)
    assert [(r.path, r.what) for r in report.quantized] == [("one", "int4"), ("two", "int8")]
    assert [(r.path, r.what) for r in report.skipped] == [("unused", "no calibration batch reaches it")]
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    assert (model.eval()(x) - expected).norm() < 0.1 * expected.norm()
    again = pickle.loads(pickle.dumps(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    bigkernels.dequantize(model)
    assert type(model.one) is nn.Linear and (model(x) - again(x)).norm() < 1e-4 * expected.norm()


def test_statistics_in_groups_see_quantized_layers(monkeypatch):
    monkeypatch.setattr(_calibration, "_BYTES", 1)
    seen = []
    monkeypatch.setattr(
        bigkernels.quantization._plan,
        "hessians",
        lambda model, some, batches: (
            seen.append((list(some), type(model.one))) or _calibration.hessians(model, some, batches)
        ),
    )
    bigkernels.quantize(Net(), Int4(32, "gptq"), calibration=[inputs(64, 64)])
    assert seen == [(["one"], nn.Linear), (["two"], QuantizedLinear), (["unused"], QuantizedLinear)]


def test_an_error_leaves_the_model_as_it_was():
    model = Net()
    layers = [model.one, model.two, model.unused]
    with pytest.raises(ValueError, match="give calibration batches"):
        bigkernels.quantize(model, Int4(32, "awq"))
    with pytest.raises(RuntimeError, match="shapes"):
        bigkernels.quantize(model, {"two": "int8", "*": Int4(32, "awq")}, calibration=[torch.randn(3, 5)])
    with pytest.raises(ValueError, match="not finite"):
        bigkernels.quantize(model, {"two": "int8", "*": Int4(32, "awq")}, calibration=[torch.full((3, 64), torch.inf)])
    assert [model.one, model.two, model.unused] == layers
    assert not any(m._forward_pre_hooks for m in model.modules()) and model.training


def test_gradients_adapters_and_export():
    x = inputs(300, 64)
    weight = quantize_weight(torch.randn(40, 64), Int4(32, "awq"), x.T @ x)
    leaf = x[:20].clone().requires_grad_()
    quantized_linear(leaf, weight).sum().backward()
    torch.testing.assert_close(leaf.grad, weight.dequantize().sum(0).expand(20, -1), rtol=1e-4, atol=1e-3)
    adapted = LoRALinear(QuantizedLinear(weight))
    adapted.merge()
    assert adapted.base.weight_format == Int4(32)
    adapted.unmerge()
    assert adapted.base.qweight.format == Int4(32, "awq")
    with pytest.raises(ValueError, match="no place"):
        to_compressed_tensors(weight)


class Branches(nn.Module):
    """Two layers read the same input, which one of these ways is changed in between."""

    def __init__(self, change: str):
        super().__init__()
        self.a, self.b, self.change = nn.Linear(64, 64), nn.Linear(64, 64), change

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.a(input=x) if self.change == "keyword" else self.a(x)
        if self.change == "in place":
            x[:, :32] *= 30
        elif self.change == "through data":
            x.data[:, :32] *= 30
        else:
            x = torch.cat((x[:, :32] * 30, x[:, 32:]), 1)
        return y + self.b(x)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("change", ["in place", "through data", "keyword"])
def test_each_layer_is_measured_on_what_it_reads(change: str, algorithm: str):
    batches = [torch.randn(16, 64) for _ in range(3)]
    found = []
    for way in (change, "out of place"):
        torch.manual_seed(2)
        model = Branches(way)
        assert len(bigkernels.quantize(model, Int4(64, algorithm), calibration=batches).quantized) == 2
        found.append(model.state_dict())
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())


def test_embeddings_need_no_data():
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 32))
    bigkernels.quantize(model, Int4(32, "gptq"), embeddings=True, calibration=[torch.arange(50)])
    assert model[0].weight_format == Int4(32) and model[1].weight_format == Int4(32, "gptq")
