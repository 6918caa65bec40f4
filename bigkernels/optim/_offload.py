"""States in host memory for parameters on a GPU: the CPU kernels take the step while copies are on their way."""

# mypy: ignore-errors

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from .._load import cpu_library
from .._page_locked import page_locked
from . import _plan
from ._muon import Muon
from ._optimizer import Optimizer
from ._plan import Entry, Plan, local, shaped
from ._reference import Rule

_BUCKET = 2**24  # elements that are copied, stepped and copied back together


def offload_states(optimizer: Optimizer) -> None:
    """Keep the states of an optimizer in host memory, and take its steps there.

    For parameters on a GPU. Gradients go to pinned host memory bucket by bucket; while the CPU kernels step one bucket,
    the next one's gradients arrive and the last one's parameters return. States take no memory on the GPU; the host
    holds them, a copy of the parameters and one of the gradients. Existing states move. Parameters on the CPU are
    moved in the same way, for tests.

    Raises:
        ValueError: for `Muon`, whose products belong on the GPU; for distributed and complex parameters and those of
            float64; where the CPU kernels are not there.
    """
    name = "bigkernels.optim.offload_states"
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, Muon):
        raise ValueError(f"{name}: optimizer is a {type(optimizer).__name__}; accepted are the others of this module")
    if reason := cpu_library().reason:
        raise ValueError(f"{name}: the CPU kernels are needed ({reason})")
    for group in optimizer.param_groups:
        for p in group["params"]:
            if hasattr(p, "to_local") or p.dtype not in _plan.TYPES:
                raise ValueError(f"{name}: a parameter is {'distributed' if hasattr(p, 'to_local') else p.dtype}")
    optimizer._offload(_plans)


def _plans(rule: Rule, entries: list[Entry], follows: bool) -> list[Plan]:
    buckets, size = [[]], 0
    for entry in entries:
        if size >= _BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(entry)
        size += entry.param.numel()
    stream = torch.cuda.Stream(entries[0].param.device) if entries[0].param.is_cuda else None
    return [_OffloadedPlan(rule, bucket, stream, follows) for bucket in buckets]


class _OffloadedPlan(Plan):
    """A bucket: host copies of its parameters are stepped in their place.

    `follows`: their memory is that of parameters which are stepped before, so that they are copied when these are done.
    """

    def __init__(self, rule: Rule, entries: list[Entry], stream: torch.cuda.Stream | None, follows: bool = False):
        self._stream, self._follows = stream, follows
        self._shadows = [_host(local(entry.param)) for entry in entries]
        self._buffers: list[Tensor | None] = [None] * len(entries)
        super().__init__(rule, entries, targets=self._shadows)

    def _aside(self) -> contextlib.AbstractContextManager:
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def gradients(
        self, given: list[Tensor | None] | None = None, dense_of: Callable[[Tensor], Tensor] = Tensor.to_dense
    ) -> tuple[Tensor, list[Tensor | None]]:
        given = [p.grad for p in self.params] if given is None else given
        given = [None if g is None else shaped(dense_of(g), p) for g, p in zip(given, self.params, strict=True)]
        host: list[Tensor | None] = []
        with self._aside():
            for i, (g, shadow) in enumerate(zip(given, self._shadows, strict=True)):
                if g is None:
                    host.append(None)
                    continue
                if self._buffers[i] is None or self._buffers[i].dtype != g.dtype:
                    self._buffers[i] = _host(shadow, g.dtype)
                host.append(self._buffers[i].copy_(g.detach(), non_blocking=True))
                if self._stream is not None:
                    g.record_stream(self._stream)
            if not self._follows:
                self._read()
            self._arrived = self._stream.record_event() if self._stream is not None else None
        return super().gradients(host)

    def _read(self) -> None:
        # Others may have written into a parameter since the last step, and what they write through `.data` no version
        # counts.
        for p, shadow in zip(self.params, self._shadows, strict=True):
            shadow.copy_(local(p), non_blocking=True)

    def wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()

    def before(self) -> None:
        if self._follows:
            with self._aside():
                self._read()
                self._arrived = self._stream.record_event() if self._stream is not None else None
        self.wait()
        self.counts_in()

    def after(self) -> None:
        self.counts_out()
        with self._aside():
            for p, shadow in zip(self.params, self._shadows, strict=True):
                local(p).copy_(shadow, non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def _host(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room in host memory, dense, in the order of a kernel."""
    if not _plan.dense(like):
        like = torch.empty(like.shape, dtype=like.dtype, device="meta")
    dtype = dtype or like.dtype
    if not torch.cuda.is_available():
        return torch.empty_like(like, device="cpu", dtype=dtype)
    return page_locked(like.numel() * dtype.itemsize).view(dtype).as_strided(like.shape, like.stride())
