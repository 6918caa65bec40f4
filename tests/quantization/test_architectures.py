"""Every language model of transformers that builds with a tiny configuration: quantized, it computes what a model with
the dequantized weights does, and that is the model that `dequantize` gives back.

Slow, and left out of the default run (`pytest -m slow`).
"""

from __future__ import annotations

import copy

import pytest
import torch

import bigkernels

pytest.importorskip("transformers")

from architectures import MODELS, build  # noqa: E402

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 27).view(2, 12)


def described(model) -> list[tuple]:
    found = [(path, type(m)) for path, m in model.named_modules(remove_duplicate=False)]
    return found + [(path, p.shape, p.dtype, p.requires_grad) for path, p in model.named_parameters()]


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    if logits.requires_grad:
        logits.float().square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.numel()}


@pytest.mark.parametrize("config", ["int8", "nf4"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_quantized_is_dequantized(name: str, config: str):
    model = build(name, "sdpa")
    try:
        with torch.no_grad():
            step(model)
    except Exception as error:
        pytest.skip(f"does not run: {type(error).__name__}: {str(error)[:80]}")
    before = described(model)
    report = bigkernels.quantize(model, config, skip=(), embeddings=True)
    assert report.quantized
    plain = copy.deepcopy(model)
    bigkernels.dequantize(plain)
    assert sorted(map(str, described(plain))) == sorted(map(str, before))
    found, expected = step(model), step(plain)
    assert (found[0] - expected[0]).abs().max() <= 1e-4 * expected[0].abs().max()
    largest = max(g.abs().max() for g in expected[1].values())
    for key, grad in found[1].items():
        theirs = expected[1][key]
        assert (grad - theirs).abs().max() <= 1e-3 * max(theirs.abs().max(), 1e-4 * largest), key
