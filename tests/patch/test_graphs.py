"""A decoding step that a CUDA graph can hold: patched, quantized, over a static cache, it waits for nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
import transformers
from decoders import CACHE
from driver_without_device import without_device
from pretend_gpu import CUDA, PretendGpu, Waits, pretend, put, put_module

import bigkernels

LENGTH = 32


def _model() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)


def _static(model: torch.nn.Module) -> transformers.StaticCache:
    """A cache with memory of its own, which a graph finds where it was."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.int64), use_cache=True, **{CACHE: cache})
    for layer in cache.layers:
        layer.device = CUDA
        for t in vars(layer).values():
            if isinstance(t, torch.Tensor):
                put(t)
    return cache


@pytest.mark.parametrize("config", [None, "int8", "int8-dynamic", "int4", "nf4", "fp8"])
def test_a_step_over_a_static_cache_waits_for_nothing(config, monkeypatch):
    model = _model()
    bigkernels.patch(model, linear=False, decode=False)
    cache = _static(model)
    if config is not None:
        bigkernels.quantize(model, config)
    pretend(monkeypatch)
    with without_device() as driver:
        put_module(model)
        token, at = torch.ones(1, 1, dtype=torch.int64), torch.full((1, 1), 5)
        put(token, at)

        def step() -> torch.Tensor:
            return model(token, position_ids=at, use_cache=True, **{CACHE: cache}).logits

        with torch.no_grad(), PretendGpu():
            for _ in range(3):  # what is made once is made now, as before a capture
                step()
        driver.launches.clear()
        with torch.no_grad(), PretendGpu(waits="refused"):
            logits = step()
    assert logits.shape == (1, 1, 199)
    assert {launch.kernel for launch in driver.launches} >= {"forward_rows", "activate"}


def test_the_check_notices_a_wait(monkeypatch):
    pretend(monkeypatch)
    with PretendGpu(waits="refused"), pytest.raises(Waits):
        x = torch.ones(3)
        put(x)
        if x.sum() > 1:
            pass
