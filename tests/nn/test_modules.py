"""The modules against torch.nn's, where it has one, and against the operators."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import bigkernels.functional as B
import bigkernels.nn as bnn
from bigkernels.ops.activations import ACTIVATIONS

MODULES = {
    "RMSNorm": (lambda **kw: bnn.RMSNorm(16, **kw), lambda: (torch.randn(3, 16),)),
    "RMSNorm, offset": (lambda **kw: bnn.RMSNorm(16, offset=1.0, **kw), lambda: (torch.randn(3, 16),)),
    "LayerNorm": (lambda **kw: bnn.LayerNorm(16, **kw), lambda: (torch.randn(3, 16),)),
    "GatedMLP": (lambda **kw: bnn.GatedMLP(16, 24, "gelu_tanh", bias=True, **kw), lambda: (torch.randn(3, 16),)),
    "RotaryEmbedding": (
        lambda dtype=None, **kw: bnn.RotaryEmbedding(8, **kw),
        lambda: (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_copies_and_pickles(name):
    make, inputs = MODULES[name]
    module, given = make(), inputs()
    for p in module.parameters():
        nn.init.normal_(p)
    other = make()
    other.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    expected = module(*given)
    for again in (other, copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(again(*given), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_device_and_dtype_arguments(name):
    make, _ = MODULES[name]
    assert all(t.is_meta for t in make(device="meta").state_dict().values())
    assert all(t.dtype == torch.bfloat16 for t in make(dtype=torch.bfloat16).state_dict().values())


def test_norms_are_torchs():
    x = torch.randn(2, 5, 16)
    ours, theirs = bnn.RMSNorm(16, eps=1e-5), nn.RMSNorm(16, eps=1e-5)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    ours, theirs = bnn.LayerNorm(16), nn.LayerNorm(16)
    nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    normed, total = ours(x, x)
    torch.testing.assert_close(normed, theirs(2 * x))
    assert torch.equal(total, 2 * x)


def test_a_new_norm_only_normalises():
    x = torch.randn(4, 16)
    for module in (bnn.RMSNorm(16), bnn.RMSNorm(16, offset=1.0), bnn.RMSNorm(16, elementwise_affine=False)):
        torch.testing.assert_close(module(x), nn.functional.rms_norm(x, (16,), None, 1e-6))
    assert list(bnn.LayerNorm(16, bias=False).state_dict()) == ["weight"]
    assert list(bnn.LayerNorm(16, elementwise_affine=False).state_dict()) == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp(activation):
    module, x = bnn.GatedMLP(8, 12, activation), torch.randn(3, 8)
    expected = module.down_proj(ACTIVATIONS[activation](module.gate_proj(x)) * module.up_proj(x))
    torch.testing.assert_close(module(x), expected)


def test_gated_mlp_rejects_unknown_activations():
    with pytest.raises(ValueError, match="GatedMLP: activation is 'swish'; accepted are silu"):
        bnn.GatedMLP(8, 12, "swish")


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_depends_on_distances_alone(interleaved):
    module = bnn.RotaryEmbedding(8, theta=100.0, interleaved=interleaved)
    q, k = torch.randn(1, 1, 1, 8).expand(1, 1, 6, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 6, 8)
    scores = torch.matmul(*(lambda a, b: (a, b.transpose(-1, -2)))(*module(q, k)))[0, 0]
    for distance in range(6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    # Positions given a token, and shifted by a constant: the same scores.
    shifted = torch.matmul(*(lambda a, b: (a, b.transpose(-1, -2)))(*module(q, k, torch.arange(6)[None] + 3)))[0, 0]
    torch.testing.assert_close(shifted, scores, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="RotaryEmbedding: rotary_dim is 7, expected an even number"):
        bnn.RotaryEmbedding(7)


def test_cross_entropy_loss():
    logits, target, weight = torch.randn(5, 9), torch.randint(9, (5,)), torch.rand(9)
    ours = bnn.CrossEntropyLoss(weight, label_smoothing=0.1, reduction="sum")
    theirs = nn.CrossEntropyLoss(weight, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
    token_weight = torch.rand(5)
    torch.testing.assert_close(
        bnn.CrossEntropyLoss(z_loss=0.1)(logits, target, token_weight),
        B.cross_entropy(logits, target, z_loss=0.1, token_weight=token_weight),
    )
    assert "label_smoothing=0.1" in repr(ours)
