"""Small models of real architectures, and what a real step of theirs takes."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from bigkernels.bench.memory import extra_peak  # noqa: E402
from bigkernels.planning import _models  # noqa: E402

VOCABULARY = 1031
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_attention_heads": 4}
_GATED = _SIZES | {"intermediate_size": 344, "num_hidden_layers": 2, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_GATED),
    "qwen2": lambda: transformers.Qwen2Config(**_GATED, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**_GATED, head_dim=32),
    "mixtral": lambda: transformers.MixtralConfig(**_GATED, num_local_experts=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES, intermediate_size=512, num_hidden_layers=2),
    "bert": lambda: transformers.BertConfig(
        **_SIZES, intermediate_size=512, num_hidden_layers=2, architectures=["BertForSequenceClassification"]
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY, d_model=128, d_kv=32, d_ff=512, num_layers=1, num_heads=4, decoder_start_token_id=0
    ),
}


def build(config, dtype: torch.dtype) -> torch.nn.Module:
    """A real model of the class that a plan takes."""
    return _models._model_class(transformers, config)(copy.deepcopy(config)).to(dtype)


def step_of(model, optimizer, batch: int, seq: int):
    ids = torch.randint(3, VOCABULARY, (batch, seq))
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    labels = torch.zeros(batch, dtype=torch.int64) if classifies else ids
    options = {} if classifies else {"use_cache": False}

    def step() -> None:
        model(input_ids=ids, labels=labels, **options).loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


def measured(step) -> int:
    """The largest number of bytes beyond those before a step that follows another."""
    step()
    return extra_peak(step, "cpu")


def beyond(plan) -> int:
    """The same of a plan."""
    return plan.peak - sum(plan.held.get(name, 0) for name in ("parameters", "buffers", "inputs", "optimizer state"))
