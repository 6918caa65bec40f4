"""What `FlopCounterMode` counts: the products of the mathematics, two operations a multiplication and addition."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import bigkernels
from bigkernels import functional


def count(fn, *inputs, backward: bool = True) -> tuple[int, int]:
    """(forward, backward)"""
    leaves = [t.detach().requires_grad_(backward and t.is_floating_point()) for t in inputs]
    with FlopCounterMode(display=False) as counter:
        out = fn(*leaves)
        forward = counter.get_total_flops()
        if backward:
            out.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 0)}], ids=str)
def test_attention(options, library):
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 24)
    products = 2 * 2 * 4 * 5 * 7 * (16 + 24)
    assert count(lambda *t: functional.attention(*t, **options), q, k, v) == (products, 2 * products)
    assert count(lambda *t: functional.attention(*t, **options), q, k, v, backward=False) == (products, 0)
    with bigkernels.use("reference"):
        assert count(lambda *t: functional.attention(*t, **options), q, k, v) == (products, 2 * products)


def test_varlen_attention(library):
    q, k, v = torch.randn(9, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 8)
    ends = torch.tensor([0, 4, 9]), torch.tensor([0, 7, 12])
    products = 2 * 4 * (4 * 7 + 5 * 5) * (16 + 8)

    def call(q, k, v):
        return functional.varlen_attention(q, k, v, *ends, 5, 7)

    assert count(call, q, k, v) == (products, 2 * products)
    assert count(call, q, k, v, backward=False) == (products, 0)
    with bigkernels.use("reference"):
        assert count(call, q, k, v) == (products, 2 * products)
    with FakeTensorMode() as mode:  # lengths are data: as if all sequences had the longest ones
        fake = [mode.from_tensor(t) for t in (q, k, v, *ends)]
        found, _ = count(lambda *t: functional.varlen_attention(*t, *fake[3:], 5, 7), *fake[:3], backward=False)
    assert found == 2 * 4 * 2 * 5 * 7 * (16 + 8)


def test_decode_attention(library):
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 10, 2, 16), torch.randn(2, 10, 2, 8)
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    assert count(functional.decode_attention, q, k, v, lengths, backward=False) == (2 * 4 * 3 * (5 + 9) * (16 + 8), 0)


def test_linear(library):
    x, w, b = torch.randn(2, 5, 16), torch.randn(24, 16), torch.randn(24)
    products = 2 * 10 * 16 * 24
    assert count(functional.linear, x, w, b) == (products, 2 * products)
    assert count(lambda x: functional.linear(x, w, b), x) == (products, products)
    assert count(lambda w: functional.linear(x, w, b), w) == (products, products)


@pytest.mark.parametrize("config", ["int8", "int8-dynamic", "int4", "nf4", "fp8"])
def test_quantized_linear(config, library):
    x, w = torch.randn(5, 128), bigkernels.quantization.quantize_weight(torch.randn(24, 128), config)
    products = 2 * 5 * 128 * 24
    assert count(lambda x: functional.quantized_linear(x, w), x) == (products, products)


def test_losses_over_a_vocabulary(library):
    h, w, t = torch.randn(6, 16), torch.randn(33, 16), torch.randint(33, (6,))
    products = 2 * 6 * 16 * 33

    def loss(h, w):
        return functional.linear_cross_entropy(h, w, t)

    assert count(loss, h, w) == (products, 2 * products)
    assert count(lambda h: loss(h, w), h) == (products, products)
    assert count(loss, h, w, backward=False) == (products, 0)
    # In chunks forward makes the gradients while it has the logits.
    assert (
        sum(count(lambda h, w: functional.linear_cross_entropy(h, w, t, softcap=3.0, label_smoothing=0.1), h, w))
        == 3 * products
    )
    assert sum(count(lambda h, w: functional.linear_logprobs(h, w, t), h, w)) == 4 * products  # logits once more


def test_the_counter_may_be_imported_before_or_after():
    ask = "print(torch.ops.bigkernels.linear_fwd in torch.utils.flop_counter.flop_registry)"
    for first, second in (("bigkernels", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "bigkernels")):
        done = subprocess.run(
            [sys.executable, "-c", f"import torch, {first}\nimport {second}\n{ask}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "True\n"
