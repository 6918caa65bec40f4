"""Routed experts: found in models by numbers, and computed by the step program's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import EXPERTS, SIZES, spread, transformers

import bigkernels
from bigkernels.program._find import find
from bigkernels.program._ir import Experts, Graph

FOUR = dict(num_local_experts=4, num_experts_per_tok=2)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("MixtralConfig", FOUR),
    "Qwen3Moe": ("Qwen3MoeConfig", EXPERTS | dict(norm_topk_prob=True)),
    "Olmoe": ("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=3, norm_topk_prob=False)),
    "GraniteMoe": ("GraniteMoeConfig", FOUR | dict(hidden_act="gelu_pytorch_tanh")),
}


GPT_OSS = FOUR | dict(sliding_window=5, rope_parameters={"rope_type": "default", "rope_theta": 1e4})


def _model(name: str) -> torch.nn.Module:
    config, options = MODELS.get(name, ("GptOssConfig", GPT_OSS))
    made = getattr(transformers, config)(**(SIZES | options))
    return spread(getattr(transformers, f"{name}ForCausalLM")(made).eval())


@pytest.mark.parametrize("quantized", [None, "int4", "fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_found(name: str, quantized: str | None):
    model = _model(name)
    if quantized:
        bigkernels.quantize(model, quantized)
    found = _experts_of(model)
    assert len(found) == 2 and all(op.top == model.config.num_experts_per_tok and op.logits is not None for op in found)
    assert all(op.renormalize == getattr(model.config, "norm_topk_prob", True) for op in found)
    assert all(op.act == {"GraniteMoe": "gelu_tanh"}.get(name, "silu") for op in found)


def _experts_of(model: torch.nn.Module) -> list[Experts]:
    graph = find(model)
    assert isinstance(graph, Graph), graph
    return [op for op in graph.operations if isinstance(op, Experts)]


def test_limits_that_a_few_tokens_do_not_reach():
    """The activations of gpt-oss are cut at 7, where no small random model gets to."""
    op = _experts_of(_model("GptOss"))[0]
    assert (op.limit, op.alpha, op.up_offset, op.act) == (7.0, 1.702, 1.0, "quick_gelu")
    assert op.stacked.interleaved and op.stacked.transposed and op.stacked.down_bias == "down_proj_bias"


def test_a_module_that_looks_alike():
    """Its weights are those of experts, and it computes something else: that is left to its own code."""
    model = _model("Mixtral")
    experts = model.model.layers[1].mlp.experts

    class Others(type(experts)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights.square())

    experts.__class__ = Others
    assert not any(op.stacked.module is experts for op in _experts_of(model))


def test_a_router_that_looks_alike():
    model = _model("Mixtral")
    router = model.model.layers[0].mlp.gate

    class Others(type(router)):
        def forward(self, hidden_states):
            logits, weights, chosen = super().forward(hidden_states)
            return logits, weights, (chosen + 1) % 4

    router.__class__ = Others
    assert all(op.logits is None for op in _experts_of(model) if op.stacked.module is model.model.layers[0].mlp.experts)
