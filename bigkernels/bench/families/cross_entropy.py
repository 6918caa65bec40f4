"""Cross entropy."""

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

_PART = 64  # tokens whose float64 logits are held at once


def eager(logits, target):
    """As Hugging Face's causal models do it: through float32."""
    return F.cross_entropy(logits.float(), target)


def builtin(logits, target):
    """On the logits as they are, with what that costs in accuracy."""
    return F.cross_entropy(logits, target)


def exact(inputs: Mapping[str, Tensor], *, backward: bool) -> dict[str, Tensor]:
    """The float64 results a few tokens at a time: at once, their intermediate values would take many gigabytes."""
    logits, target = inputs["logits"], inputs["target"]
    total, grads = 0.0, []
    for rows, classes in zip(logits.detach().split(_PART), target.split(_PART), strict=True):
        leaf = rows.double().requires_grad_(backward)
        with use("reference"), torch.set_grad_enabled(backward):
            loss = functional.cross_entropy(leaf, classes, reduction="sum") / len(target)
        total = total + loss.detach()
        if backward:
            grads += torch.autograd.grad(loss, leaf)
    return {"out0": total, "grad logits": torch.cat(grads)} if backward else {"out0": total}


def case(
    settings: Settings,
    tokens: int,
    vocabulary: int,
    dtype: torch.dtype,
    *,
    backward: bool,
    family: str = "cross_entropy",
    name: str = "",
    **options,
) -> Case:
    def inputs(draw: Draw):
        return {"logits": draw.normal(tokens, vocabulary, scale=2.0), "target": draw.integers(vocabulary, tokens)}

    return operator_case(
        family,
        name or f"{tokens}x{vocabulary}",
        settings=settings,
        dtype=dtype,
        inputs=inputs,
        ours=functional.cross_entropy,
        eager=eager,
        builtin=builtin,
        peers=liger(lambda peer: lambda logits, target: peer.liger_cross_entropy(logits, target)),
        differentiable=("logits",) if backward else (),
        ours_compiled=backward,
        exact=lambda made: exact(made, backward=backward),
        bytes=(3 if backward else 1) * tokens * vocabulary * dtype.itemsize,
        **options,
    )


def cases(settings: Settings) -> list[Case]:
    tokens, vocabularies = (64, (1000,)) if settings.quick else (2048, (32000, 128256))
    return [case(settings, tokens, vocabulary, torch.bfloat16, backward=True) for vocabulary in vocabularies]
