"""A whole model: a Llama at the size of SmolLM2-135M with random weights: trained, reading a prompt, generating.

The check needs the model in float64, which is slow, so it looks at the first tokens alone. What a causal model computes
for them does not depend on those that follow: the candidates run at full length, the float64 model on what is compared.
"""

# mypy: ignore-errors

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..case import COMPILE, EAGER, OURS, OURS_COMPILED, Candidate, Case, Contest, Missing, Settings

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
QUICK_SIZES = SIZES | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Errors add up over the layers, and the error of eager in the single number of the loss can be small by luck.
_ROUNDINGS = 16.0
CHECKED = 128  # tokens
NO_ATTENTION = f"{OURS} without attention"  # what the kernels around attention give, patched with attention=False


def random_model(sizes: dict, dtype: torch.dtype, device: str) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Missing(f"transformers is not installed ({error})") from error
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)).to(device, dtype)


def _patched(model: nn.Module, **options: bool) -> nn.Module:
    try:
        from ...patch import patch
    except ImportError as error:
        raise Missing(f"bigkernels.patch is not in this version ({error})") from error
    copied = copy.deepcopy(model)
    patch(copied, **options)
    return copied


def _variants(model: nn.Module, compile: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The model plain and patched, each also compiled, with weights of its own; and what is missing."""
    variants, missing = {EAGER: model}, {}
    if compile:
        torch.compiler.reset()
        variants[COMPILE] = torch.compile(copy.deepcopy(model), dynamic=False)
    try:
        variants[NO_ATTENTION] = _patched(model, attention=False)
        variants[OURS] = _patched(model)
        if compile:
            variants[OURS_COMPILED] = torch.compile(_patched(model), dynamic=False)
    except Missing as reason:
        missing = dict.fromkeys((NO_ATTENTION, OURS, OURS_COMPILED) if compile else (NO_ATTENTION, OURS), str(reason))
    return variants, missing


def token_ids(settings: Settings, length: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, length)
    ids = torch.randint(3, vocabulary, shape, generator=generator, dtype=torch.int64, device="cpu")
    return ids.to(settings.device)


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def gradients(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss of the first tokens, and the gradients of the parameters of a kind, from all layers, as one vector."""
    labels = ids.clone()
    labels[:, CHECKED:] = -100
    loss = loss_of(model, ids, labels)
    loss.backward()
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        kind = re.sub(r"^_orig_mod\.|\.\d+", "", name)
        kinds.setdefault(f"grad {kind}", []).append(parameter.grad.flatten())
    results = {"loss": loss.detach().to(dtype)} | {kind: torch.cat(parts) for kind, parts in kinds.items()}
    model.zero_grad(set_to_none=True)
    return results


def _training_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        loss_of(model, ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _training(settings: Settings, sizes: dict, dtype: torch.dtype) -> Case:
    def prepare() -> Contest:
        model = random_model(sizes, dtype, settings.device).train()
        ids = token_ids(settings, settings.length, sizes["vocab_size"])
        variants, missing = _variants(model, settings.compile)
        # transformers computes norms and the loss in float32 even here: exact up to those roundings.
        return Contest(
            [
                Candidate(name, lambda m=variant: gradients(m, ids, dtype), _training_step(variant, ids))
                for name, variant in variants.items()
            ],
            exact=lambda: gradients(copy.deepcopy(model).double(), ids[:, :CHECKED], torch.float64),
            plain=lambda: gradients(model, ids[:, :CHECKED], dtype),
            missing=missing,
            roundings=_ROUNDINGS,
        )

    return Case(
        "model",
        f"training step, B {settings.batch}, S {settings.length}",
        settings.device,
        _name(dtype),
        backward=True,
        candidates=_names(settings.compile),
        prepare=prepare,
        metric="tokens/s",
        flops=training_flops(settings, sizes),
        tokens=settings.batch * settings.length,
        cold=False,
    )


def training_flops(settings: Settings, sizes: dict) -> int:
    """Forward 2 operations a weight and token, backward 4; causal attention half of a full square, three times."""
    tokens, attended = settings.batch * settings.length, settings.length * sizes["hidden_size"]
    return 6 * tokens * (_matrix_weights(sizes) + sizes["num_hidden_layers"] * attended)


def _prefill(settings: Settings, sizes: dict, dtype: torch.dtype) -> Case:
    """A prompt goes through the model, fills a new cache, and gives the logits of one token."""

    def prepare() -> Contest:
        model = random_model(sizes, dtype, settings.device).eval()
        ids = token_ids(settings, settings.length, sizes["vocab_size"])
        last, checked = (
            torch.tensor([n - 1], device=ids.device, dtype=torch.int64)
            for n in (ids.shape[1], min(CHECKED, ids.shape[1]))
        )
        variants, missing = _variants(model, compile=False)

        def logits(variant: nn.Module, ids: Tensor, token: Tensor) -> dict[str, Tensor]:
            return {"logits": variant(input_ids=ids, logits_to_keep=token, use_cache=True).logits}

        return Contest(
            [
                Candidate(name, partial(logits, variant, ids, checked), partial(logits, variant, ids, last))
                for name, variant in variants.items()
            ],
            exact=lambda: logits(copy.deepcopy(model).double(), ids[:, :CHECKED], checked),
            plain=lambda: logits(model, ids[:, :CHECKED], checked),
            missing=missing,
            roundings=_ROUNDINGS,
        )

    tokens = settings.batch * settings.length
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    weights = _matrix_weights(sizes) - sizes["vocab_size"] * hidden  # the head sees one token a sequence
    return Case(
        "model",
        f"prefill, B {settings.batch}, S {settings.length}",
        settings.device,
        _name(dtype),
        backward=False,
        candidates=_names(compile=False),
        prepare=prepare,
        metric="tokens/s",
        flops=2 * tokens * (weights + layers * settings.length * hidden),
        tokens=tokens,
        cold=False,
    )


def _generation(settings: Settings, sizes: dict, dtype: torch.dtype) -> Case:
    new = 8 if settings.quick else 32

    def prepare() -> Contest:
        model = random_model(sizes, dtype, settings.device).eval()
        prompt = token_ids(settings, 32, sizes["vocab_size"])
        mask = torch.ones_like(prompt)
        variants, missing = _variants(model, compile=False)

        def logits(variant: nn.Module) -> dict[str, Tensor]:
            return {"logits": variant(input_ids=prompt, use_cache=False).logits}

        def generate(variant: nn.Module) -> Tensor:
            lengths = {"max_new_tokens": new, "min_new_tokens": new}
            return variant.generate(prompt, attention_mask=mask, do_sample=False, **lengths)

        return Contest(
            [
                Candidate(name, lambda v=variant: logits(v), lambda v=variant: generate(v))
                for name, variant in variants.items()
            ],
            exact=lambda: logits(copy.deepcopy(model).double()),
            plain=lambda: logits(model),
            missing=missing,
            roundings=_ROUNDINGS,
        )

    # Every new token reads all weights; the prompt reads them once more.
    return Case(
        "model",
        f"generation of {new} tokens, B {settings.batch}",
        settings.device,
        _name(dtype),
        backward=False,
        candidates=_names(compile=False),
        prepare=prepare,
        metric="tokens/s",
        bytes=new * _matrix_weights(sizes) * dtype.itemsize,
        tokens=settings.batch * new,
        cold=False,
    )


def _names(compile: bool) -> tuple[str, ...]:
    return (EAGER, COMPILE, NO_ATTENTION, OURS, OURS_COMPILED) if compile else (EAGER, NO_ATTENTION, OURS)


def _matrix_weights(sizes: dict) -> int:
    """Weights that take part in matrix products: all but the norms; the tied embedding counts once, as the head."""
    hidden, head = sizes["hidden_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * head * sizes["num_key_value_heads"]
    layer = attention + 3 * hidden * sizes["intermediate_size"]
    return sizes["num_hidden_layers"] * layer + sizes["vocab_size"] * hidden


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(settings: Settings) -> list[Case]:
    sizes = QUICK_SIZES if settings.quick else SIZES
    # In float32 everything takes several times as long.
    return [make(settings, sizes, torch.bfloat16) for make in (_training, _prefill, _generation)]
