"""Attention's kernels for Hopper on a Hopper: right, the same bits every time, and in graphs."""

from __future__ import annotations

import pytest
import torch

from bigkernels import functional, use
from bigkernels._samples import Sample, widen
from bigkernels._samples.attention import attention_sample, varlen_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="the kernels are for compute capability 9.0",
    ),
]

CALLS = [
    *(
        attention_sample(f"head of {size}, {length} tokens", 2, 4, 2, length, size=size, causal=causal)
        for size in (64, 128)
        for length in (1, 63, 1023, 2048)
        for causal in (False, True)
    ),
    attention_sample("window", 1, 8, 2, 3000, size=128, causal=True, window=(1023, 0)),
    attention_sample("window, softcap", 1, 4, 2, 1500, size=128, causal=True, window=(511, 0), softcap=50.0),
    attention_sample("softcap, narrow", 1, 4, 2, 1500, size=64, causal=True, softcap=20.0),
    varlen_sample("packed", [1024, 37, 512, 891, 0, 640, 1], heads=8, groups=2, size=128, causal=True),
    varlen_sample("packed, narrow", [300, 0, 1, 64, 128, 700], heads=4, groups=4, size=64),
]


def named(value: object) -> str:
    return f"{value.operator}: {value.name}" if isinstance(value, Sample) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=named)
@pytest.mark.parametrize("sample", CALLS, ids=named)
def test_right(sample: Sample, dtype: torch.dtype):
    inputs = sample.inputs(dtype, "cuda")
    ours = sample.results(inputs, backend="gluon")
    plain = sample.results(inputs, backend="reference")
    exact = sample.results(widen(inputs), backend="reference")
    wrong = {name: str(c) for name, c in sample.judge(ours, plain, exact, gradient_roundings=1).items() if not c.ok}
    assert not wrong


def test_the_same_bits_every_time_and_in_a_graph():
    q, k, v = (
        torch.randn(2, 3000, h, 128, device="cuda").bfloat16().transpose(1, 2).requires_grad_() for h in (8, 2, 2)
    )

    def step() -> list[torch.Tensor]:
        with use("gluon"):
            out = functional.attention(q, k, v, causal=True)
            return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    expected = step()
    for _ in range(20):
        assert all(map(torch.equal, step(), expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(map(torch.equal, found, expected))
