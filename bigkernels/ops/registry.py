"""The operator recipe's shared half: definition, selection and logging.

An operator is a public function, a reference in plain PyTorch, and two raw operators `bigkernels::<op>_fwd` and
`bigkernels::<op>_bwd`. The dispatcher knows which kernel implements a raw operator on which device; this module
decides, before a raw operator is called, whether some kernel supports the given tensors at all, and says why not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _torch_private
from .._load import cpu_library, triton_missing, triton_unavailable
from .._torch_private import KERNELS, dispatch_modes, dispatch_modes_above_autograd, lacks
from .._torch_private import dispatch_flag as _modes
from .._torch_private import forward_ad as _forward_ad
from .._torch_private import is_jit_tracing as _is_jit_tracing
from .._torch_private import transforms as _transforms
from ._flops import count_as

log = logging.getLogger("bigkernels")
_LOG_CHOICES = os.environ.get("BIGKERNELS_LOG", "0") not in ("", "0")
if _LOG_CHOICES and not log.handlers:
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "triton", "gluon", "cuda", "torch", "reference")

# What a kernel path raises on wrong arguments. The public function then runs its full checks, which raise an error that
# names the argument: right calls need not pay for them.
REFUSED = (RuntimeError, TypeError, AttributeError, KeyError)

OPERATORS: dict[str, Operator] = {}

# The backend forced by `use`, or None. One per process, like torch.backends: the autograd engine runs backward passes
# in threads of its own, and they must see the same choice.
_forced: str | None = None
_nondeterministic = False


_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def _no_reason() -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator. `unavailable()` returns why this machine cannot run it, or None."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    unavailable: Callable[[], str | None] = _no_reason

    def refuses(self, device: str, dtype: torch.dtype) -> str | None:
        """Why this implementation cannot run on tensors of `dtype` on `device`; None if it can."""
        if device != self.device:
            return f"runs on {self.device} tensors, not {device}"
        if dtype not in self.dtypes:
            return f"no kernel for {str(dtype).removeprefix('torch.')}"
        return self.unavailable()


def cpu_kernel() -> Implementation:
    return Implementation("cpu", "cpu", unavailable=lambda: cpu_library().reason)


def triton_kernel() -> Implementation:
    return Implementation("triton", "cuda", unavailable=triton_unavailable)


def gluon_kernel() -> Implementation:
    """Triton's kernels for Hopper, for those calls that they take (`bigkernels.triton._hopper`)."""
    return Implementation("gluon", "cuda", (torch.bfloat16, torch.float16), _not_hopper)


def _not_hopper() -> str | None:
    reason = triton_unavailable()
    if reason is None and torch.cuda.get_device_capability()[0] != 9:
        reason = "no GPU of compute capability 9.0"
    return reason


def torch_kernel() -> Implementation:
    """PyTorch's own kernels, for those calls that they take (`routes`)."""
    return Implementation("torch", "cuda", unavailable=lambda: None if torch.cuda.is_available() else "no CUDA device")


class Operator:
    """The registered half of an operator: its name and its ordered implementations, before the reference."""

    def __init__(
        self,
        name: str,
        *,
        implementations: tuple[Implementation, ...] | None = None,
        in_graphs: bool = False,
        listed: bool = True,
    ):
        """
        Args:
            in_graphs: whether compiled graphs hold the kernel, where there is one, and not the reference.
            listed: whether it is an operator of its own to users, with samples, or a part of others.
        """
        self.name = name
        self.in_graphs = in_graphs
        self.implementations = implementations or (cpu_kernel(), triton_kernel())
        self._choices: dict[tuple, str] = {}
        self._on_cpu: dict[tuple, bool] = {}  # (dtype, forced): whether a kernel supports CPU tensors
        # (device, dtype) of the tensors for which compiled graphs hold the kernel.
        self._in_graphs: tuple[tuple[str, torch.dtype], ...] = ()
        if listed:
            OPERATORS[name] = self

    def choose(self, x: Tensor) -> str:
        """Name of the first implementation that supports tensors like `x`; "reference" if none does."""
        key = (x.device.type, x.dtype, _forced)
        choice = self._choices.get(key)
        return choice if choice is not None else self._first_choice(*key)

    def uses_kernel(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether a raw operator supports a call on these tensors.

        What sees only through plain PyTorch (`sees_plain_alone`) gets the reference. The compiler gets it too, because
        it fuses that with its neighbours, unless the operator says otherwise. Tensors of several devices are left to
        the reference, whose checks name them.
        """
        if _is_dynamo_compiling():
            if _forced is None:
                return (x.device.type, x.dtype) in self._in_graphs
            return _forced != "reference" and self.choose(x) != "reference"
        if x.is_cpu:
            # Kept short: on one token, what happens here takes as long as the kernel.
            for t in others:
                if t is not None and not t.is_cpu:
                    return False
            supported = self._on_cpu.get((x.dtype, _forced))
            if supported is None:
                supported = self._on_cpu[x.dtype, _forced] = self.choose(x) != "reference"
        elif x.is_cuda:
            index = x.get_device()
            for t in others:
                if t is not None and (not t.is_cuda or t.get_device() != index):
                    return False
            supported = (self._choices.get(("cuda", x.dtype, _forced)) or self.choose(x)) != "reference"
        else:
            for t in others:
                if t is not None and t.device != x.device:
                    return False
            supported = self.choose(x) != "reference"
        return (
            supported
            and _transforms() is None
            and _forward_ad._current_level < 0
            and not _is_jit_tracing()
            and not (_modes._is_in_torch_dispatch_mode and _in_graph_without_gradients(x, *others))
        )

    def refusals(self, device: str, dtype: torch.dtype) -> dict[str, str | None]:
        """For each implementation, why it cannot run; None where it can."""
        missing = lacks(KERNELS)
        if missing:  # nobody could tell what looks at a call: plain PyTorch is right whoever does
            return {i.name: missing for i in self.implementations} | {"reference": None}
        reasons: dict[str, str | None] = {}
        for i in self.implementations:
            if reasons.get(i.name, "") is not None:  # one of a name may be for another device
                reasons[i.name] = i.refuses(device, dtype)
        return reasons | {"reference": None}

    def prepare(self, backend: str | None) -> None:
        """Choose for a forced backend, or for none, ahead of time: the compiler can read them, not make them."""
        if backend is None:
            if self.in_graphs and not lacks(KERNELS):
                self._in_graphs = tuple(
                    (i.device, dtype)
                    for i in self.implementations
                    # Graphs hold the first as it is; the others are where Triton is.
                    if i.name not in ("torch", "gluon", "cuda")
                    for dtype in i.dtypes
                    # Asking for a GPU here would initialise its driver; a tensor on one is answer enough.
                    if (triton_missing() if i.name == "triton" else i.unavailable()) is None
                )
            return
        for i in self.implementations:
            for dtype in i.dtypes:
                if i.name == backend and i.refuses(i.device, dtype) is None:
                    self._choices[i.device, dtype, backend] = backend

    def _first_choice(self, device: str, dtype: torch.dtype, forced: str | None) -> str:
        refusals = self.refusals(device, dtype)
        if forced is not None:
            if forced not in refusals:
                raise RuntimeError(f"bigkernels.use: {self.name}: there is no {forced!r} implementation")
            if refusals[forced] is not None:
                raise RuntimeError(f"bigkernels.use: {self.name}: {forced!r} was forced but {refusals[forced]}")
            choice = forced
        else:
            choice = next(name for name, reason in refusals.items() if reason is None)
        refused = "; ".join(f"{name}: {reason}" for name, reason in refusals.items() if reason and name != choice)
        log.info("%s %s on %s -> %s%s", self.name, dtype, device, choice, f" ({refused})" if refused else "")
        self._choices[device, dtype, forced] = choice
        return choice


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force one implementation, "cpu", "triton", "gluon", "cuda", "torch" or "reference", inside a `with` block.

    "torch" are PyTorch's own kernels, which compute by default what they are faster at (`bigkernels info` prints the
    table of routes); "triton" takes ours there too, and "gluon" attention's kernels for Hopper, off otherwise.
    An operator that it cannot run raises RuntimeError with the reason. The choice holds for the whole process while
    the block runs.
    """
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"bigkernels.use: backend is {backend!r}; accepted are {', '.join(BACKENDS)}")
    before, _forced = _forced, backend
    for operator in OPERATORS.values():
        operator.prepare(backend)
    try:
        yield
    finally:
        _forced = before


def allow_nondeterministic(allow: bool = True) -> None:
    """Let operators use faster kernels whose results may differ in the last bits from run to run; off by default.

    It holds for the process. `torch.use_deterministic_algorithms(True)` goes before it. Today it concerns the backward
    pass of `attention` and `varlen_attention` on GPUs in 16 bits: the gradient of the queries is then added up by
    atomics, five matrix products in place of seven.
    """
    global _nondeterministic
    _nondeterministic = allow


def nondeterministic() -> bool:
    return _nondeterministic and not torch.are_deterministic_algorithms_enabled()


def define(schema: str, fake: Callable, fallback: Callable, flops: Callable[..., int] | None = None) -> Callable:
    """Define `bigkernels::<schema>` with its fake kernel and its fallback in plain PyTorch; returns the overload.

    The fallback runs wherever no compiled kernel is registered for a tensor's device, so that a graph that holds
    the operator still runs on a machine without the libraries. `flops` counts the floating point operations of a call
    (`_flops`); operators without matrix products have none, as PyTorch counts.
    """
    name = "bigkernels::" + schema.split("(")[0]
    torch.library.define(
        "bigkernels::" + schema[: schema.index("(")], schema[schema.index("(") :], tags=(torch.Tag.pt2_compliant_tag,)
    )
    torch.library.impl(name, "CompositeExplicitAutograd")(fallback)
    torch.library.register_fake(name)(fake)
    packet = getattr(torch.ops.bigkernels, name.split("::")[1])
    if flops is not None:
        count_as(packet, flops)
    return packet.default


def is_forced(backend: str) -> bool:
    """Whether `use` forces it."""
    return _forced == backend


def sees_plain_alone(*tensors: Tensor | None) -> bool:
    """Whether something looks that sees through plain PyTorch alone, and no kernel: torch.func transforms; forward-mode
    differentiation; `torch.jit.trace`, whose file has to work without this package; `make_fx` and `torch.export`, where
    a gradient is needed, because their graphs hold what an autograd function calls, and not its backward.
    """
    if _transforms() is not None or _forward_ad._current_level >= 0:
        return True
    if _is_dynamo_compiling():
        return False
    return _is_jit_tracing() or (_modes._is_in_torch_dispatch_mode and _in_graph_without_gradients(*tensors))


def is_watched() -> bool:
    """Whether something follows each operation, so that results of earlier calls mean nothing to it."""
    return _transforms() is not None or _is_jit_tracing() or (_modes._is_in_torch_dispatch_mode and _has_modes())


def _has_modes() -> bool:
    # The flag is one of the process: where two threads leave their modes in the order of entering, it stays set.
    return dispatch_modes() > 0 or dispatch_modes_above_autograd() > 0


def writes_graph() -> bool:
    """Whether `make_fx` or what is made of it, as `torch.export`, notes the operations."""
    return _modes._is_in_torch_dispatch_mode and _torch_private.writes_graph()


def _in_graph_without_gradients(*tensors: Tensor | None) -> bool:
    return needs_grad(*tensors) and writes_graph()


def has_values(t: Tensor) -> bool:
    """Whether the values of a tensor are there to be read, and no graph is made of what is done to them."""
    if torch.compiler.is_compiling() or type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta:
        return False
    return _transforms() is None and not _is_jit_tracing() and not writes_graph()


def is_readable(t: Tensor) -> bool:
    """`has_values`, where it costs the host no waiting."""
    return t.is_cpu and has_values(t)


def is_capturing(t: Tensor) -> bool:
    """Whether the work on this tensor's GPU goes into a CUDA graph, where nobody may wait for a value."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a call on `tensors` has to record a gradient."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operator computes: float32 for the 16-bit types, the type itself otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
