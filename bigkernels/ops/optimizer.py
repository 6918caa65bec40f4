"""The raw operators of `bigkernels.optim`: steps over lists of records, which are pointers and sizes as plain numbers.

The records are those of csrc/include/bigkernels/optimizer.h; bigkernels/optim/_plan.py writes them, and keeps alive
what they point to. Nobody else should call these: there is no way to check an address.
"""

from __future__ import annotations

import torch

from .._load import cpu_library, cuda_unavailable
from .registry import Implementation

STEP = (
    "optimizer_step(int algorithm, Tensor tensors, Tensor grads, Tensor chunks, Tensor groups, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? divisor, Tensor? norm, float max_norm, Tensor? trust) -> ()"
)
MEASURE = (
    "optimizer_measure(Tensor tensors, Tensor grads, Tensor chunks, Tensor groups, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? divisor, Tensor? norm, float max_norm, Tensor(a!) sums) -> ()"
)
NORM = "optimizer_norm(Tensor tensors, Tensor grads, Tensor chunks, Tensor(a!) out, bool infinity) -> ()"

for schema in (STEP, MEASURE, NORM):
    name, brace, rest = schema.partition("(")
    torch.library.define("bigkernels::" + name, brace + rest)

# In the order in which they are tried.
IMPLEMENTATIONS = (
    Implementation("cpu", "cpu", unavailable=lambda: cpu_library().reason),
    Implementation("cuda", "cuda", unavailable=cuda_unavailable),
)

step = torch.ops.bigkernels.optimizer_step.default
measure = torch.ops.bigkernels.optimizer_measure.default
norm = torch.ops.bigkernels.optimizer_norm.default


def why_not(device: str, dtype: torch.dtype, forced: str | None) -> str | None:
    """Why no kernel takes parameters of `dtype` on `device`; None where one does."""
    if forced == "reference":
        return "the reference was forced"
    reasons = {i.name: i.refuses(device, dtype) for i in IMPLEMENTATIONS}
    return None if None in reasons.values() else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
