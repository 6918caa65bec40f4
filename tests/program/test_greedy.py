"""Greedy tokens in float32 are those of the unpatched model: some of a small model, and 1,000 of SmolLM2."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import generate, prompt, shared_pair, uses_program

import bigkernels


def test_prompts_of_a_small_model():
    pair = shared_pair("qwen3")
    with uses_program(pair.ours, at_least=5 * 40):
        for seed in range(5):
            pair.same(lambda model, seed=seed: generate(model, prompt(1, 6 + seed, seed=seed), new=40))


@pytest.mark.slow
def test_a_thousand_tokens_of_smollm2():
    """20 prompts of Shakespeare, 50 tokens each."""
    from bigkernels import _assets as assets

    try:
        theirs, tokenizer = assets.load_model(assets.model_folder())
        texts = assets.plays()
    except Exception as error:  # noqa: BLE001  no network, say
        pytest.skip(f"the model or the text is not to be had: {error}")
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours)
    text = texts[max(texts, key=lambda name: len(texts[name]))]
    step, made = len(text) // 21, 0
    with torch.no_grad(), uses_program(ours, at_least=900):
        for i in range(20):
            ids = tokenizer(text[step * i : step * i + 200], return_tensors="pt").input_ids
            expected, got = (
                model.generate(ids, max_new_tokens=50, min_new_tokens=50, do_sample=False, pad_token_id=0)
                for model in (theirs, ours)
            )
            assert torch.equal(got, expected), f"prompt {i}"
            made += got.shape[1] - ids.shape[1]
    assert made == 1000
