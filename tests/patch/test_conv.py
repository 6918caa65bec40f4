"""Convolutions on packed weights: PyTorch's values and layouts, and what happens to weights that are written."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels.nn import _conv

pytestmark = pytest.mark.skipif(_conv.unavailable() is not None, reason=str(_conv.unavailable()))
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def counted(monkeypatch):
    """Shapes of the images that packed convolutions took."""
    shapes, convolve = [], _conv._convolve

    def count(module, x, *packed):
        shapes.append(tuple(x.shape))
        return convolve(module, x, *packed)

    monkeypatch.setattr(_conv, "_convolve", count)
    return shapes


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def packed(module: nn.Module) -> nn.Module:
    bigkernels.patch(module)
    assert bigkernels.pack(module)
    return module


@pytest.mark.parametrize("weight_layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1, "stride": 2}, {"groups": 4}, {"dilation": 2, "bias": False}, {"kernel_size": 1}],
    ids=str,
)
def test_values_and_layouts(counted, options, dtype, layout, weight_layout):
    theirs = nn.Conv2d(8, 12, **({"kernel_size": 3} | options)).to(dtype).to(memory_format=weight_layout)
    ours = packed(copy.deepcopy(theirs))
    with torch.no_grad():
        for shape in ((2, 8, 9, 11), (5, 8, 20, 13), (1, 8, 5, 5)):
            x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
            found, expected = ours(x), theirs(x)
            tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(found, expected, **tolerance)
            assert found.is_contiguous(memory_format=layout if layout == weight_layout else torch.channels_last)
    last = torch.channels_last in (layout, weight_layout) and (options.get("kernel_size") != 1 or layout is LAYOUTS[1])
    assert len(counted) == (3 if last else 0) or dtype == torch.bfloat16


def test_written_weights_are_seen(counted):
    model, x = packed(nn.Conv2d(4, 6, 3)), image(1, 4, 8, 8)
    with torch.no_grad():
        for write in (
            lambda: model.weight.mul_(2),
            lambda: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
            lambda: setattr(model, "stride", (2, 2)),
            lambda: setattr(model.weight, "data", model.weight.data.clone() * 3),
            lambda: model.bias.data.add_(1),
        ):
            model(x)
            write()
            torch.testing.assert_close(model(x), nn.Conv2d.forward(model, x), rtol=1e-4, atol=1e-5)
        assert len(counted) == 10
        model.weight.data.mul_(2)  # not counted: as `pack` says
        bigkernels.refresh(model)
        torch.testing.assert_close(model(x), nn.Conv2d.forward(model, x), rtol=1e-4, atol=1e-5)
    assert len(counted) == 10


def test_training_forgets_the_copy(counted):
    model, x = packed(nn.Conv2d(4, 6, 3)), image(1, 4, 8, 8)
    model(x).sum().backward()
    with torch.no_grad():
        model(x)
    assert counted == [] and model.weight.grad is not None


def test_what_is_not_taken_is_the_modules_own(counted):
    model, x = packed(nn.Conv2d(4, 6, 3)), image(1, 4, 8, 8)
    with torch.no_grad():
        assert model(x[0]).shape == (6, 6, 6)
        assert model(x[:0]).shape == (0, 6, 6, 6)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        for wrong in (x[:, :3], x[..., :2], x.double(), x[0, 0]):
            with pytest.raises(RuntimeError):
                model(wrong)
        model.padding_mode, model.padding = "circular", (1, 1)
        model._reversed_padding_repeated_twice = [1, 1, 1, 1]
        assert model(x).shape == (1, 6, 8, 8)
    assert counted == []


def test_declared_alone_and_patched_alone_change_nothing(counted):
    x = image(1, 4, 8, 8)
    declared, patched = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    bigkernels.pack(declared)
    bigkernels.patch(patched)
    with torch.no_grad():
        declared(x), patched(x)
    both = packed(nn.Conv2d(4, 6, 3))
    bigkernels.unpatch(both)
    with torch.no_grad():
        both(x)
    assert counted == []


def test_copies_and_pickles(counted):
    model, x = packed(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())).eval(), image(1, 4, 8, 8)
    with torch.no_grad():
        expected = model(x)
        assert len(counted) == 1
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # not declared
            torch.testing.assert_close(other(x), expected)
    assert len(counted) == 1
