"""Linear layers against PyTorch's: inference, with the packed weight of `nn.Linear`, and training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ...nn.linear import linear_by_packed
from ..case import Case, Settings
from ..operators import operator_case


def case(settings: Settings, tokens: int, n: int, k: int, dtype: torch.dtype, *, backward: bool = False) -> Case:
    def inference(x: Tensor, weight: Tensor) -> Tensor:
        return linear_by_packed(x, weight, None)

    size = dtype.itemsize
    return operator_case(
        "linear",
        f"{tokens} x {k} to {n}",
        settings=settings,
        dtype=dtype,
        inputs=lambda draw: {"x": draw.normal(tokens, k), "weight": draw.normal(n, k, scale=k**-0.5)},
        ours=functional.linear if backward else inference,
        eager=F.linear,
        compiled=False,
        differentiable=("x", "weight") if backward else (),
        bytes=(3 if backward else 1) * size * (n * k + tokens * (n + k)),
        flops=(6 if backward else 2) * tokens * n * k,
        metric="TFLOP/s" if tokens > 16 else "GB/s",
        only_read=tokens <= 16,
    )


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [case(settings, tokens, 96, 128, torch.bfloat16, backward=tokens > 16) for tokens in (1, 40)]
    bf16, wide, half = torch.bfloat16, torch.float32, torch.float16
    cases = [case(settings, tokens, 4096, 4096, bf16) for tokens in (1, 16, 64)]
    cases += [case(settings, tokens, n, k, bf16) for tokens in (512, 2048) for n, k in ((1024, 1024), (4096, 4096))]
    cases += [case(settings, 512, 32000, 1024, bf16)]
    trained = ((512, 1024, 1024), (2048, 1024, 1024), (512, 4096, 4096), (512, 32000, 1024))
    cases += [case(settings, tokens, n, k, bf16, backward=True) for tokens, n, k in trained]
    for dtype in (wide, half):
        cases += [case(settings, tokens, 4096, 4096, dtype) for tokens in (1, 512)]
        cases += [case(settings, 512, 2048, 2048, dtype, backward=True)]
    return cases
