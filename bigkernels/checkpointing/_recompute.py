"""Segments whose activations are recomputed in backward.

Hooks take the place of every tensor that autograd would save: forward only counts them. The first that backward asks
for runs the segment once more, under hooks that collect the tensors, and which stop the run at the last one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .._torch_private import backward_pass, surrounding_hooks, tree_flatten, tree_unflatten
from ._buffers import Buffers

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class CheckpointError(RuntimeError):
    """A segment did something else when it ran again."""


class Misplaced(Exception):
    """What was handed out may be the result of another call: the segment has to run again without."""


class Stop(BaseException):
    """The last saved tensor has been made again. No handler of the segment's own may catch it."""


class Exact:
    """A saved tensor as it is. Hooks have to see for themselves that nothing is written to it."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor.detach(), tensor._version

    def intact(self) -> bool:
        return self.tensor._version == self.version

    def get(self) -> Tensor:
        if not self.intact():
            raise RuntimeError(
                f"bigkernels.checkpoint: a tensor of shape {tuple(self.tensor.shape)} that backward "
                "needs has been modified by an inplace operation"
            )
        return self.tensor


class _Save(torch.autograd.Function):
    """A node that does nothing but save tensors, so that hooks see them as they see any saved tensor."""

    @staticmethod
    def forward(ctx, wanted, *tensors):
        ctx.save_for_backward(*tensors)
        return wanted.new_empty(0)

    @staticmethod
    def backward(ctx, *grads):
        raise AssertionError("no gradient flows through a node that only saves")


class Inputs:
    """A segment's arguments until it runs again.

    Where hooks are given, or surround the segment, the tensors are theirs to keep: a segment within a segment must not
    hold what the outer one gives up.
    """

    def __init__(self, args: tuple, kwargs: dict, hooks: Hooks | None):
        self.values, self.structure = _flatten(args, kwargs)
        self.node = None
        self.at = [i for i, v in enumerate(self.values) if isinstance(v, Tensor) and not v.is_inference()]
        tensors = [self.values[i] for i in self.at]
        self.surroundings = Surroundings(tensors)  # before the tensors are given away
        if hooks is None and surrounding_hooks(True) is None:
            self.versions = [t._version for t in tensors]
            return
        with saved_tensors_hooks(*hooks) if hooks else ExitStack(), torch.enable_grad():
            empty = torch.empty(0, requires_grad=True, dtype=torch.float32, device="cpu")
            self.node = _Save.apply(empty, *tensors).grad_fn
        for i in self.at:
            self.values[i] = None

    def get(self) -> tuple[tuple, dict]:
        values = self.values
        if self.node is not None:
            values = list(values)
            for i, tensor in zip(self.at, self.node.saved_tensors, strict=True):
                values[i] = tensor
        else:
            for i, version in zip(self.at, self.versions, strict=True):
                if values[i]._version != version:
                    shape = tuple(values[i].shape)
                    raise RuntimeError(
                        f"bigkernels.checkpoint: an input of the segment, of shape {shape}, was "
                        "modified in place after the segment began"
                    )
        return _unflatten(values, self.structure)


_ATOMS = (Tensor, int, float, str, type(None))


def _flatten(args: tuple, kwargs: dict) -> tuple[list, Any]:
    """As `tree_flatten`, which takes longer than the rest of a segment where no argument is a container."""
    values = [*args, *kwargs.values()]
    if all(isinstance(v, _ATOMS) for v in values):
        return values, tuple(kwargs)
    return tree_flatten((args, kwargs))


def _unflatten(values: list, structure: Any) -> tuple[tuple, dict]:
    if not isinstance(structure, tuple):
        return tree_unflatten(values, structure)
    split = len(values) - len(structure)
    return tuple(values[:split]), dict(zip(structure, values[split:], strict=True))


class Surroundings:
    """What a segment computes with beside its arguments: autocast and the random number generators."""

    def __init__(self, tensors: list[Tensor]):
        self.cuda = gpus(tensors)
        kinds = ["cpu", *({t.device.type for t in tensors if not t.is_cpu} | ({"cuda"} if self.cuda else set()))]
        self.autocast = [(kind, _autocast(kind)) for kind in kinds]
        self.random: list[Any] | None = random_state(self.cuda)

    def entered(self) -> None:
        """The segment has run: where it drew nothing, there is nothing to draw again."""
        if self.random == random_state(self.cuda):
            self.random = None

    def hold(self) -> bool:
        """Whether there is nothing to restore."""
        return self.random is None and all(then == _autocast(kind) for kind, then in self.autocast)

    def restore(self, stack: ExitStack) -> None:
        for kind, then in self.autocast:
            if then != _autocast(kind):
                enabled, dtype, cache = then
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
        if self.random is None:
            return
        stack.enter_context(torch.random.fork_rng(self.cuda))
        torch.set_rng_state(torch.frombuffer(bytearray(self.random[0]), dtype=torch.uint8))
        for i, (seed, offset) in zip(self.cuda, self.random[1:], strict=True):
            torch.cuda.default_generators[i].manual_seed(seed)
            torch.cuda.default_generators[i].set_offset(offset)


def gpus(tensors: list[Tensor]) -> list[int]:
    """Of these tensors, and the current one: more tensors may be in objects, or are made."""
    if not torch.cuda.is_initialized():
        return []
    return sorted({torch.cuda.current_device(), *(t.device.index for t in tensors if t.is_cuda)})


def random_state(cuda: list[int]) -> list:
    """Of the CPU's generator and those of some GPUs."""
    generators = [torch.cuda.default_generators[i] for i in cuda]
    state = torch.default_generator.get_state()
    # As bytes they are compared ten times as fast as tensors are.
    held = ctypes.string_at(state.data_ptr(), state.numel())
    return [held, *((g.initial_seed(), g.get_offset()) for g in generators)]


_OFF = (False, None, None)


def _autocast(kind: str) -> tuple:
    if kind != "cpu" and not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return _OFF
    return True, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()


class Segment:
    """One run of a segment.

    `forward` and `recompute` make what surrounds the first run and the one in backward, beside the hooks; `watch` sees
    each tensor that autograd would save.
    """

    def __init__(
        self,
        fn: Callable,
        hooks: Hooks | None = None,
        forward: Callable[[], AbstractContextManager] | None = None,
        recompute: Callable[[], AbstractContextManager] | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ):
        self.fn, self.hooks, self.forward, self.recompute, self.watch = fn, hooks, forward, recompute, watch
        self.seen: list[tuple] = []  # (shape, dtype, device) of each saved tensor
        self.recomputed: list[Exact | None] = []
        self.made_in: int | None = None  # the backward pass that they are of

    def run(self, args: tuple, kwargs: dict) -> Any:
        self.buffers = Buffers(self.fn, args)
        self.inputs = Inputs(args, kwargs, self.hooks)
        self.surroundings = self.inputs.surroundings
        with saved_tensors_hooks(self._pack, self._unpack):
            if self.forward is None:
                out = self.fn(*args, **kwargs)
            else:
                with self.forward():
                    out = self.fn(*args, **kwargs)
        self.surroundings.entered()
        self.buffers.ended()
        self.watch = None
        return out

    def _pack(self, tensor: Tensor) -> int:
        self.seen.append((tensor.shape, tensor.dtype, tensor.device))
        if self.watch is not None:
            self.watch(tensor)
        return len(self.seen) - 1

    def _unpack(self, index: int) -> Tensor:
        current = backward_pass()
        if self.made_in != current or not self.recomputed or self.recomputed[index] is None:
            try:
                self.recomputed = self._recomputed()
            except Misplaced:
                self.recomputed = self._recomputed()
            self.made_in = current
        kept, self.recomputed[index] = self.recomputed[index], None
        assert kept is not None  # as it has just been made
        return kept.get()

    def _recomputed(self) -> list[Exact | None]:
        collector = _Collector(self.seen)
        args, kwargs = self.inputs.get()
        hooks = saved_tensors_hooks(collector.pack, _itself)
        if (
            self.recompute is None and not self.buffers.before and self.surroundings.hold()
        ):  # as below, without a stack of nothing
            with torch.enable_grad(), hooks:
                if self._stopped(args, kwargs):
                    return collector.collected
        else:
            with ExitStack() as stack:
                self.surroundings.restore(stack)
                if self.buffers.before:
                    stack.enter_context(self.buffers.restored())
                stack.enter_context(torch.enable_grad())
                if self.recompute is not None:
                    stack.enter_context(self.recompute())
                stack.enter_context(hooks)
                if self._stopped(args, kwargs):
                    return collector.collected
        raise CheckpointError(
            f"bigkernels.checkpoint: the segment saved {len(self.seen)} tensors, and "
            f"{len(collector.collected)} when it runs again; it must do the same every time"
        )

    def _stopped(self, args: tuple, kwargs: dict) -> bool:
        """Run; whether the last saved tensor has been made."""
        try:
            self.fn(*args, **kwargs)
        except Stop:
            return True
        return False


class _Collector:
    """Collects what a segment saves when it runs again, and stops it at the last."""

    def __init__(self, seen: list[tuple]):
        self.seen = seen
        self.collected: list[Exact | None] = []

    def pack(self, tensor: Tensor) -> Tensor:
        index, now = len(self.collected), (tensor.shape, tensor.dtype, tensor.device)
        if now != self.seen[index]:
            then, is_now = _text(self.seen[index]), _text(now)
            raise CheckpointError(
                f"bigkernels.checkpoint: saved tensor {index} of the segment was {then}, and is {is_now} when the "
                "segment runs again"
            )
        kept = Exact(tensor)
        self.collected.append(kept)
        if len(self.collected) == len(self.seen):
            raise Stop
        return kept.tensor


def within_segment() -> bool:
    """Whether a segment around this gives up what is saved here and will run it again: nothing is kept here, then."""
    hooks = surrounding_hooks(True)
    return hooks is not None and isinstance(getattr(hooks[0], "__self__", None), (Segment, _Collector))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _text(seen: tuple) -> str:
    return f"{tuple(seen[0])} of {seen[1]} on {seen[2]}"
