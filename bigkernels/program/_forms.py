"""What a function of rows computes, told from its values in float64: norms, activations, scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops.activations import ACTIVATIONS
from ._ir import NormSpec, Stored
from ._reference import norm

_VECTORS = 5e-7  # where the model adds to a parameter in float32
_WRITTEN = 2e-8  # constants that are written with nine digits
CLOSE = 1e-9  # of float64 values, relative to the largest


def close(a: Tensor, b: Tensor, tolerance: float = CLOSE) -> bool:
    if a.shape != b.shape or not torch.isfinite(a).all() or not torch.isfinite(b).all():
        return False
    return (a - b).abs().max().item() <= tolerance * max(b.abs().max().item(), 1e-300)


def random(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device)


def plain(value: float) -> float:
    """The number that was written, where rounding in the last digits changed it."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short - value) <= 1e-10 * abs(value):
            return short
    return value


def constant(values: Tensor) -> float | None:
    """The number that all values are."""
    first = values.flatten()[0].item()
    return first if bool(((values - first).abs() <= 1e-9 * abs(first) + 1e-300).all()) else None


def as_norm(
    function: Callable[[Tensor], Tensor], size: int, x: Tensor, vectors: Sequence[Stored]
) -> tuple[NormSpec, float] | None:
    """The norm over groups of `size` columns, and its scale, where `function` of rows like `x` is one."""
    if size < 2:
        return None
    large = 1e7 * x
    y = function(large)
    if y.shape != x.shape or not torch.isfinite(y).all() or not close(function(2 * large), y, 1e-6):
        return None
    groups = x.unflatten(-1, (-1, size))
    kind = "layer" if close(function(large + 1e8), y, 1e-6) else "rms"
    centred = groups - groups.mean(-1, keepdim=True) if kind == "layer" else groups
    unit = centred / centred.square().mean(-1, keepdim=True).sqrt()
    y, negative = (v.unflatten(-1, (-1, size)) for v in (y, function(-large)))
    bias = ((y + negative) / 2).mean((0, 1))
    gain = ((y - negative) / 2 * unit).sum((0, 1)) / unit.square().sum((0, 1))
    # The scale of eps: where x is small, it is all there is.
    found = _gain(gain, vectors)
    shift = _bias(bias, vectors, gain.abs().max().item())
    if found is None or shift is None:
        return None
    weight, offset, scale = found
    small = 1e-6 * x
    z = (function(small) - function(-small)).unflatten(-1, (-1, size)) / 2
    ratio = (z.square().sum() / (centred * 1e-6 * gain).square().sum()).item()  # about 1 / eps
    epses = [0.0]
    if ratio > 0 and math.isfinite(ratio):
        variance = (centred * 1e-6).square().mean(-1).mean().item()
        epses += [plain(max(_solve(z, centred * 1e-6, gain), 0.0)), 1 / ratio, max(1 / ratio - variance, 0.0)]
    bias_of = shift[0]
    if bias_of is not None and scale != 1.0:
        return None
    for eps in epses:
        spec = NormSpec(kind, size, eps, weight, bias_of, offset)
        probes = [s * x + m for s, m in ((1.0, 0.0), (1e-3, 2e-4), (30.0, 11.0))]
        if all(close(function(p), scale * norm(p, spec), _VECTORS) for p in probes):
            return spec, scale
    return None


def _solve(z: Tensor, x: Tensor, gain: Tensor) -> float:
    """eps of z = x gain / sqrt(var(x) + eps)."""
    scale = (z * x * gain).sum((-1,)) / (x * gain).square().sum((-1,))
    eps = 1 / scale.square() - x.square().mean(-1)
    return eps.median().item()


def _gain(gain: Tensor, vectors: Sequence[Stored]) -> tuple[Stored | None, float, float] | None:
    """(weight, offset, scale)"""
    number = constant(gain)
    for vector in vectors:
        weight = vector.get().detach().double().flatten()
        if weight.shape != gain.shape:
            continue
        for offset in (0.0, 1.0):
            if close(weight + offset, gain, 1e-6):
                return vector, offset, 1.0
        if number is None:
            difference = constant_within(gain - weight, 1e-6)
            if difference is not None:
                return vector, difference, 1.0
            for offset in (0.0, 1.0):
                ratio = constant_within(gain / (weight + offset), 1e-6)
                if ratio is not None:
                    return vector, offset, ratio
    return None if number is None and constant_within(gain, 1e-6) is None else (None, 0.0, _near(gain))


def _near(gain: Tensor) -> float:
    mean = gain.mean().item()
    return 1.0 if abs(mean - 1) < 1e-6 else mean


def constant_within(values: Tensor, tolerance: float) -> float | None:
    mean = values.mean().item()
    if not math.isfinite(mean):
        return None
    return mean if bool(((values - mean).abs() <= tolerance * max(abs(mean), 1e-30)).all()) else None


def _bias(bias: Tensor, vectors: Sequence[Stored], scale: float) -> tuple[Stored | None] | None:
    if bias.abs().max().item() <= 1e-6 * scale:
        # A bias of zeros is a bias all the same: it may be trained.
        return (None,)
    for vector in vectors:
        values = vector.get().detach().double().flatten()
        if values.shape == bias.shape and close(values, bias, 1e-6):
            return (vector,)
    return None


def as_activation(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[str, float, float] | None:
    """(name, scale, alpha) where `function` is elementwise scale * act."""
    probe = 2 * x
    y = function(probe)
    if y.shape != probe.shape or not torch.isfinite(y).all():
        return None
    alphas = [1.702]
    for name, act in ACTIVATIONS.items():
        for alpha in alphas if name == "quick_gelu" else (0.0,):
            value = act(probe, alpha) if name == "quick_gelu" else act(probe)
            scale = (value * y).sum().item() / max(value.square().sum().item(), 1e-300)
            if scale != 0 and close(y, scale * value, _WRITTEN) and _elsewhere(function, act, name, alpha, scale, x):
                return name, plain(scale), alpha or 1.702
    return None


def _elsewhere(function, act, name, alpha, scale, x) -> bool:
    """Far from zero and near it, too."""
    for factor in (1e-3, 12.0):
        value = act(factor * x, alpha) if name == "quick_gelu" else act(factor * x)
        if not close(function(factor * x), scale * value, _WRITTEN):
            return False
    return True


def as_softcap(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float] | None:
    """(scale, cap) where `function` is cap * tanh(scale x / cap)."""
    far = function(x.sign() * 1e30)
    cap = constant(far.abs())
    if not cap or not math.isfinite(cap):
        return None
    near = function(x * 1e-6)
    scale = (near.sum() / (x * 1e-6).sum()).item()
    cap, scale = plain(cap), plain_within(scale)
    return (scale, cap) if close(function(40 * x), cap * torch.tanh(scale * 40 * x / cap)) else None


def plain_within(value: float, tolerance: float = 1e-7) -> float:
    for digits in range(1, 12):
        short = float(f"{value:.{digits}g}")
        if abs(short - value) <= tolerance * abs(value):
            return short
    return value
