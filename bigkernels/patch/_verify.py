"""The numerical checks: probes, and one criterion for outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from .._torch_private import FakeTensor
from ._device import probe_device
from ._report import Error
from ._rule import Skip

_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)  # the last stands for the others where a model runs without memory


def plain(*tensors: Tensor) -> bool:
    """Whether all are ordinary dense tensors: no subclass (DTensor), nested, sparse or mkldnn tensor, and no Proxy."""
    for t in tensors:
        if type(t) not in _PLAIN or t.layout is not torch.strided or t.is_nested:
            return False
    return True


@contextmanager
def undisturbed(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Checks run with gradients and without autocast, and leave every random number generator as it was."""
    devices = set(devices)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        devices.add(probe_device())
        for kind in sorted({d.type for d in devices} - {"cpu", "meta"}):
            here = [d for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(here, device_type=kind))
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class Probes:
    """Random tensors from a generator of their own: equal in every call, whatever the program's seed."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0):
        """On `probe_device` by default."""
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.device, self.dtype = probe_device() if device is None else device, dtype

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu") * scale + shift
        return values.to(device=self.device, dtype=self.dtype).requires_grad_()


def gradients(function: Callable, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs of `function(*tensors)` and the gradients of a weighted sum of them for each tensor."""
    outputs = function(*tensors)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    # Weights that differ between elements and repeat for every dtype, so that no error can cancel.
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for out in outputs:
        weights = torch.linspace(-1, 1.7, out.numel(), dtype=torch.float64, device=out.device)
        total = total + (out.double() * weights.view(out.shape)).sum()
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(total, leaves, materialize_grads=True))


def outputs_only(function: Callable, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    with torch.no_grad():
        outputs = function(*tensors)
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def compare(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor], what: str, terms: int = 0
) -> Error:
    """The largest error of `ours` relative to the scale of `exact`, beside that of `theirs`.

    Raises Skip where the model's own numbers are not `exact` up to their dtype's rounding (it computes something
    else), or where ours are more than twice as far from it. `terms`: how many numbers the model adds up one by one.
    """
    worst = Error(0.0, theirs[0].dtype if theirs else torch.float32, 0.0)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Skip(f"{what}: gives {tuple(b.shape)} {b.dtype} where the kernel gives {tuple(a.shape)} {a.dtype}")
        eps = torch.finfo(b.dtype).eps if b.dtype != torch.float64 else torch.finfo(torch.float32).eps
        scale = e.abs().max().item() if e.numel() else 0.0
        own, base = ((t.double() - e).abs().max().item() if e.numel() else 0.0 for t in (a, b))
        if not base <= (64 + terms / 32) * eps * scale:
            raise Skip(f"{what}: computes something else ({base / scale if scale else base:.1e} apart)")
        if not own <= 2 * base + 4 * eps * scale:
            raise Skip(f"{what}: the kernel's error is {own:.1e}, the model's own {base:.1e}")
        by = 1 / scale if scale else 1.0
        worst = max(worst, Error(own * by, b.dtype, base * by), key=lambda e: (float(e), e.eager))
    return worst


def doubled(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
