"""Random small language models, patched: logits of random batches in random parts against those of the modules.

``make fuzz-generation`` runs 500; `test_fuzz.py` runs a few. Each case is made from one number, which a fault names.
"""

from __future__ import annotations

import argparse
import collections
import copy
import random
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from decoders import CACHE, given, patch_modules, runs, spread
from torch import Tensor, nn

import bigkernels
from bigkernels._compare import compare

FORMATS = ["int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8"]
_SHAKEN = 4
_TOKEN_STEP = 1 / 254  # half a step of numbers in 8 bits, of the largest
ACTIVATIONS = ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu", "sigmoid", "relu2"]


@dataclass
class Case:
    """One model and how it is called."""

    seed: int
    model: str
    config: str
    options: dict[str, Any]
    dtype: torch.dtype
    quantized: str | None
    batch: int
    sizes: list[int]
    padding: list[int]
    cache: str
    threads: int
    keep: int
    reorder: bool = False
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = f"{self.dtype}".removeprefix("torch."), self.quantized, f"batch {self.batch}", f"parts {self.sizes}"
        return f"{self.seed}: {self.model} {self.options} " + ", ".join(
            str(p) for p in (*parts, f"padding {self.padding}", self.cache, f"{self.threads} threads") if p is not None
        )


def _decoder(r: random.Random, *, rotary: bool = True, head_dim: bool = True) -> dict[str, Any]:
    """Sizes of a model in the manner of Llama."""
    groups = r.choice([1, 1, 2, 3, 4])
    heads = groups * r.choice([1, 1, 2, 3, 4, 7])
    d = r.choice([2, 4, 8, 14, 16, 18, 24, 32, 40, 64, 80, 128] if rotary else [1, 3, 8, 16, 33])
    hidden = heads * (r.choice([k for k in (1, 2, 3, 5, 8, 16, 31, 32, 48) if heads * k <= 200]) if head_dim else d)
    made = dict(
        vocab_size=r.choice([17, 33, 64, 101, 199, 256, 301]),
        hidden_size=hidden,
        intermediate_size=r.choice([1, 7, 32, 45, 64, 96, 130, 192]),
        num_hidden_layers=r.choice([1, 2, 2, 3]),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=r.random() < 0.3,
    )
    if head_dim:
        made["head_dim"] = d
    return made


def _rope(r: random.Random) -> dict[str, Any]:
    kind = r.choice(["default", "default", "default", "linear", "llama3", "yarn", "dynamic"])
    made: dict[str, Any] = {"rope_type": kind, "rope_theta": r.choice([100.0, 10000.0, 5e5])}
    if kind != "default":
        made["factor"] = r.choice([2.0, 4.0])
    if kind == "llama3":
        made |= dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    if kind in ("yarn", "dynamic"):
        made |= dict(original_max_position_embeddings=16)
    return {"rope_parameters": made}


def _act(r: random.Random, name: str = "hidden_act") -> dict[str, str]:
    return {name: r.choice(ACTIVATIONS)} if r.random() < 0.3 else {}


def _windows(r: random.Random, made: dict[str, Any]) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    return dict(
        sliding_window=r.choice([1, 2, 3, 5, 8, 17]),
        layer_types=[r.choice(kinds) for _ in range(made["num_hidden_layers"])],
    )


def _experts(r: random.Random, dtype: torch.dtype) -> dict[str, int]:
    experts = r.choice([2, 3, 4, 6])
    # In 16 bits all are chosen: a rounding that chooses another would make a large difference.
    return dict(
        top=r.choice([1, 2, experts]) if dtype == torch.float32 else experts,
        experts=experts,
        width=r.choice([3, 16, 32, 40]),
    )


def _architecture(r: random.Random, dtype: torch.dtype) -> tuple[str, str, dict[str, Any]]:
    kind = r.choice(list(_ARCHITECTURES))
    model, config, make = _ARCHITECTURES[kind]
    return model, config, make(r, dtype)


def _llama(r, _):
    return _decoder(r) | _rope(r) | _act(r) | dict(attention_bias=r.random() < 0.3, mlp_bias=r.random() < 0.3)


def _mistral(r, _):
    return _decoder(r) | _rope(r) | _act(r) | dict(sliding_window=r.choice([None, 1, 2, 3, 5, 17]))


def _qwen2(r, _):
    made = _decoder(r)
    return made | _rope(r) | (dict(use_sliding_window=True) | _windows(r, made) if r.random() < 0.5 else {})


def _gemma2(r, _):
    made = _decoder(r)
    return (
        made
        | _windows(r, made)
        | dict(
            query_pre_attn_scalar=r.choice([7, 16]),
            attn_logit_softcapping=r.choice([None, 3.0, 50.0]),
            final_logit_softcapping=r.choice([None, 5.0, 30.0]),
        )
    )


def _gemma3(r, _):
    made = _decoder(r)
    return (
        made
        | _windows(r, made)
        | dict(query_pre_attn_scalar=r.choice([7, 16]), final_logit_softcapping=r.choice([None, None, 20.0]))
    )


def _phi3(r, _):
    return _decoder(r, head_dim=False) | dict(sliding_window=r.choice([None, 3, 8]))


def _smollm3(r, _):
    made = _decoder(r, head_dim=False)
    return made | dict(no_rope_layers=[r.randint(0, 1) for _ in range(made["num_hidden_layers"])])


def _granite(r, _):
    return _decoder(r, head_dim=False) | dict(
        embedding_multiplier=r.choice([1.0, 3.0]),
        logits_scaling=r.choice([1.0, 4.0]),
        residual_multiplier=r.choice([1.0, 0.3]),
        attention_multiplier=r.choice([1.0, 0.1]),
    )


def _cohere(r, _):
    return _decoder(r, head_dim=False) | dict(logit_scale=r.choice([0.25, 1.0]), use_qk_norm=r.random() < 0.5)


def _gpt2(r, _):
    heads = r.choice([1, 2, 3, 4])
    return dict(
        vocab_size=r.choice([33, 101, 199]),
        n_embd=heads * r.choice([1, 5, 8, 16, 33]),
        n_head=heads,
        n_layer=r.choice([1, 2, 3]),
        n_positions=128,
        n_inner=r.choice([None, 7, 50]),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=r.random() < 0.3,
        scale_attn_by_inverse_layer_idx=r.random() < 0.3,
        **_act(r, "activation_function"),
    )


def _neox(r, _):
    made = _decoder(r, head_dim=False)
    made.pop("num_key_value_heads")
    return made | dict(
        use_parallel_residual=r.random() < 0.5,
        attention_bias=r.random() < 0.7,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": r.choice([0.5, 1.0])},
    )


def _starcoder2(r, _):
    return _decoder(r, head_dim=False) | dict(sliding_window=r.choice([None, 4]), use_bias=r.random() < 0.7)


def _falcon(r, _):
    groups = r.choice([1, 2])
    heads = groups * r.choice([1, 2, 3])
    return dict(
        vocab_size=r.choice([33, 199]),
        hidden_size=heads * r.choice([2, 8, 16, 20]),
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_kv_heads=groups,
        new_decoder_architecture=r.random() < 0.5,
        multi_query=r.random() < 0.5,
        parallel_attn=r.random() < 0.5,
        bias=r.random() < 0.5,
        alibi=r.random() < 0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )


def _mixtral(r, dtype):
    e = _experts(r, dtype)
    return _decoder(r) | dict(
        num_local_experts=e["experts"], num_experts_per_tok=e["top"], intermediate_size=e["width"]
    )


def _qwen_moe(r, dtype):
    e = _experts(r, dtype)
    return _decoder(r) | dict(
        num_experts=e["experts"],
        num_experts_per_tok=e["top"],
        moe_intermediate_size=e["width"],
        norm_topk_prob=r.random() < 0.5,
        shared_expert_intermediate_size=20,
        decoder_sparse_step=r.choice([1, 1, 2]),
    )


def _olmoe(r, dtype):
    e = _experts(r, dtype)
    return _decoder(r, head_dim=False) | dict(
        num_experts=e["experts"],
        num_experts_per_tok=e["top"],
        intermediate_size=e["width"],
        norm_topk_prob=r.random() < 0.5,
    )


def _gpt_oss(r, dtype):
    made, e = _decoder(r), _experts(r, dtype)
    return (
        made
        | _windows(r, made)
        | dict(
            num_local_experts=e["experts"],
            num_experts_per_tok=e["top"],
            intermediate_size=e["width"],
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )


def _bloom(r, _):
    heads = r.choice([1, 2, 3, 5])
    return dict(
        vocab_size=r.choice([33, 199]),
        hidden_size=heads * r.choice([3, 8, 16]),
        n_layer=2,
        n_head=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )


_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _llama),
    "mistral": ("MistralForCausalLM", "MistralConfig", _mistral),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _qwen2),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _gemma2),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _gemma3),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _phi3),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", lambda r, _: _decoder(r, head_dim=False)),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _smollm3),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _granite),
    "cohere": ("CohereForCausalLM", "CohereConfig", _cohere),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _gpt2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _neox),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _starcoder2),
    "falcon": ("FalconForCausalLM", "FalconConfig", _falcon),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _mixtral),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _qwen_moe),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _qwen_moe),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", _olmoe),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", _gpt_oss),
    "bloom": ("BloomForCausalLM", "BloomConfig", _bloom),
}


def case(seed: int) -> Case:
    r = random.Random(seed)
    dtype = r.choice([torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16])
    model, config, options = _architecture(r, dtype)
    sizes = r.choice(
        [
            [r.randint(1, 60)],
            [r.randint(1, 20)] + [1] * r.randint(1, 12),
            [1] * r.randint(1, 10),
            [r.randint(1, 9) for _ in range(r.randint(1, 6))],
            [r.randint(40, 90), 1, 2, 3],
        ]
    )
    batch = r.choice([1, 1, 1, 2, 3, 5, 8])
    first = sizes[0]
    padding = [0] * batch
    if first > 1 and r.random() < 0.4:
        padding = [r.randint(0, first - 1) for _ in range(batch)]
    return Case(
        seed=seed,
        model=model,
        config=config,
        options=options,
        dtype=dtype,
        quantized=r.choice(FORMATS) if r.random() < 0.4 else None,
        batch=batch,
        sizes=sizes,
        padding=padding,
        cache=r.choice(["dynamic", "dynamic", "none", "static"]),
        threads=r.randint(1, 3),
        keep=r.choice([0, 0, 0, 1]),
        reorder=r.random() < 0.1 and not any(padding),
    )


def logits(model: nn.Module, c: Case, ids: Tensor, mask: Tensor) -> Tensor:
    """Those of tokens that are no padding, (rows, vocabulary)."""
    cache = {
        "none": lambda: None,
        "dynamic": lambda: transformers.DynamicCache(config=model.config),
        "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=sum(c.sizes) + 3),
    }[c.cache]()
    made, begin = [], 0
    with torch.no_grad():
        for size in c.sizes:
            end = begin + size
            masks = {"attention_mask": mask[:, :end]} if any(c.padding) else {}
            out = model(input_ids=ids[:, begin:end], use_cache=True, logits_to_keep=c.keep, **{CACHE: cache}, **masks)
            cache = given(out)
            rows = mask[:, begin:end].bool()
            made.append(out.logits[rows[:, -c.keep :] if c.keep else rows])
            begin = end
            if c.reorder:
                cache.reorder_cache(torch.arange(c.batch).flip(0))
    return torch.cat(made)


@dataclass(frozen=True)
class Result:
    """`fault` is None where all is well; `why`, why the program was not used."""

    fault: str | None
    used: bool
    why: str = ""


def run(c: Case) -> Result | None:
    """None where transformers itself does not build or run the model."""
    torch.manual_seed(c.seed)
    try:
        config = getattr(transformers, c.config)(**c.options)
        modules = spread(getattr(transformers, c.model)(config).eval(), c.seed).to(c.dtype)
        if hasattr(modules, "set_experts_implementation") and c.seed % 2:
            modules.set_experts_implementation("eager")  # grouped products want rows of 16 bytes
        ids = torch.randint(3, config.vocab_size, (c.batch, sum(c.sizes)))
        mask = torch.ones_like(ids)
        for row, many in enumerate(c.padding):
            mask[row, :many] = 0
        ids = ids * mask
        if c.quantized:
            bigkernels.quantize(modules, c.quantized, skip=(), embeddings=c.seed % 2 == 0)
        exact = copy.deepcopy(modules)
        bigkernels.dequantize(exact)
        exact_model = exact.double()
        if hasattr(exact_model, "set_experts_implementation"):
            exact_model.set_experts_implementation("eager")
        exact = logits(exact_model, c, ids, mask)
        plain = logits(copy.deepcopy(modules), c, ids, mask)
    except Exception as error:  # noqa: BLE001  some sizes do not go together
        c.notes.append(f"{type(error).__name__}: {error}")
        return None
    ours = copy.deepcopy(modules)
    bigkernels.patch(ours, verify=False)
    patch_modules(modules)
    threads = torch.get_num_threads()
    torch.set_num_threads(c.threads)
    try:
        got = logits(ours, c, ids, mask)
    finally:
        torch.set_num_threads(threads)
    used, why = runs(ours)
    by_modules = logits(modules, c, ids, mask)
    if got.dtype != plain.dtype or got.shape != plain.shape:
        return Result(f"{got.dtype} {tuple(got.shape)}, expected {plain.dtype} {tuple(plain.shape)}", used > 0, why)
    fault = _judge(c, got, plain, by_modules, exact)
    if fault:  # or one that rounding makes of such a model
        step = _TOKEN_STEP if _rounds_tokens(c) else torch.finfo(c.dtype).eps / 2
        others = (logits(_shaken(exact_model, step, seed), c, ids, mask) for seed in range(_SHAKEN))
        fault = _judge(c, got, _furthest(exact, plain, *others), by_modules, exact)
    return Result(fault, used > 0, why)


def _rounds_tokens(c: Case) -> bool:
    """Whether the step program rounds what enters a product to 8 bits."""
    return c.quantized == "int8-dynamic" or (c.quantized is not None and c.dtype != torch.float32)


def _shaken(model: nn.Module, step: float, seed: int) -> nn.Module:
    """With weights up to one rounding away. Norms of one to three elements, or of nearly nothing, and routers that
    choose one expert make much of it: a norm of one element is a sign."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = 2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1
            p.mul_(1 + step * noise)
    return model


def _furthest(exact: Tensor, first: Tensor, *others: Tensor) -> Tensor:
    for x in others:
        first = torch.where((x.double() - exact).abs() > (first.double() - exact).abs(), x.to(first.dtype), first)
    return first


def _judge(c: Case, got: Tensor, plain: Tensor, by_modules: Tensor, exact: Tensor) -> str | None:
    """Against both the unpatched and the patched modules, whichever is further from the exact logits."""
    fine = (exact.isfinite() & plain.isfinite() & by_modules.isfinite()).all(1)  # some overflow 16 bits
    got, plain, by_modules, exact = (x[fine] for x in (got, plain, by_modules, exact))
    if not got.numel():
        return None
    if _rounds_tokens(c):
        far = [((x.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item() for x in (got, plain, by_modules)]
        allowed = max(0.08, 2 * far[1], 2 * far[2])
        return (
            None if far[0] <= allowed else f"relative error {far[0]:.3g}, modules {far[2]:.3g}, allowed {allowed:.3g}"
        )
    found = compare(
        got, _furthest(exact, plain, by_modules), exact, roundings=4.0 if c.dtype == torch.float32 else 1.0, scale="row"
    )
    return None if found.ok else str(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("-v", action="store_true")
    given_options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    counts: collections.Counter = collections.Counter()
    reasons: collections.Counter = collections.Counter()
    seed, done, began = given_options.first, 0, time.perf_counter()
    while done < given_options.count:
        c = case(seed)
        seed += 1
        try:
            result = run(c)
        except Exception as error:  # noqa: BLE001  a fault, and the next case
            result = Result(f"{type(error).__name__}: {error}", False)
        if result is None:
            counts["not built by transformers"] += 1
            if given_options.v:
                print(f"not built: {c.model}: {c.notes}", flush=True)
            continue
        done += 1
        counts["program" if result.used else "modules"] += 1
        if result.why:
            reasons[f"{c.model}: {result.why}"] += 1
        if result.fault:
            counts["FAULTS"] += 1
            print(f"FAULT {c}\n      {result.fault}", flush=True)
    for why, many in reasons.most_common():
        print(f"{many:4}  {why}")
    print(dict(counts), f"{time.perf_counter() - began:.0f} s, next seed {seed}")
    raise SystemExit(counts["FAULTS"] > 0)


if __name__ == "__main__":
    main()
