"""Optimizer steps against torch.optim's: 100 million parameters in a few large tensors and in very many small ones."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ... import optim
from ..._info import _isa
from ...optim import _formats
from ...optim._orthogonal import compute_in
from .. import eager_optimizers
from ..case import BUILTIN, Case, Settings
from ..eager_optimizers import ClippedAndAveraged
from ..optimizers import Build, optimizer_case
from ..peers import BITSANDBYTES, bitsandbytes

FOREACH = "foreach"  # torch's way on GPUs: each operation for all tensors at once

_FLOAT, _HALF = torch.float32, torch.bfloat16
_ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
_MAX_NORM, _DECAY = 1.0, 0.99
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Name in torch.optim and here, options, states, and whether torch has it fused.
_TORCH = (
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.01}, ("momentum_buffer",), True),
    ("RMSprop", {"lr": 1e-2, "weight_decay": 0.01}, ("square_avg",), False),
    ("Adagrad", {"lr": 1e-2, "weight_decay": 0.01}, ("sum",), True),
    ("Adamax", {"lr": 1e-2, "weight_decay": 0.01}, ("exp_avg", "exp_inf"), False),
)
_OTHERS = (
    ("Lion", {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.01}, ("exp_avg",), 20),
    ("LAMB", _ADAM, _MOMENTS, 40),  # moments and sums of squares in a first pass, the parameters in a second
)


def uneven(elements: int, tensors: int, spread: float) -> list[tuple[int]]:
    """Log-normal sizes, `elements` together."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(tensors, generator=generator, dtype=torch.float64, device="cpu").mul(spread).exp()
    sizes = (drawn / drawn.sum() * elements).long().clamp(min=1)
    sizes[sizes.argmax()] += elements - sizes.sum()
    return [(n,) for n in sizes.tolist()]


def _elements(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def adamw(settings: Settings, shapes: list[tuple[int]]) -> Case:
    make = partial(partial, torch.optim.AdamW, **_ADAM)
    return optimizer_case(
        f"AdamW, {len(shapes)} tensors",
        shapes,
        _FLOAT,
        settings=settings,
        ours=partial(optim.AdamW, **_ADAM),
        reference=make(foreach=False),
        eager=make(foreach=False),
        builtin=make(fused=True),
        others={FOREACH: make(foreach=True)},
        states=_MOMENTS,
        bytes=28 * _elements(shapes),
    )


def clipped_and_averaged(settings: Settings, shapes: list[tuple[int]]) -> Case:
    """Everything that a training loop does with parameters after backward."""

    def theirs(params: list[Tensor], *, max_norm: float | None, **how: bool) -> ClippedAndAveraged:
        return ClippedAndAveraged(torch.optim.AdamW(params, **_ADAM, **how), max_norm=max_norm, decay=_DECAY)

    return optimizer_case(
        f"AdamW, clipping, average of parameters, {len(shapes)} tensors",
        shapes,
        _FLOAT,
        settings=settings,
        ours=partial(optim.AdamW, **_ADAM, max_grad_norm=_MAX_NORM, ema_decay=_DECAY),
        reference=partial(theirs, max_norm=None, foreach=False),
        builtin=partial(theirs, max_norm=_MAX_NORM, fused=True),
        states=(*_MOMENTS, "ema"),
        max_norm=_MAX_NORM,
        # PyTorch adds up squares in float32: of the norm of ten million elements three or four digits are right.
        others_roundings=2.0**13,
        # The gradients are read for their norm first. torch writes them clipped and reads them again.
        bytes=40 * _elements(shapes),
        other_bytes={BUILTIN: 52 * _elements(shapes)},
    )


def half(settings: Settings, shapes: list[tuple[int]], state_dtype: torch.dtype | str, rounding: str) -> Case:
    """Parameters and gradients in bfloat16."""
    small = state_dtype == "int8"

    def theirs(package: ModuleType) -> Build:
        return partial(package.optim.AdamW8bit, **_ADAM)

    # int8: tensors of few elements keep float32, the others have the scales of their blocks beside the codes.
    state = [
        2 * n if not small else 4 * n if n < _formats.LEAST_8BIT else n + 4 * _formats.blocks(n) for (n,) in shapes
    ]
    plain = 6 * _elements(shapes) + 4 * sum(state)
    rest = 4 * _elements(shapes) if rounding == "kahan" else 0
    return optimizer_case(
        f"AdamW, {'int8' if small else 'bfloat16'} states, {rounding}, {len(shapes)} tensors",
        shapes,
        _HALF,
        settings=settings,
        ours=partial(optim.AdamW, **_ADAM, state_dtype=state_dtype, rounding=rounding),
        reference=partial(torch.optim.AdamW, **_ADAM, foreach=False),
        builtin=partial(torch.optim.AdamW, **_ADAM, fused=True),
        peers=bitsandbytes(theirs) if small else None,
        slow={BITSANDBYTES} if settings.device == "cpu" else (),
        states=() if small else _MOMENTS,
        norms=small,
        # Stochastic rounding errs by up to one a step, and three are checked; by norms, that of the states adds to it.
        roundings=2.0 if small else 3.0,
        bytes=plain + rest,
        other_bytes={BUILTIN: 14 * _elements(shapes), BITSANDBYTES: plain},
    )


def by_torch(
    settings: Settings, shapes: list[tuple[int]], name: str, options: dict, states: tuple[str, ...], fused: bool
) -> Case:
    make = partial(partial, getattr(torch.optim, name), **options)
    return optimizer_case(
        f"{name}{' with momentum' if 'momentum' in options else ''}, {len(shapes)} tensors",
        shapes,
        _FLOAT,
        settings=settings,
        ours=partial(getattr(optim, name), **options),
        reference=make(foreach=False),
        eager=make(foreach=False),
        builtin=make(fused=True) if fused else None,
        others={FOREACH: make(foreach=True)},
        states=states,
        bytes=(12 + 8 * len(states)) * _elements(shapes),
    )


def by_loop(
    settings: Settings, shapes: list[tuple[int]], name: str, options: dict, states: tuple[str, ...], bytes: int
) -> Case:
    eager = partial(getattr(eager_optimizers, name), **options)
    return optimizer_case(
        f"{name}, {len(shapes)} tensors",
        shapes,
        _FLOAT,
        settings=settings,
        ours=partial(getattr(optim, name), **options),
        reference=eager,
        eager=eager,
        states=states,
        bytes=bytes * _elements(shapes),
    )


def muon(settings: Settings, count: int, matrices: Sequence[tuple[int, int]]) -> Case:
    """`count` matrices of each shape."""
    slow = _slow_in_bfloat16(settings.device)
    products = compute_in(torch.device(settings.device))
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}

    def eager(params: list[Tensor]) -> eager_optimizers.Muon:
        wide = torch.float64 if params[0].dtype == torch.float64 else products
        return eager_optimizers.Muon(params, wide, **options)

    sides = [(min(shape), max(shape)) for shape in matrices]
    return optimizer_case(
        f"Muon, {' and '.join(f'{count} of {rows}x{columns}' for rows, columns in matrices)}",
        [shape for shape in matrices for _ in range(count)],
        _FLOAT,
        settings=settings,
        ours=partial(optim.Muon, **options),
        reference=eager,
        eager=eager,
        builtin=partial(torch.optim.Muon, **options),
        slow={BUILTIN} if slow else (),
        checked=range(0, count * len(matrices), count),  # one of each shape
        states=("momentum_buffer",),
        norms=True,
        flops=count * sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides),
        metric="TFLOP/s",
        products=str(products).removeprefix("torch."),
        **({"factors": (1.0,)} if slow else {}),
    )


def _slow_in_bfloat16(device: str) -> bool:
    """Whether there are no instructions for bfloat16: the products of torch's Muon then take half a minute a matrix."""
    return device == "cpu" and _isa() not in ("avx512", "amx")


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        large, many = uneven(100_000, 8, 0.7), uneven(20_000, 50, 0.5)
        matrices = muon(settings, 2, ((32, 32), (32, 88)))
    else:
        large, many = uneven(100_000_000, 200, 1.5), uneven(100_000_000, 20_000, 0.5)
        matrices = muon(settings, 12, ((1024, 1024), (1024, 2816)))
    return [
        adamw(settings, large),
        adamw(settings, many),
        clipped_and_averaged(settings, large),
        *(half(settings, large, dtype, rounding) for dtype in (_HALF, "int8") for rounding in ("stochastic", "kahan")),
        half(settings, large, "int8", "nearest"),
        *(by_torch(settings, large, *which) for which in _TORCH),
        *(by_loop(settings, large, *which) for which in _OTHERS),
        matrices,
    ]
