"""GroupNorm and BatchNorm in models, alone and with the activation behind them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bigkernels
from bigkernels.nn.linear import may_pay

pytestmark = pytest.mark.skipif(not may_pay(), reason="the rule is for levels from AVX2 on")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Basic(nn.Module):
    """A block of ResNet as torchvision has it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Unet(nn.Module):
    """A block of a diffusion U-Net."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = nn.GroupNorm(3, 6), nn.GroupNorm(2, 6)
        self.conv1, self.conv2, self.nonlinearity = (
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.SiLU(),
        )

    def forward(self, x):
        h = self.norm1(x)
        h = self.nonlinearity(h)
        h = self.conv1(h)
        return x + self.conv2(F.silu(self.norm2(h)))


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.GroupNorm(4, 8),
        nn.GELU("tanh"),
        nn.BatchNorm2d(8),
        nn.Dropout(0.5),
    )


MODELS = {
    "basic": (Basic, ["batch_norm", "batch_norm", "batch_norm + relu"]),
    "unet": (Unet, ["group_norm", "group_norm", "group_norm + silu", "group_norm + silu"]),
    "sequence": (sequence, ["batch_norm", "batch_norm", "batch_norm + relu, group_norm + gelu_tanh", "group_norm"]),
}


def run(model, x):
    torch.manual_seed(3)
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    state = [b.clone() for b in model.buffers()]
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters()), *state]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_models(library, name, training, layout):
    build, kernels = MODELS[name]
    x = torch.randn(3, 6, 9, 7).to(memory_format=layout)
    model, theirs = build().train(training), build().train(training)
    report = bigkernels.patch(model)
    assert sorted(row.what for row in report.patched) == kernels
    for _ in range(2):  # the second step sees the statistics of the first
        for found, expected in zip(run(model, x), run(theirs, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * max(1.0, expected.abs().max().item()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(other, x)[0], run(model, x)[0])
    bigkernels.unpatch(model)
    assert all(map(torch.equal, run(model, x), run(copy.deepcopy(model), x))) or training


def test_hooks_in_between_are_called(library):
    x = torch.randn(3, 6, 9, 7)
    for build, norm, act in ((Unet, "norm1", "nonlinearity"), (sequence, "4", "5")):
        model = build().eval()
        plain = copy.deepcopy(model)
        bigkernels.patch(model)
        for name in (norm, act):
            for each in (model, plain):
                each.get_submodule(name).register_forward_hook(lambda module, args, out: out * 2)
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_modules_that_became_others(library):
    model, x = sequence().eval(), torch.randn(3, 6, 9, 7)
    bigkernels.patch(model)
    model[2] = nn.Tanh()
    model[5] = nn.Identity()
    y = model[6](model[4](model[3](torch.tanh(model[1](model[0](x))))))
    torch.testing.assert_close(model(x), y)
    model.append(nn.ReLU())
    torch.testing.assert_close(model(x), F.relu(y))


def test_what_the_kernel_does_not_take_is_the_modules_own(library):
    model = bigkernels_patched(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 4, 1, 1))
    with pytest.raises(ValueError, match="expected 4D input"):
        model(torch.randn(2, 4, 3))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 3, 3))
    assert model.double()(torch.randn(2, 4, 3, 3).double()).dtype == torch.float64
    group = bigkernels_patched(nn.GroupNorm(2, 4))
    assert group(torch.randn(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 4, 3, 3, dtype=dtype)
            ours = group(x)
            theirs = nn.GroupNorm(2, 4)(x)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02)


def bigkernels_patched(model):
    bigkernels.patch(model)
    return model


class Subclass(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_one_value_in_each_group_is_the_classes_own_error(library):
    model = nn.Sequential(nn.GroupNorm(4, 4))
    bigkernels.patch(model)
    assert model(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 4, 1, 1))
    assert model(torch.randn(2, 4, 1, 1)).abs().max() == 0


def test_subclasses_are_left_alone(library):
    model, x = nn.Sequential(Subclass(4), nn.ReLU()), torch.randn(2, 4, 3, 3)
    assert not bigkernels.patch(model).patched
    torch.testing.assert_close(model(x), F.relu(Subclass(4)(x)))


def test_momentum_none_and_bfloat16_with_float32_statistics(library):
    model, theirs = nn.BatchNorm2d(6, momentum=None), nn.BatchNorm2d(6, momentum=None)
    bigkernels.patch(model)
    for seed in range(3):
        x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(seed)).bfloat16()
        torch.testing.assert_close(model(x), theirs(x), rtol=0.02, atol=0.02)
    for a, b in zip(model.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_compiled(library):
    model, x = Unet(), torch.randn(3, 6, 9, 7)
    bigkernels.patch(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
