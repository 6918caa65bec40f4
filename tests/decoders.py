"""Tiny random language models that generate, and pairs of one: as transformers has it, and patched."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigkernels

transformers = pytest.importorskip("transformers")

VOCABULARY = 199
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
WINDOW = 8
# What patched models run in one native call; `experts` and others may be the model's own code in the middle of it.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        SIZES
        | dict(
            num_hidden_layers=3,
            sliding_window=WINDOW,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            tie_word_embeddings=False,
        ),
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SIZES | EXPERTS | dict(norm_topk_prob=True)),
    "mistral": ("MistralForCausalLM", "MistralConfig", SIZES | dict(sliding_window=WINDOW)),
}
# What calls of this version of transformers name the cache.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """A model whose weights are large enough that its next token depends on all of its layers."""
    model, config, sizes = MODELS[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes | changes)).eval()
    return spread(made, seed).to(dtype)


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, so that no norm weight is exactly 1, no bias 0, and no two logits are as good as equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter += 0.2 * noise
            elif parameter is model.get_output_embeddings().weight is model.get_input_embeddings().weight:
                parameter.copy_(0.05 * noise)  # else it gives the last token again, whatever the blocks say
            elif "embed" in path or "wte" in path or "wpe" in path:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    return model


@functools.cache
def _built(name: str, dtype: torch.dtype) -> nn.Module:
    return build(name, dtype)


@dataclass(frozen=True)
class Pair:
    """One model twice: as transformers runs it, and patched."""

    theirs: nn.Module
    ours: nn.Module

    def both(self, run: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
        """What `run` gives for each, with the same random numbers."""
        results = []
        for model in (self.theirs, self.ours):
            torch.manual_seed(3)
            results.append(run(model))
        return results[0], results[1]

    def same(self, run: Callable[[nn.Module], Tensor]) -> Tensor:
        """Both give equal tokens; returns them."""
        expected, got = self.both(run)
        assert torch.equal(got, expected), f"{got.tolist()}\n{expected.tolist()}"
        return got


def pair(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Pair:
    """Both copies may be changed."""
    theirs = copy.deepcopy(_built(name, dtype))
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours, **options)
    return Pair(theirs, ours)


@functools.cache
def shared_pair(name: str, dtype: torch.dtype = torch.float32) -> Pair:
    """Neither copy may be changed."""
    return pair(name, dtype)


def patch_modules(model: nn.Module) -> nn.Module:
    """Patched, but for the program."""
    bigkernels.patch(model, decode=False)
    return model


def prompt(batch: int = 1, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: nn.Module, ids: Tensor | None = None, new: int = 12, **options: Any) -> Any:
    ids = prompt() if ids is None and "inputs_embeds" not in options else ids
    given = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0} | options
    if ids is not None and ids.dim() == 2 and "attention_mask" not in given:
        given["attention_mask"] = (ids != 0).long()
    return model.generate(ids, **given) if ids is not None else model.generate(**given)


@contextmanager
def uses_program(model: nn.Module, at_least: int = 1) -> Iterator[None]:
    """The block's calls of the model take its program, all of them."""
    steps = model.__dict__["_bigkernels_program"]
    taken, left = steps.taken, steps.left
    yield
    assert steps.left == left, steps.why
    assert steps.taken >= taken + at_least


@contextmanager
def uses_modules(model: nn.Module) -> Iterator[None]:
    """No call in the block takes the program."""
    steps = model.__dict__.get("_bigkernels_program")
    taken = 0 if steps is None else steps.taken
    yield
    assert (0 if steps is None else steps.taken) == taken


def given(out: Any) -> Any:
    """The cache of a model's or of `generate`'s output."""
    return out[CACHE] if CACHE in out else out["past_key_values"]


def runs(model: nn.Module) -> tuple[int, str]:
    """How many calls of a patched model have taken its program, and why the last of the others did not."""
    steps = model.__dict__["_bigkernels_program"]
    return steps.taken, steps.why
