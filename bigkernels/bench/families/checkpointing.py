"""Less kept for backward: a step of eight Llama blocks, and what a region costs by itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torchs

from ...memory import peak
from ..case import EAGER, OURS, Candidate, Case, Contest, Missing, Settings
from . import model as whole

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
_QUICK = _SIZES | {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_POLICIES = ("recompute", "selective", "int8", "fp8", "offload", "int8+offload")
_TORCHS = "torch checkpoint"
_ALL = f"{OURS} int8, 8-bit AdamW"
_REGIONS = 24
_ROUNDINGS = 16.0  # errors add up over the layers


def _blocks(sizes: dict, dtype: torch.dtype, device: str) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaModel
    except ImportError as error:
        raise Missing(f"transformers is not installed ({error})") from error
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**sizes)).to(device, dtype).train()


def _forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x, use_cache=False).last_hidden_state


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    _forward(model, x).square().mean().backward()
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kinds.setdefault(re.sub(r"\.\d+", "", name), []).append(parameter.grad.flatten())
    model.zero_grad(set_to_none=True)
    return {f"grad {kind}": torch.cat(parts) for kind, parts in kinds.items()}


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        _forward(model, x).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def _kept(model: nn.Module, x: Tensor) -> Callable[[], int]:
    """What is held between forward and backward, in bytes."""

    def measure() -> int:
        with peak(x.device.type) as region:
            out = _forward(model, x)
        return region.end - out.nbytes

    return measure


def _variants(model: nn.Module) -> dict[str, nn.Module]:
    from ... import apply_checkpointing, patch

    patched = copy.deepcopy(model)
    patch(patched)
    theirs = copy.deepcopy(patched)
    cast(Any, theirs).gradient_checkpointing_enable({"use_reentrant": False})
    models = {EAGER: model, OURS: patched, _TORCHS: theirs}
    for policy in _POLICIES:
        models[f"{OURS} {policy}"] = copy.deepcopy(patched)
        apply_checkpointing(models[f"{OURS} {policy}"], policy)
    return models


def _stack(settings: Settings) -> Case:
    sizes = _QUICK if settings.quick else _SIZES
    dtype = torch.bfloat16

    def prepare() -> Contest:
        model = _blocks(sizes, dtype, settings.device)
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(
            settings.batch, settings.length, sizes["hidden_size"], generator=draw, dtype=torch.float32, device="cpu"
        )
        x = x.to(settings.device, dtype).requires_grad_()
        variants = _variants(model)
        return Contest(
            [
                Candidate(name, partial(_gradients, variant, x), _step(variant, x), kept_bytes=_kept(variant, x))
                for name, variant in variants.items()
            ],
            exact=lambda: _gradients(copy.deepcopy(model).double(), x.detach().double()),
            plain=lambda: _gradients(model, x),
            roundings=_ROUNDINGS,
        )

    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    head = hidden // sizes["num_attention_heads"]
    weights = layers * (
        2 * hidden**2 + 2 * hidden * head * sizes["num_key_value_heads"] + 3 * hidden * sizes["intermediate_size"]
    )
    tokens = settings.batch * settings.length
    return Case(
        "checkpointing",
        f"{layers} Llama blocks of {hidden}, B {settings.batch}, S {settings.length}",
        settings.device,
        "bfloat16",
        backward=True,
        candidates=(EAGER, OURS, _TORCHS, *(f"{OURS} {policy}" for policy in _POLICIES)),
        prepare=prepare,
        metric="tokens/s",
        flops=6 * tokens * (weights + layers * settings.length * hidden),
        tokens=tokens,
        cold=False,
    )


def _regions(settings: Settings) -> Case:
    """Work that is nothing beside the cost of a region."""

    def prepare() -> Contest:
        from ... import checkpoint

        torch.manual_seed(0)
        blocks = [nn.Linear(16, 16, device=settings.device) for _ in range(_REGIONS)]
        x = torch.randn(4, 16, device=settings.device, requires_grad=True, dtype=torch.float32)

        def block(linear: nn.Module, x: Tensor) -> Tensor:
            return x + torch.relu(linear(x))

        ways = {
            EAGER: block,
            _TORCHS: lambda linear, x: torchs(block, linear, x, use_reentrant=False),
            OURS: lambda linear, x: checkpoint(block, linear, x),
        }

        def gradients(way: Callable) -> dict[str, Tensor]:
            y = x
            for linear in blocks:
                y = way(linear, y)
            return {"grad x": torch.autograd.grad(y.sum(), x)[0]}

        expected = gradients(block)
        return Contest(
            [Candidate(name, partial(gradients, way), partial(gradients, way)) for name, way in ways.items()],
            exact=lambda: {name: value.double() for name, value in expected.items()},
            plain=lambda: expected,
            roundings=0.0,
        )

    return Case(
        "checkpointing",
        f"{_REGIONS} regions of no work",
        settings.device,
        "float32",
        backward=True,
        candidates=(EAGER, _TORCHS, OURS),
        prepare=prepare,
        metric="us",
        cold=False,
    )


def _together(settings: Settings) -> Case:
    """Fine-tuning of a model at the size of SmolLM2-135M, with all there is against memory, and as it comes."""
    batch, length = (2, 64) if settings.quick else (4, 1024)
    settings = replace(settings, batch=batch, length=length)
    sizes, dtype = whole.QUICK_SIZES if settings.quick else whole.SIZES, torch.bfloat16

    def prepare() -> Contest:
        from ... import apply_checkpointing, optim, patch

        model = whole.random_model(sizes, dtype, settings.device).train()
        ids = whole.token_ids(settings, length, int(sizes["vocab_size"]))

        def candidate(name: str, variant: nn.Module, optimizer: torch.optim.Optimizer) -> Candidate:
            def step() -> None:
                whole.loss_of(variant, ids, ids).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            def kept() -> int:
                with peak(settings.device) as region:
                    loss = whole.loss_of(variant, ids, ids)
                del loss
                return region.end

            return Candidate(name, lambda: whole.gradients(variant, ids, dtype), step, kept_bytes=kept)

        variants = {name: copy.deepcopy(model) for name in (OURS, _ALL)}
        for variant in variants.values():
            patch(variant)
        apply_checkpointing(variants[_ALL], "int8")
        return Contest(
            [
                candidate(EAGER, model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)),
                candidate(OURS, variants[OURS], optim.AdamW(variants[OURS].parameters(), lr=1e-5)),
                candidate(_ALL, variants[_ALL], optim.AdamW(variants[_ALL].parameters(), lr=1e-5, state_dtype="int8")),
            ],
            exact=lambda: whole.gradients(copy.deepcopy(model).double(), ids[:, : whole.CHECKED], torch.float64),
            plain=lambda: whole.gradients(model, ids[:, : whole.CHECKED], dtype),
            roundings=_ROUNDINGS,
        )

    return Case(
        "checkpointing",
        f"fine-tuning of 135 M parameters, B {batch}, S {length}",
        settings.device,
        "bfloat16",
        backward=True,
        candidates=(EAGER, OURS, _ALL),
        prepare=prepare,
        metric="tokens/s",
        flops=whole.training_flops(settings, sizes),
        tokens=batch * length,
        cold=False,
    )


def cases(settings: Settings) -> list[Case]:
    return [_stack(settings), _regions(settings), _together(settings)]
