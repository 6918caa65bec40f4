"""The loss of a language model from its hidden states: the head's product and the cross entropy in one."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ..._samples import Draw
from ...ops import use
from ..case import Case, Settings
from ..operators import operator_case
from ..peers import liger

_HIDDEN = 1024
_PART = 256  # tokens whose float64 logits are held at once


def eager(hidden, weight, target):
    """As Hugging Face's causal models do it: logits, and the loss of a float32 copy."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def builtin(hidden, weight, target):
    """PyTorch's own, in chunks (2.13)."""
    return F.linear_cross_entropy(hidden, weight, target)


def exact(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float64 results a few tokens at a time."""
    hidden, weight, target = inputs["hidden"].detach(), inputs["weight"].detach().double(), inputs["target"]
    kept = (target != -100).sum()
    total, of_hidden, of_weight = 0.0, [], torch.zeros_like(weight)
    for rows, classes in zip(hidden.split(_PART), target.split(_PART), strict=True):
        leaf, head = rows.double().requires_grad_(), weight.requires_grad_()
        with use("reference"), torch.enable_grad():
            loss = functional.cross_entropy(F.linear(leaf, head), classes, reduction="sum") / kept
        grads = torch.autograd.grad(loss, (leaf, head))
        total = total + loss.detach()
        of_hidden.append(grads[0])
        of_weight += grads[1]
        weight = head.detach()
    return {"out0": total, "grad hidden": torch.cat(of_hidden), "grad weight": of_weight}


def plain(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    hidden, weight = (inputs[name].detach().requires_grad_() for name in ("hidden", "weight"))
    with torch.enable_grad():
        loss = eager(hidden, weight, inputs["target"])
    grads = torch.autograd.grad(loss, (hidden, weight))
    return {"out0": loss.detach(), "grad hidden": grads[0], "grad weight": grads[1]}


def case(settings: Settings, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, ignored: float) -> Case:
    def inputs(draw: Draw):
        target = draw.integers(vocabulary, tokens)
        target[torch.linspace(0, 1, tokens, device=target.device, dtype=torch.float32).mul(10).frac() < ignored] = -100
        return {
            "hidden": draw.normal(tokens, hidden),
            "weight": draw.normal(vocabulary, hidden, scale=0.03),
            "target": target,
        }

    name = f"{tokens} tokens, {hidden} to {vocabulary}" + (f", {ignored:.0%} ignored" if ignored else "")
    peer = liger(
        lambda peer: (
            lambda hidden, weight, target: peer.liger_fused_linear_cross_entropy(
                hidden, weight, target, accum_dtype=torch.float32
            )
        )
    )
    return operator_case(
        "linear_cross_entropy",
        name,
        settings=settings,
        dtype=dtype,
        inputs=inputs,
        ours=functional.linear_cross_entropy,
        eager=eager,
        builtin=builtin if hasattr(F, "linear_cross_entropy") else None,
        peers=peer,
        differentiable=("hidden", "weight"),
        exact=exact,
        plain=plain,
        flops=int(6 * tokens * (1 - ignored) * hidden * vocabulary),
        metric="TFLOP/s",
    )


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [case(settings, 96, 64, 1000, torch.bfloat16, ignored) for ignored in (0.0, 0.3)]
    cases = [case(settings, 2048, _HIDDEN, vocabulary, torch.bfloat16, 0.0) for vocabulary in (32000, 128256)]
    cases.append(case(settings, 2048, _HIDDEN, 32000, torch.bfloat16, 0.3))
    if settings.device == "cuda":
        cases.append(case(settings, 8192, 4096, 128256, torch.bfloat16, 0.0))
    return cases
