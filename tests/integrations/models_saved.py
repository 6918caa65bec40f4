"""Small models of transformers, quantized; and what another process makes of the folders that they were saved in."""

from __future__ import annotations

import itertools
import sys

import torch

FORMATS = ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "q4_1", "q8_0")
KINDS = ("plain", "tied", "experts", "lora")
CASES = tuple(itertools.product(FORMATS, KINDS))
IDS = torch.arange(3, 15)[None]


def plain(kind: str):
    """A model with values, not quantized yet."""
    import transformers

    sizes = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    if kind == "experts":
        config = transformers.MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2)
        return transformers.MixtralForCausalLM(config).eval()
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=kind == "tied", attention_bias=True)
    return transformers.LlamaForCausalLM(config).eval()


def options(kind: str) -> dict:
    return {"skip": (), "embeddings": True} if kind == "tied" else {}


def made(name: str, kind: str):
    import bigkernels

    model = plain(kind)
    bigkernels.quantize(model, name, **options(kind))
    if kind == "lora":
        bigkernels.nn.LoRALinear.add_to(model, ("*q_proj", "*down_proj"), rank=4, alpha=3.0)
        for key, p in model.named_parameters():
            if "lora_b" in key:
                torch.nn.init.normal_(p, std=0.1)
    return model


if __name__ == "__main__":
    import transformers

    import bigkernels.integrations.transformers  # noqa: F401

    folder, out = sys.argv[1:]
    logits = {}
    for name, kind in CASES:
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}-{kind}")
        with torch.no_grad():
            logits[name, kind] = model(IDS).logits
    torch.save(logits, out)
