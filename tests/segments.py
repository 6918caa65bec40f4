"""What the tests of checkpointing share: policies, and gradients with and without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bigkernels import checkpoint
from bigkernels.checkpointing import Policy, offload, resolve_policy, selective

OFFLOAD = offload(min_nbytes=0)
# Bit for bit the gradients of a plain call.
EXACT: dict[str, Policy] = {
    "recompute": resolve_policy("recompute"),
    "selective": resolve_policy("selective"),
    "selective, no budget": selective(budget=None),
    "selective, all of it": selective(budget=1.0),
    "offload": OFFLOAD,
    "recompute+offload": resolve_policy("recompute") + OFFLOAD,
    "selective+offload": selective(budget=None) + OFFLOAD,
}
CODED: dict[str, Policy] = {
    "int8": resolve_policy("int8"),
    "fp8": resolve_policy("fp8"),
    "int8+offload": resolve_policy("int8") + OFFLOAD,
    "recompute+int8": resolve_policy("recompute+int8"),
    "selective+int8": selective(budget=None) + resolve_policy("int8"),
}
ALL = EXACT | CODED
RECOMPUTED = {name: policy for name, policy in ALL.items() if policy.keep is not None}


def gradients(out: Tensor, tensors: Iterable[Tensor], **options) -> list[Tensor]:
    """Of a sum with weights that are all different, so that no two elements of `out` count the same."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), list(tensors), **options))


def compare(fn: Callable[..., Tensor], args: tuple, tensors: Iterable[Tensor], policy: Policy | str) -> list[float]:
    """The relative errors of the gradients of a segment, whose output must be the same; 0.0 if they are bitwise so."""
    tensors = list(tensors)
    state = torch.get_rng_state()
    out = fn(*args)
    expected, after = gradients(out, tensors), torch.get_rng_state()
    torch.set_rng_state(state)
    found = checkpoint(fn, *args, policy=policy)
    assert torch.equal(found, out)
    errors = [relative(a, b) for a, b in zip(gradients(found, tensors), expected, strict=True)]
    assert torch.equal(torch.get_rng_state(), after), "backward has left the generator elsewhere"
    return errors


def relative(found: Tensor, expected: Tensor) -> float:
    if torch.equal(found, expected):
        return 0.0
    return float((found - expected).double().norm() / expected.double().norm())
