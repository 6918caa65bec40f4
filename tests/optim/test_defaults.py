"""Other default dtypes and devices, as recipes set while they build a model: the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bigkernels
from bigkernels import optim

CASES = {
    "AdamW int8": ("AdamW", {"state_dtype": "int8", "amsgrad": True}),
    "AdamW kahan": ("AdamW", {"rounding": "kahan", "ema_decay": 0.9, "max_grad_norm": 1.0}),
    "AdamW stochastic": ("AdamW", {"rounding": "stochastic", "state_dtype": torch.bfloat16}),
    "Adagrad int8": ("Adagrad", {"state_dtype": "int8", "initial_accumulator_value": 0.1}),
    "SGD": ("SGD", {"momentum": 0.9, "state_dtype": "int8"}),
    "RMSprop": ("RMSprop", {"centered": True, "momentum": 0.5}),
    "Lion": ("Lion", {"state_dtype": "int8"}),
    "LAMB": ("LAMB", {"max_grad_norm": 0.1}),
    "Muon": ("Muon", {"state_dtype": "int8"}),
}


def tensors(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = ((70, 80), (5,), (3, 4, 5))
    return [torch.randn(s, generator=generator, dtype=torch.float32, device="cpu").to(dtype) for s in shapes]


def steps(case: str, backend: str) -> list[Tensor]:
    name, options = CASES[case]
    torch.manual_seed(0)
    params = [nn.Parameter(t) for t in tensors(torch.bfloat16 if "rounding" in options else torch.float32)]
    o = getattr(optim, name)(params, lr=0.01, **options)
    for step in range(3):
        for p, g in zip(params, tensors(torch.float32), strict=True):
            p.grad = (g * (step + 1)).to(p.dtype)
        with bigkernels.use(backend):
            o.step(divisor=2.0)
        if step == 1:
            again = getattr(optim, name)(params, lr=0.01, **options)
            again.load_state_dict(o.state_dict())
            o = again
    if options.get("ema_decay"):
        with o.averaged():
            pass
    saved = o.torch_state_dict()["state"]
    norm = [optim.clip_grad_norm_(params, 1.0), optim.get_total_norm([])]
    return [p.detach() for p in params] + [t for s in saved.values() for t in s.values()] + norm


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_default_dtypes_and_devices(case: str, backend: str, default: torch.dtype | str) -> None:
    expected = steps(case, backend)
    before = torch.get_default_dtype()
    torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
    try:
        found = steps(case, backend)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
