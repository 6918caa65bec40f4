"""Patched models in front of what traces without Dynamo: they work where the unpatched model does."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bigkernels

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Logits(nn.Module):
    def __init__(self, model: nn.Module, options: dict):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x):
        out = self.model(x, **self.options)
        return out["logits"] if isinstance(out, dict) else out


def by_jit(model, x):
    traced, file = torch.jit.trace(model, (x,), strict=False), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "bigkernels::" not in str(loaded.inlined_graph)  # the file needs nothing but PyTorch
    return loaded


WAYS = {
    "jit": by_jit,
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    "make_fx": lambda model, x: make_fx(model)(x),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["cache", "bert", "linear"])
def test_traces(get_case, name, way, gradients):
    case = get_case("llama" if name in ("cache", "linear") else name)
    model = Logits(case.model, {} if name == "bert" else {"use_cache": name == "cache"})
    x = case.inputs["input_ids"]
    other = x.flip(0).contiguous()
    with torch.no_grad():
        expected = model(other)
    if way == "make_fx" and name != "bert":
        try:
            WAYS[way](model, x)
        except RuntimeError as error:
            pytest.skip(f"the unpatched model neither: {error}")
    bigkernels.patch(case.model, linear=name == "linear")
    if name == "linear":
        bigkernels.nn.linear.pack(case.model)
        with torch.no_grad():
            model(x)  # packed copies of the weights are there
    with torch.set_grad_enabled(gradients):
        traced = WAYS[way](model, x)
    found = traced(other)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    if gradients:
        parameters = dict(traced.named_parameters()) if way == "jit" else {}
        if parameters:
            found.square().sum().backward()
            weight = next(
                p
                for n, p in parameters.items()
                if n.endswith("0.self_attn.q_proj.weight") or n.endswith("0.attention.self.query.weight")
            )
            assert weight.grad.abs().max() > 0


def test_an_exported_model_trains_as_the_unpatched_one(llama):
    x = llama.inputs["input_ids"]
    found = []
    for patched in (False, True):
        model = copy.deepcopy(llama.model)
        if patched:
            bigkernels.patch(model)
        module = torch.export.export(Logits(model, {"use_cache": False}), (x,), strict=False).module()
        module(x).square().sum().backward()
        found.append({n: p.grad for n, p in module.named_parameters()})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, g in found[0].items():
        torch.testing.assert_close(found[1][name], g, rtol=1e-3, atol=1e-4 * g.abs().max().item())


def test_an_export_without_gradients_holds_the_kernels(llama):
    bigkernels.patch(llama.model)
    with torch.no_grad():
        program = torch.export.export(Logits(llama.model, {"use_cache": False}), (llama.inputs["input_ids"],))
    assert "bigkernels.attention" in str(program.graph) and "bigkernels.rms_norm" in str(program.graph)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_fake_tensors(get_case, name, cache):
    model = get_case(name).model
    bigkernels.patch(model, linear=True)
    bigkernels.nn.linear.pack(model)
    ids = get_case(name).inputs["input_ids"]
    for gradients in (True, False):
        mode = FakeTensorMode()
        with mode, torch.set_grad_enabled(gradients):
            state = {k: mode.from_tensor(t) for k, t in [*model.named_parameters(), *model.named_buffers()]}
            out = torch.func.functional_call(model, state, (mode.from_tensor(ids),), {"use_cache": cache})
        assert out.logits.shape == (*ids.shape, 199)


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4", "nf4", "linear"])
def test_quantized_and_linear_layers(kind):
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()
    if kind == "linear":
        bigkernels.patch(model, linear=True)
        bigkernels.nn.linear.pack(model)
    else:
        bigkernels.quantize(model, kind, skip=())
    x, y = torch.randn(40, 64), torch.randn(40, 64)
    with torch.no_grad():
        expected = model(y)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for name, way in WAYS.items():
                torch.testing.assert_close(way(model, x)(y), expected, rtol=1e-4, atol=1e-4, msg=name)
    mode = FakeTensorMode()
    state = {k: mode.from_tensor(t) for k, t in model.state_dict().items()}
    assert torch.func.functional_call(model, state, (mode.from_tensor(x),)).shape == (40, 32)
