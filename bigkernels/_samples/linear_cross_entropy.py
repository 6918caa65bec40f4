"""Samples of the cross entropy of a linear layer's outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._sample import Draw, Sample, rows_strided, strided


def _loss(
    name: str,
    tokens: int = 13,
    vocabulary: int = 101,
    size: int = 40,
    *,
    bias: bool = False,
    ignore: int | None = None,
    extra: str = "",
    target_dtype: torch.dtype = torch.int64,
    scale: float = 1.0,
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
    **options: object,
) -> Sample:
    def make(draw: Draw) -> dict[str, Tensor]:
        inputs = {
            "hidden": arrange(draw.normal(tokens, size, scale=scale)),
            "weight": arrange(draw.normal(vocabulary, size, scale=size**-0.5)),
            "target": draw.integers(vocabulary, tokens, dtype=target_dtype),
        }
        if bias:
            inputs["bias"] = draw.normal(vocabulary)
        if ignore is not None:
            inputs["target"][::3] = ignore
        if "class_weight" in extra.split():
            inputs["class_weight"] = draw.positive(vocabulary)
        if "token_weight" in extra.split():
            inputs["token_weight"] = draw.positive(tokens)
        return inputs

    differentiable = ("hidden", "weight", *(("bias",) if bias else ()))
    # The gradient of a token's own loss is rounded before it is multiplied with what comes from above.
    return Sample(
        "linear_cross_entropy", name, make, options, differentiable, gradient_scale="row", gradient_roundings=4.0
    )


LINEAR_CROSS_ENTROPY = [
    *(_loss(f"reduction {r}", reduction=r) for r in ("mean", "sum", "none")),
    _loss("bias", bias=True),
    _loss("ignored tokens", ignore=-100, bias=True),
    _loss("another ignore_index", ignore=5, ignore_index=5),
    _loss("class weight", extra="class_weight", ignore=-100),
    _loss("token weight, none", extra="token_weight", reduction="none", ignore=-100),
    _loss("label smoothing", label_smoothing=0.1),
    _loss("label smoothing and class weight", label_smoothing=0.2, extra="class_weight"),
    _loss("z-loss", z_loss=1e-2),
    _loss("softcap", softcap=3.0, scale=4.0),
    _loss("scale", logit_scale=0.25, scale=4.0),
    _loss("focal", focal_gamma=2.0),
    _loss("everything", 11, 77, 70, bias=True, ignore=-1, ignore_index=-1, extra="class_weight token_weight",
          label_smoothing=0.1, z_loss=1e-2, softcap=8.0, focal_gamma=1.5, logit_scale=0.7),
    _loss("int32 target", target_dtype=torch.int32),
    _loss("one token", 1, 64, 8),
    _loss("one feature", 5, 33, 1),
    _loss("more tokens than features", 300, 300, 33),
    _loss("large vocabulary", 3, 32003, 64),
    _loss("no tokens", 0, 50, reduction="sum"),
    _loss("strided rows", arrange=rows_strided),
    _loss("strided elements", arrange=strided),
    _loss("weight by columns", arrange=lambda t: t.t().contiguous().t()),
]  # fmt: skip
