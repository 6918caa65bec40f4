"""Attention for training on a GPU: lengths and heads of models, memory, and the backward that adds up by atomics."""

from __future__ import annotations

import pytest
import torch

import bigkernels
from bigkernels import functional, use
from bigkernels._samples import SAMPLES, Sample, widen
from bigkernels._samples.attention import attention_sample, varlen_sample
from bigkernels.ops.registry import KERNEL_DTYPES

pytestmark = pytest.mark.gpu

MODELS = [
    *(
        attention_sample(f"head of {size}, {length} tokens", 1, 4, 2, length, size=size, causal=True)
        for size in (64, 80, 96, 128, 192, 256)
        for length in (1023, 2048)
    ),
    attention_sample("window of a model", 1, 8, 2, 3000, size=128, causal=True, window=(1023, 0)),
    attention_sample("window of a model, softcap", 1, 4, 2, 1500, size=256, causal=True, window=(511, 0), softcap=50.0),
    attention_sample("latent attention", 1, 4, 4, 1500, size=192, value_size=128, causal=True),
    attention_sample("pair bias", 2, 4, 4, 700, size=32, bias=(1, 4, 700, 700)),
    attention_sample("dropout of a model", 2, 8, 8, 600, size=64, dropout_p=0.1),
    varlen_sample("packed", [1024, 37, 512, 891, 0, 640, 1], heads=8, groups=2, size=128, causal=True),
]


def named(value: object) -> str:
    return f"{value.operator}: {value.name}" if isinstance(value, Sample) else str(value).removeprefix("torch.")


def _agrees(sample: Sample, dtype: torch.dtype) -> None:
    inputs = sample.inputs(dtype, "cuda")
    ours = sample.results(inputs, backend="triton")
    plain = sample.results(inputs, backend="reference")
    exact = sample.results(widen(inputs), backend="reference")
    wrong = {name: str(c) for name, c in sample.judge(ours, plain, exact, gradient_roundings=1).items() if not c.ok}
    assert not wrong


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=named)
@pytest.mark.parametrize("sample", MODELS, ids=named)
def test_sizes_of_models(sample: Sample, dtype: torch.dtype):
    _agrees(sample, dtype)


@pytest.mark.parametrize("sample", [*SAMPLES["attention"], *SAMPLES["varlen_attention"], *MODELS], ids=named)
def test_atomics_add_up_the_same_gradients(sample: Sample):
    bigkernels.allow_nondeterministic()
    try:
        _agrees(sample, torch.bfloat16)
    finally:
        bigkernels.allow_nondeterministic(False)


@pytest.mark.parametrize("window", [None, (1023, 0)])
def test_memory_grows_with_the_length_alone(window):
    """Forward and backward at 32768 tokens: the scores of one head alone would take 2 GB."""
    q, k, v = (torch.randn(1, 4, 32768, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with use("triton"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        functional.attention(q, k, v, causal=True, window=window).sum().backward()
        used = torch.cuda.max_memory_allocated() - before
    assert used < 8 * q.numel() * q.element_size()
