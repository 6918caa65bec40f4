# ruff: noqa: E501 (a case a line reads best)
"""Wrong arguments raise before anything is computed, and say what was given and what is accepted."""

from __future__ import annotations

import re

import pytest
import torch

import bigkernels.functional as B

x = torch.randn(3, 8)
w = torch.ones(8)
q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
cos = sin = torch.ones(1, 5, 8)
p, starts = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
v = torch.randn(11, 8)
logits, target = torch.randn(3, 8), torch.tensor([0, 7, -100])

CASES = [
    # rms_norm
    (lambda: B.rms_norm([1.0]), TypeError, "rms_norm: x must be a tensor, got list"),
    (lambda: B.rms_norm(x.long()), TypeError, "rms_norm: x is int64; accepted are float32, bfloat16, float16, float64"),
    (lambda: B.rms_norm(x, w.int()), TypeError, "rms_norm: weight is int32"),
    (lambda: B.rms_norm(x, 2.0), TypeError, "rms_norm: weight must be a tensor, got float"),
    (lambda: B.rms_norm(x, w[:7]), ValueError, "rms_norm: weight has shape (7,), expected (8,)"),
    (lambda: B.rms_norm(x, w[None]), ValueError, "rms_norm: weight has shape (1, 8), expected (8,)"),
    (lambda: B.rms_norm(x, w.to("meta")), ValueError, "rms_norm: weight is on meta and x on cpu"),
    (lambda: B.rms_norm(x, w, residual=x[:2]), ValueError, "rms_norm: residual has shape (2, 8), expected (3, 8)"),
    (lambda: B.rms_norm(x, w, residual=x.half()), TypeError, "rms_norm: residual is float16 and x is float32"),
    (lambda: B.rms_norm(torch.tensor(1.0)), ValueError, "rms_norm: x has no dimensions"),
    # layer_norm
    (lambda: B.layer_norm(x.bool()), TypeError, "layer_norm: x is bool"),
    (lambda: B.layer_norm(x, w[:1]), ValueError, "layer_norm: weight has shape (1,), expected (8,)"),
    (lambda: B.layer_norm(x, w, w[:3]), ValueError, "layer_norm: bias has shape (3,), expected (8,)"),
    (lambda: B.layer_norm(x, w, w.to("meta")), ValueError, "layer_norm: bias is on meta and x on cpu"),
    (lambda: B.layer_norm(x, residual=x.double()), TypeError, "layer_norm: residual is float64 and x is float32"),
    # rope
    (lambda: B.rope(q, k, None, sin), TypeError, "rope: cos must be a tensor, got NoneType"),
    (lambda: B.rope(q, k.half(), cos, sin), TypeError, "rope: k is float16 and q is float32; they must have one dtype"),
    (lambda: B.rope(q[0], k, cos, sin), ValueError, "rope: q has shape (4, 5, 8), expected (B, H, S, D)"),
    (lambda: B.rope(q, k[..., :6], cos, sin), ValueError, "rope: k has shape (2, 2, 5, 6), expected (2, 2, 5, 8)"),
    (lambda: B.rope(q, k, cos, sin[..., :4]), ValueError, "rope: sin has shape (1, 5, 4), expected (1, 5, 8)"),
    (lambda: B.rope(q, k, cos[:, :4], sin[:, :4]), ValueError, "rope: cos has shape (1, 4, 8); expected (2 or 1, 5, R)"),
    (lambda: B.rope(q, k, cos[..., :3], sin[..., :3]), ValueError, "R even and at most 8"),
    (lambda: B.rope(q, k, cos.expand(3, 5, 8), sin.expand(3, 5, 8)), ValueError, "rope: cos has shape (3, 5, 8)"),
    (lambda: B.rope(q, k, cos.tile(1, 1, 2), sin.tile(1, 1, 2)), ValueError, "rope: cos has shape (1, 5, 16)"),
    (lambda: B.rope(q, k, cos, sin.bfloat16()), TypeError, "rope: sin is bfloat16 and cos is float32"),
    (lambda: B.rope(q, k, cos.int(), sin.int()), TypeError, "rope: cos is int32"),
    (lambda: B.rope(q, k, cos.to("meta"), sin), ValueError, "rope: cos is on meta and q on cpu"),
    # glu
    (lambda: B.glu(x, x[:2]), ValueError, "glu: up has shape (2, 8), expected (3, 8)"),
    (lambda: B.glu(x, x.half()), TypeError, "glu: up is float16 and gate is float32"),
    (lambda: B.glu(x, x, activation="swish"), ValueError, "glu: activation is 'swish'; accepted are silu, gelu, gelu_tanh"),
    (lambda: B.glu(x, None), TypeError, "glu: up must be a tensor, got NoneType"),
    (lambda: B.glu(x, x.to("meta")), ValueError, "glu: up is on meta and gate on cpu"),
    # cross_entropy
    (lambda: B.cross_entropy(logits, target.float()), TypeError, "cross_entropy: target is float32; accepted are int64 and int32"),
    (lambda: B.cross_entropy(logits, [1, 2, 3]), TypeError, "cross_entropy: target is list"),
    (lambda: B.cross_entropy(logits[0], target), ValueError, "cross_entropy: logits has shape (8,), expected (T, V)"),
    (lambda: B.cross_entropy(logits, target[:2]), ValueError, "cross_entropy: target has shape (2,), expected (3,)"),
    (lambda: B.cross_entropy(logits, target + 1), ValueError, "outside the vocabulary [0, 8) and not ignore_index (-100)"),
    (lambda: B.cross_entropy(logits, target, ignore_index=0), ValueError, "target holds -100, outside the vocabulary"),
    (lambda: B.cross_entropy(logits, target, w[:2]), ValueError, "cross_entropy: class_weight has shape (2,), expected (8,)"),
    (lambda: B.cross_entropy(logits, target, w.long()), TypeError, "cross_entropy: class_weight is int64"),
    (lambda: B.cross_entropy(logits, target, token_weight=w), ValueError, "token_weight has shape (8,), expected (3,)"),
    (lambda: B.cross_entropy(logits, target, reduction="max"), ValueError, "reduction is 'max'; accepted are none, mean, sum"),
    (lambda: B.cross_entropy(logits, target, label_smoothing=1.5), ValueError, "label_smoothing is 1.5, expected in [0, 1]"),
    (lambda: B.cross_entropy(logits, target, z_loss=-1.0), ValueError, "z_loss is -1.0, expected not negative"),
    (lambda: B.cross_entropy(logits, target, softcap=0.0), ValueError, "softcap is 0.0, expected positive or None"),
    (lambda: B.cross_entropy(logits, target, softcap=-2.0), ValueError, "softcap is -2.0, expected positive or None"),
    (lambda: B.cross_entropy(logits, target, focal_gamma=-1.0), ValueError, "focal_gamma is -1.0, expected not negative"),
    (lambda: B.cross_entropy(logits, target.to("meta")), ValueError, "target is on meta and logits on cpu"),
    # linear_cross_entropy: x (3, 8) are hidden states, v (11, 8) is a head
    (lambda: B.linear_cross_entropy([1.0], v, target), TypeError, "linear_cross_entropy: hidden must be a tensor, got list"),
    (lambda: B.linear_cross_entropy(x, 2.0, target), TypeError, "weight is float; accepted are floating tensors and QuantizedWeight"),
    (lambda: B.linear_cross_entropy(x, v.half(), target), TypeError, "linear_cross_entropy: weight is float16 and hidden is float32"),
    (lambda: B.linear_cross_entropy(x, v[0], target), ValueError, "linear_cross_entropy: weight has shape (8,), expected (V, H)"),
    (lambda: B.linear_cross_entropy(x[:, :7], v, target), ValueError, "hidden has shape (3, 7), expected (..., 8)"),
    (lambda: B.linear_cross_entropy(x, v, target.float()), TypeError, "target is float32; accepted are int64 and int32 class indices"),
    (lambda: B.linear_cross_entropy(x, v, target[:2]), ValueError, "linear_cross_entropy: target has shape (2,), expected (3,)"),
    (lambda: B.linear_cross_entropy(x, v, target + 4), ValueError, "target holds 11, outside the vocabulary [0, 11) and not ignore_index (-100)"),
    (lambda: B.linear_cross_entropy(x, v, target, ignore_index=0), ValueError, "target holds -100, outside the vocabulary"),
    (lambda: B.linear_cross_entropy(x, v, target.to("meta")), ValueError, "target is on meta and hidden on cpu"),
    (lambda: B.linear_cross_entropy(x, v, target, w), ValueError, "linear_cross_entropy: bias has shape (8,), expected (11,)"),
    (lambda: B.linear_cross_entropy(x, v, target, v[:, 0].double()), TypeError, "linear_cross_entropy: bias is float64 and hidden is float32"),
    (lambda: B.linear_cross_entropy(x, v, target, class_weight=w), ValueError, "class_weight has shape (8,), expected (11,)"),
    (lambda: B.linear_cross_entropy(x, v, target, class_weight=target), TypeError, "linear_cross_entropy: class_weight is int64"),
    (lambda: B.linear_cross_entropy(x, v, target, token_weight=w), ValueError, "token_weight has shape (8,), expected (3,)"),
    (lambda: B.linear_cross_entropy(x, v, target, reduction="max"), ValueError, "reduction is 'max'; accepted are none, mean, sum"),
    (lambda: B.linear_cross_entropy(x, v, target, label_smoothing=-0.1), ValueError, "label_smoothing is -0.1, expected in [0, 1]"),
    (lambda: B.linear_cross_entropy(x, v, target, z_loss=-1.0), ValueError, "z_loss is -1.0, expected not negative"),
    (lambda: B.linear_cross_entropy(x, v, target, softcap=0.0), ValueError, "softcap is 0.0, expected positive or None"),
    (lambda: B.linear_cross_entropy(x, v, target, focal_gamma=-1.0), ValueError, "focal_gamma is -1.0, expected not negative"),
    (lambda: B.linear_cross_entropy(x, v, target, logit_scale=float("inf")), ValueError, "logit_scale is inf, expected a finite number"),
    # attention
    (lambda: B.attention(q, k, [1]), TypeError, "attention: v must be a tensor, got list"),
    (lambda: B.attention(q.long(), k.long(), k.long()), TypeError, "attention: q is int64"),
    (lambda: B.attention(q, k, k.half()), TypeError, "attention: v is float16 and q is float32; they must have one dtype"),
    (lambda: B.attention(q[0], k, k), ValueError, "attention: q has shape (4, 5, 8), expected (B, H, S, D)"),
    (lambda: B.attention(q, k[..., :4], k), ValueError, "attention: k has heads of 4 elements and q of 8"),
    (lambda: B.attention(q, k, k[:, :, :3]), ValueError, "attention: v has shape (2, 2, 3, 8), expected that of k"),
    (lambda: B.attention(q[:, :3], k, k), ValueError, "attention: q has 3 heads, not a multiple of k's 2"),
    (lambda: B.attention(q, k[:1], k[:1]), ValueError, "attention: k has a batch of 1 and q of 2"),
    (lambda: B.attention(q, k, k, mask=torch.zeros(5, 5)), TypeError, "attention: mask is torch.float32; accepted is torch.bool"),
    (lambda: B.attention(q, k, k, mask=torch.ones(5, 4) > 0), ValueError, "attention: mask has shape (1, 1, 5, 4)"),
    (lambda: B.attention(q, k, k, bias=torch.zeros(3, 1, 5, 5)), ValueError, "attention: bias has shape (3, 1, 5, 5), which does not"),
    (lambda: B.attention(q, k, k, bias=torch.zeros(1, 2, 4, 5, 5)), ValueError, "attention: bias has shape (1, 2, 4, 5, 5)"),
    (lambda: B.attention(q, k, k, bias=torch.ones(5, 5) > 0), TypeError, "attention: bias is bool"),
    (lambda: B.attention(q, k, k, sinks=torch.zeros(3)), ValueError, "attention: sinks has shape (3,), expected (4,)"),
    (lambda: B.attention(q, k, k, alibi_slopes=torch.zeros(4, 1)), ValueError, "attention: alibi_slopes has shape (4, 1)"),
    (lambda: B.attention(q, k, k, prefix_lengths=torch.zeros(2)), TypeError, "attention: prefix_lengths is float32; accepted are"),
    (lambda: B.attention(q, k, k, prefix_lengths=torch.zeros(3).int()), ValueError, "attention: prefix_lengths has shape (3,)"),
    (lambda: B.attention(q, k, k, softcap=0.0), ValueError, "attention: softcap is 0.0, expected positive or None"),
    (lambda: B.attention(q, k, k, dropout_p=1.0), ValueError, "attention: dropout_p is 1.0, expected in [0, 1)"),
    (lambda: B.attention(q, k, k, window=3), ValueError, "attention: window is 3, expected (left, right)"),
    (lambda: B.attention(q, k, k, window=(-2, 0)), ValueError, "attention: window is (-2, 0)"),
    (lambda: B.attention(q, k, k.to("meta")), ValueError, "attention: v is on meta and q on cpu"),
    # varlen_attention
    (lambda: B.varlen_attention(q, p, p, starts, starts, 4, 4), ValueError, "varlen_attention: q has shape (2, 4, 5, 8), expected"),
    (lambda: B.varlen_attention(p, p, p, starts.float(), starts, 4, 4), TypeError, "varlen_attention: cu_seqlens_q is float32"),
    (lambda: B.varlen_attention(p, p, p, starts, starts[:2], 4, 4), ValueError, "cu_seqlens_k has shape (2,), expected (3,)"),
    (lambda: B.varlen_attention(p, p, p, starts, starts + 1, 4, 4), ValueError, "cu_seqlens_k must rise from 0 to at most 5"),
    (lambda: B.varlen_attention(p, p, p, starts, starts, 2, 4), ValueError, "max_seqlen_q is 2, shorter than a sequence of 3"),
    (lambda: B.varlen_attention(p, p, p, starts, starts, starts, 4), TypeError, "max_seqlen_q is a tensor; expected an int"),
    (lambda: B.varlen_attention(p, p, p, starts.flip(0), starts, 4, 4), ValueError, "cu_seqlens_q must rise from 0"),
]  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("call, error, message", CASES, ids=[m for *_, m in CASES])
def test_wrong_arguments(call, error, message, grad):
    for t in (x, w, v, q, k, logits):
        t.requires_grad_(grad)
    try:
        with pytest.raises(error, match=re.escape(message)) as found:
            call()
    finally:
        for t in (x, w, v, q, k, logits):
            t.requires_grad_(False)
    assert type(found.value) is error
    assert str(found.value).startswith("bigkernels.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_the_reference_checks_as_the_kernels_do(dtype):
    wide = x.to(dtype)
    if dtype.is_complex:
        with pytest.raises(TypeError, match="x is complex64"):
            B.rms_norm(wide)
    else:
        with pytest.raises(ValueError, match="weight has shape"):
            B.rms_norm(wide, w[:3])
        with pytest.raises(ValueError, match="outside the vocabulary"):
            B.cross_entropy(wide, target + 1)
