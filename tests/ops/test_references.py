"""The references against PyTorch's own functions and against the formulas as models write them, in float64."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bigkernels.functional as B
from bigkernels.ops.activations import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[2]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_rms_norm():
    x, w, residual = randn(3, 5, 16), randn(16), randn(3, 5, 16)
    torch.testing.assert_close(B.rms_norm(x, w, 1e-6), F.rms_norm(x, (16,), w, 1e-6), **CLOSE)
    torch.testing.assert_close(B.rms_norm(x), F.rms_norm(x, (16,), None, 1e-6), **CLOSE)
    torch.testing.assert_close(B.rms_norm(x, w, offset=1.0), F.rms_norm(x, (16,), 1 + w, 1e-6), **CLOSE)
    y, total = B.rms_norm(x, w, 0.1, residual=residual)
    torch.testing.assert_close(total, x + residual, **CLOSE)
    torch.testing.assert_close(y, F.rms_norm(x + residual, (16,), w, 0.1), **CLOSE)


def test_layer_norm():
    x, w, b, residual = randn(3, 5, 16), randn(16), randn(16), randn(3, 5, 16)
    torch.testing.assert_close(B.layer_norm(x, w, b), F.layer_norm(x, (16,), w, b), **CLOSE)
    torch.testing.assert_close(B.layer_norm(x), F.layer_norm(x, (16,)), **CLOSE)
    y, total = B.layer_norm(x, w, b, 0.1, residual=residual)
    torch.testing.assert_close(total, x + residual, **CLOSE)
    torch.testing.assert_close(y, F.layer_norm(x + residual, (16,), w, b, 0.1), **CLOSE)


def by_complex_numbers(x, angle, interleaved):
    """Rotation as a product with e^(i angle), the definition in the paper."""
    if interleaved:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    else:
        half = x.shape[-1] // 2
        pairs = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    if interleaved:
        return torch.view_as_real(turned).flatten(-2)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rotary", [12, 8])
def test_rope(interleaved, batch, rotary):
    q, k, angle = randn(2, 4, 5, 12), randn(2, 2, 5, 12), randn(batch, 5, rotary // 2)
    both = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    out = B.rope(q, k, both.cos(), both.sin(), interleaved=interleaved)
    for x, y in zip((q, k), out, strict=True):
        torch.testing.assert_close(y[..., :rotary], by_complex_numbers(x[..., :rotary], angle, interleaved), **CLOSE)
        assert torch.equal(y[..., rotary:], x[..., rotary:])


def test_activations_are_numbered_as_in_the_header():
    header = (ROOT / "csrc/include/bigkernels/activations.h").read_text()
    line = next(line for line in header.splitlines() if line.startswith("#define BK_ACTIVATIONS"))
    assert re.findall(r" X\((\w+)\)", line) == list(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu(activation):
    gate, up = randn(3, 9), randn(3, 9)
    expected = {
        "silu": gate / (1 + (-gate).exp()),
        "gelu": gate * 0.5 * (1 + torch.erf(gate / 2**0.5)),
        "gelu_tanh": 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))),
        "relu": gate.clamp_min(0),
        "relu2": gate.clamp_min(0) ** 2,
        "sigmoid": 1 / (1 + (-gate).exp()),
        "identity": gate,
        "tanh": (gate.exp() - (-gate).exp()) / (gate.exp() + (-gate).exp()),
        "quick_gelu": gate / (1 + (-1.702 * gate).exp()),
    }[activation]
    torch.testing.assert_close(B.glu(gate, up, activation=activation), expected * up, **CLOSE)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_as_pytorch(reduction, smoothing, weighted):
    logits, target = randn(9, 7), torch.randint(7, (9,))
    target[2] = target[5] = -100
    weight = torch.rand(7, dtype=torch.float64) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    torch.testing.assert_close(
        B.cross_entropy(logits, target, class_weight=weight, **options),
        F.cross_entropy(logits, target, weight=weight, **options),
        **CLOSE,
    )


def test_cross_entropy_options_by_their_formulas():
    logits, target, scale = randn(9, 7) * 3, torch.randint(7, (9,)), torch.rand(9, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    nll, lse = -log_p.gather(1, target[:, None])[:, 0], logits.logsumexp(-1)
    none = {"reduction": "none"}
    torch.testing.assert_close(B.cross_entropy(logits, target, z_loss=0.1, **none), nll + 0.1 * lse**2, **CLOSE)
    focal = (1 - (-nll).exp()) ** 2 * nll
    torch.testing.assert_close(B.cross_entropy(logits, target, focal_gamma=2.0, **none), focal, **CLOSE)
    torch.testing.assert_close(B.cross_entropy(logits, target, token_weight=scale, **none), scale * nll, **CLOSE)
    capped = F.cross_entropy(3 * torch.tanh(logits / 3), target)
    torch.testing.assert_close(B.cross_entropy(logits, target, softcap=3.0), capped, **CLOSE)


def test_the_mean_of_no_tokens_is_nan_as_in_pytorch():
    logits, target = torch.randn(3, 5), torch.full((3,), -100)
    assert B.cross_entropy(logits, target).isnan() and F.cross_entropy(logits, target).isnan()
    assert B.cross_entropy(logits, target, reduction="sum") == 0
