"""What a model's numbers do not show: parameters that do nothing yet, and how it counts positions."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import uses_modules, uses_program
from program.models import any_build
from torch import Tensor, nn

import bigkernels

IDS = torch.randint(8, 150, (2, 9), generator=torch.Generator().manual_seed(0))


def _logits(model: nn.Module, **given: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **given).logits


def _close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def _neutral(model: nn.Module) -> None:
    for p in model.parameters():
        if p.dim() < 2:
            p.data = torch.ones_like(p) if p.mean() > 0.5 else torch.zeros_like(p)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("LlamaForCausalLM", {}),
        ("GPT2LMHeadModel", {}),
        ("BertLMHeadModel", {}),
        ("Gemma3ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
        ("GptOssForCausalLM", {}),
        ("CohereForCausalLM", {"use_qk_norm": True}),
        ("OlmoeForCausalLM", {}),
        ("BloomForCausalLM", {}),
        ("StableLmForCausalLM", {"qk_layernorm": True}),
    ],
)
def test_weights_of_ones_and_biases_of_zeros_that_change(name: str, more: dict):
    """A model as it is made: nothing is told from ones and zeros, and what they become is seen."""
    theirs = any_build(name, **more)
    _neutral(theirs)
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours)
    with uses_program(ours):
        _close(_logits(ours), _logits(theirs))
    for model in (theirs, ours):
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.data += (0.3 if p.dim() < 2 or min(p.shape) < 8 else 0.02) * torch.randn(p.shape, generator=generator)
    with uses_program(ours):
        _close(_logits(ours), _logits(theirs))


@pytest.mark.parametrize("name", ["RobertaForCausalLM", "LlamaForCausalLM", "OPTForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("padded", [False, True])
def test_positions_that_are_not_given(name: str, padded: bool):
    """Some models count from the token after padding's number, some count what a mask leaves."""
    theirs = any_build(name)
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours)
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, :3] = 0
    seen = mask.bool()
    for given in ({}, {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}):
        _close(_logits(ours, attention_mask=mask, **given)[seen], _logits(theirs, attention_mask=mask, **given)[seen])
    if name == "RobertaForCausalLM":
        with uses_modules(ours):
            _logits(ours, attention_mask=mask)
        assert "positions" in ours.__dict__["_bigkernels_program"].why
    with uses_program(ours):
        _logits(ours, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
