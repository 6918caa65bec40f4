"""Decoding inside CUDA graphs: patched and quantized models over static caches give the tokens of eager decoding."""

from __future__ import annotations

import pytest
import torch

import bigkernels

transformers = pytest.importorskip("transformers")
from decoders import CACHE, build  # noqa: E402

pytestmark = pytest.mark.gpu
TOKENS = 12


def _model(config: str | None, patched: bool) -> torch.nn.Module:
    model = build("llama", torch.bfloat16).cuda()
    if config is not None:
        bigkernels.quantize(model, config)
    if patched:
        bigkernels.patch(model)
    return model


def _eager(model: torch.nn.Module, prompt: torch.Tensor) -> list[int]:
    return model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("config", [None, "int8", "int4", "nf4", "fp8"])
def test_a_plain_graph_holds_a_step(config: str | None):
    model = _model(config, patched=True)
    prompt = torch.randint(3, 199, (1, 9), device="cuda")
    expected = _eager(model, prompt)
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        logits = model(prompt, use_cache=True, **{CACHE: cache}).logits
        token = logits[:, -1:].argmax(-1)
        at = torch.full((1, 1), prompt.shape[1], device="cuda")
        found = [token.item()]

        def step() -> torch.Tensor:
            return model(token, position_ids=at, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)

        lengths = [layer.cumulative_length for layer in cache.layers]
        before = [n.clone() for n in lengths]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):  # the kernels are compiled, and the launches prepared
                step()
                for n, was in zip(lengths, before, strict=True):
                    n.copy_(was)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            following = step()
        for n, was in zip(lengths, before, strict=True):
            n.copy_(was)
        for _ in range(TOKENS - 1):
            graph.replay()
            token.copy_(following)
            at.add_(1)
            found.append(following.item())
    assert found == expected


@pytest.mark.parametrize("config", [None, "int4"])
@pytest.mark.parametrize("patched", [False, True])
def test_compiled_with_less_overhead(config: str | None, patched: bool):
    model = _model(config, patched)
    prompt = torch.randint(3, 199, (1, 9), device="cuda")
    expected = _eager(model, prompt)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, mode="reduce-overhead")
    found = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False, cache_implementation="static")
    # The compiler rounds elsewhere: tokens may part where two are as good as equal.
    assert found[0, prompt.shape[1] : prompt.shape[1] + 4].tolist() == expected[:4]
