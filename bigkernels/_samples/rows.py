"""Samples of the row operators: norms, rotary embedding, gated units and the cross entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.activations import ACTIVATIONS
from ._sample import Draw, Sample, rows_strided, strided

_NORM_SHAPES = {
    "one row": (1, 64),
    "odd": (5, 3, 129),
    "one element": (1, 1),
    "one dimension": (33,),
    "empty": (0, 16),
    "long": (3, 5000),
    "many rows": (131, 48),
}


def norm_inputs(names: str, shape: tuple[int, ...], arrange=lambda t: t) -> Callable[[Draw], dict[str, Tensor]]:
    def make(draw: Draw) -> dict[str, Tensor]:
        inputs = {}
        for name in names.split():
            rows = name in ("x", "residual")
            mean = {"x": 0.5, "weight": 1.0}.get(name, 0.0)
            t = draw.normal(*(shape if rows else shape[-1:]), mean=mean, scale=1.0 if rows else 0.3)
            inputs[name] = arrange(t) if rows else t
        return inputs

    return make


def _norm(operator: str, parameters: str) -> list[Sample]:
    def sample(name, names, shape, options=None, arrange=lambda t: t):
        make = norm_inputs(names, shape, arrange)
        return Sample(operator, name, make, options or {}, tuple(names.split()))

    return [
        *(sample(name, f"x {parameters}", shape) for name, shape in _NORM_SHAPES.items()),
        sample("no weight", "x", (7, 96)),
        sample("residual", f"x {parameters} residual", (6, 257)),
        sample("residual, no weight", "x residual", (2, 3, 40)),
        sample("eps", f"x {parameters}", (4, 32), {"eps": 0.1}),
        sample("strided elements", f"x {parameters}", (9, 70), arrange=strided),
        sample("strided rows, residual", f"x {parameters} residual", (9, 70), arrange=rows_strided),
        sample("transposed", f"x {parameters}", (9, 70), arrange=lambda t: t.t().contiguous().t()),
    ]


def _mixed_weight(draw: Draw) -> dict[str, Tensor]:
    return {"x": draw.normal(11, 80), "weight": draw.normal(80, mean=1.0).float()}


RMS_NORM = [
    *_norm("rms_norm", "weight"),
    Sample("rms_norm", "offset", norm_inputs("x weight", (5, 64)), {"offset": 1.0}, ("x", "weight")),
    Sample("rms_norm", "offset, no weight", norm_inputs("x", (5, 64)), {"offset": 1.0}, ("x",)),
    Sample(
        "rms_norm",
        "offset and residual",
        norm_inputs("x weight residual", (5, 65)),
        {"offset": 1.0},
        ("x", "weight", "residual"),
    ),
    Sample("rms_norm", "float32 weight", _mixed_weight, {}, ("x", "weight")),
]

LAYER_NORM = [
    *_norm("layer_norm", "weight bias"),
    Sample("layer_norm", "weight alone", norm_inputs("x weight", (5, 64)), {}, ("x", "weight")),
    Sample("layer_norm", "bias alone", norm_inputs("x bias", (5, 64)), {}, ("x", "bias")),
    Sample("layer_norm", "far from zero", lambda d: {"x": d.normal(6, 200, mean=100.0)}, {}, ("x",)),
    Sample("layer_norm", "float32 weight", _mixed_weight, {}, ("x", "weight")),
]


def _rope(
    name: str,
    batch: int,
    q_heads: int,
    k_heads: int,
    length: int,
    size: int,
    *,
    rotary: int | None = None,
    interleaved: bool = False,
    cos_batch: int = 1,
    heads_last: bool = False,
    arrange=lambda t: t,
) -> Sample:
    def make(draw: Draw) -> dict[str, Tensor]:
        def heads(count: int) -> Tensor:
            if heads_last:  # (B, S, H, D) in memory, as a projection leaves it
                return draw.normal(batch, length, count, size).transpose(1, 2)
            return arrange(draw.normal(batch, count, length, size))

        cos, sin = draw.angles(cos_batch, length, rotary or size, interleaved=interleaved)
        return {"q": heads(q_heads), "k": heads(k_heads), "cos": cos, "sin": sin}

    return Sample("rope", name, make, {"interleaved": interleaved}, ("q", "k"))


ROPE = [
    _rope("halves", 2, 4, 4, 9, 64),
    _rope("grouped heads", 1, 9, 3, 17, 64, heads_last=True),
    _rope("prime heads", 2, 7, 1, 5, 32),
    _rope("partial", 1, 4, 2, 6, 80, rotary=32),
    _rope("interleaved", 2, 3, 3, 7, 48, interleaved=True),
    _rope("interleaved, partial", 1, 4, 2, 6, 80, rotary=24, interleaved=True),
    _rope("positions of each batch", 3, 4, 2, 8, 32, cos_batch=3, heads_last=True),
    _rope("two elements", 1, 1, 1, 1, 2),
    _rope("odd half", 1, 3, 2, 5, 38, rotary=26),
    _rope("one token", 4, 9, 3, 1, 64),
    _rope("empty", 1, 2, 2, 0, 16),
    _rope("strided elements", 2, 3, 1, 5, 32, arrange=strided),
]


def _glu_inputs(*shape: int, arrange=lambda t: t) -> Callable[[Draw], dict[str, Tensor]]:
    return lambda draw: {name: arrange(draw.normal(*shape, scale=2.0)) for name in ("gate", "up")}


def _packed(draw: Draw) -> dict[str, Tensor]:
    gate, up = draw.normal(5, 2 * 70).chunk(2, -1)
    return {"gate": gate, "up": up}


def _extreme(draw: Draw) -> dict[str, Tensor]:
    values = [-100.0, -30.0, -9.0, -1e-3, 0.0, 1e-3, 9.0, 30.0, 100.0]
    gate = torch.tensor(values, dtype=torch.float32, device="cpu").to(draw.device, draw.dtype)
    return {"gate": gate, "up": draw.normal(9)}


GLU = [
    *(
        Sample("glu", f"{activation}{suffix}", make, {"activation": activation}, ("gate", "up"))
        for activation in ACTIVATIONS
        for suffix, make in (("", _glu_inputs(7, 129)), (", extreme", _extreme))
    ),
    Sample("glu", "halves of a packed projection", _packed, {}, ("gate", "up")),
    Sample("glu", "strided elements", _glu_inputs(3, 40, arrange=strided), {}, ("gate", "up")),
    Sample("glu", "empty", _glu_inputs(2, 0, 8), {}, ("gate", "up")),
    Sample("glu", "one element", _glu_inputs(1), {}, ("gate", "up")),
    Sample("glu", "long", _glu_inputs(3, 20011), {}, ("gate", "up")),
]


def _ce(
    name: str,
    tokens: int = 13,
    vocabulary: int = 101,
    *,
    scale: float = 2.0,
    ignore: int | None = None,
    extra: str = "",
    target_dtype: torch.dtype = torch.int64,
    arrange=lambda t: t,
    **options: object,
) -> Sample:
    def make(draw: Draw) -> dict[str, Tensor]:
        inputs = {
            "logits": arrange(draw.normal(tokens, vocabulary, scale=scale)),
            "target": draw.integers(vocabulary, tokens, dtype=target_dtype),
        }
        if ignore is not None:
            inputs["target"][::3] = ignore
        if "class_weight" in extra.split():
            inputs["class_weight"] = draw.positive(vocabulary)
        if "token_weight" in extra.split():
            inputs["token_weight"] = draw.positive(tokens)
        return inputs

    return Sample("cross_entropy", name, make, options, ("logits",))


CROSS_ENTROPY = [
    *(_ce(f"reduction {r}", reduction=r) for r in ("mean", "sum", "none")),
    _ce("ignored tokens", ignore=-100),
    _ce("another ignore_index", ignore=5, ignore_index=5),
    _ce("class weight", extra="class_weight", ignore=-100),
    _ce("class weight, sum", extra="class_weight", reduction="sum"),
    _ce("token weight", extra="token_weight"),
    _ce("token weight, none", extra="token_weight", reduction="none", ignore=-100),
    _ce("label smoothing", label_smoothing=0.1),
    _ce("label smoothing and class weight", label_smoothing=0.2, extra="class_weight"),
    _ce("z-loss", z_loss=1e-3),
    _ce("softcap", softcap=5.0, scale=6.0),
    _ce("focal", focal_gamma=2.0),
    _ce("focal, gamma below one", focal_gamma=0.5, reduction="none"),
    _ce(
        "everything",
        11,
        77,
        ignore=-1,
        ignore_index=-1,
        extra="class_weight token_weight",
        label_smoothing=0.1,
        z_loss=1e-2,
        softcap=8.0,
        focal_gamma=1.5,
    ),
    _ce("int32 target", target_dtype=torch.int32),
    _ce("one token", 1, 64),
    _ce("one class", 3, 1),
    _ce("large vocabulary", 3, 32003),
    _ce("confident", scale=30.0),
    _ce("no tokens", 0, 50, reduction="sum"),
    _ce("strided rows", arrange=rows_strided),
    _ce("strided elements", arrange=strided),
]
