"""Norm modules: variants that must be found, look-alikes that must be left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bigkernels


class RMS(nn.Module):
    """Configurable in everything that models do differently."""

    def __init__(self, size=24, eps=1e-5, name="variance_epsilon", offset=0.0, early_cast=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        setattr(self, name, eps)
        self.name, self.offset, self.early_cast = name, offset, early_cast

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + getattr(self, self.name))
        if self.early_cast:
            return wide.to(x.dtype) * (self.weight + self.offset)
        return (wide * (self.weight.float() + self.offset)).to(x.dtype)


class NoParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)


class FixedLayerNorm(nn.Module):
    """OLMo's: no parameters, eps in the code."""

    def __init__(self):
        super().__init__()
        self.normalized_shape = (24,)

    def forward(self, x):
        return nn.functional.layer_norm(x.float(), self.normalized_shape, None, None, eps=1e-4).to(x.dtype)


FOUND = {
    "rms": (RMS, "rms_norm"),
    "eps by another name": (lambda: RMS(name="norm_eps", eps=1e-3), "rms_norm"),
    "tiny eps": (lambda: RMS(eps=1e-12), "rms_norm"),
    "gemma": (lambda: RMS(offset=1.0, early_cast=False), "rms_norm (weight + 1)"),
    "torch rms": (lambda: nn.RMSNorm(24, eps=1e-6), "rms_norm"),
    "torch rms, eps of the dtype": (lambda: nn.RMSNorm(24), "rms_norm"),
    "torch rms, no weight": (lambda: nn.RMSNorm(24, eps=1e-6, elementwise_affine=False), "rms_norm"),
    "torch layer": (lambda: nn.LayerNorm(24), "layer_norm"),
    "torch layer, no bias": (lambda: nn.LayerNorm(24, bias=False), "layer_norm"),
    "torch layer, no weight": (lambda: nn.LayerNorm(24, elementwise_affine=False), "layer_norm"),
    "no parameters": (NoParameters, "rms_norm"),
    "eps in the code": (FixedLayerNorm, "layer_norm"),
}


def _randomise(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) + 0.3)
    return module


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    build, kernel = FOUND[name]
    module = _randomise(build())
    x = torch.randn(2, 5, 24, requires_grad=True)
    weights = torch.randn(2, 5, 24)
    before = module(x)
    grads = torch.autograd.grad((before * weights).sum(), [x, *module.parameters()])
    report = bigkernels.patch(module, strict=True)
    assert [(row.path, row.what) for row in report.patched] == [("", kernel)]
    after = module(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad((after * weights).sum(), [x, *module.parameters()]), grads, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    if name == "torch rms, eps of the dtype":
        tiny = torch.full((3, 24), 1e-3)
        expected = type(module).forward(module, tiny)
        torch.testing.assert_close(module(tiny), expected)


def test_degenerate_weights_do_not_hide_an_offset():
    """Zeros: with and without an offset of one the outputs of the given module could not tell."""
    module = RMS(offset=1.0)
    nn.init.ones_(module.weight)
    assert [row.what for row in bigkernels.patch(module).patched] == ["rms_norm (weight + 1)"]


def test_eps_may_change_after_patching():
    module = RMS()
    bigkernels.patch(module)
    module.variance_epsilon = 0.5
    x = torch.randn(3, 24)
    torch.testing.assert_close(module(x), type(module).forward(module, x))


class Scaled(RMS):
    def forward(self, x):
        return super().forward(x) * 1.01


class MeanOfAll(RMS):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean() + self.variance_epsilon) * self.weight


class ByRank(RMS):
    def forward(self, x):
        return super().forward(x) if x.dim() < 4 else x


class OnlyInTraining(RMS):
    def forward(self, x):
        return super().forward(x) if self.training else x * self.weight


class LinearGradient(RMS):
    """The values of a norm, another gradient."""

    def forward(self, x):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return x * scale * self.weight


class EpsOutside(RMS):
    """Adds eps after the root: the same for ordinary rows."""

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon) * self.weight


class InPlace(RMS):
    def forward(self, x):
        out = super().forward(x)
        with torch.no_grad():
            x.mul_(2)
        return out


class WideInput(RMS):
    """Computes in the input's dtype: another result in 16 bits only."""

    def forward(self, x):
        if x.dtype != torch.float32:
            return (x * 1.5) * self.weight
        return super().forward(x)


class Broken(RMS):
    def forward(self, x):
        raise KeyError("no")


LOOKALIKES = [Scaled, MeanOfAll, ByRank, OnlyInTraining, LinearGradient, EpsOutside, InPlace, WideInput, Broken]


@pytest.mark.parametrize("build", LOOKALIKES)
def test_lookalikes_are_left_alone(build):
    module = build()
    report = bigkernels.patch(module)
    assert report.patched == []
    assert len(report.skipped) == 1
    assert "forward" not in vars(module)
    with pytest.raises(RuntimeError):
        bigkernels.patch(module, strict=True)


@pytest.mark.parametrize("build", [lambda: nn.PReLU(24), lambda: nn.Embedding(24, 8), lambda: nn.InstanceNorm1d(24)])
def test_no_candidates(build):
    report = bigkernels.patch(build())
    assert (report.patched, report.skipped) == ([], [])


def test_more_than_the_last_dimension_is_skipped():
    report = bigkernels.patch(nn.LayerNorm((4, 24)))
    assert report.patched == []
    assert len(report.skipped) == 1


def test_wrong_size_gives_the_modules_own_error():
    module = nn.LayerNorm(24, elementwise_affine=False)
    bigkernels.patch(module)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        module(torch.randn(3, 12))


def test_other_calls_go_to_the_modules_own_code():
    class Gated(RMS):
        def forward(self, x, gate=None):
            out = super().forward(x)
            return out if gate is None else out * gate

    module = Gated()
    x, gate = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    plain, gated, named = module(x), module(x, gate), module(x=x)
    assert len(bigkernels.patch(module).patched) == 1
    torch.testing.assert_close(module(x), plain)
    assert torch.equal(module(x, gate), gated)
    assert torch.equal(module(x=x), named)
