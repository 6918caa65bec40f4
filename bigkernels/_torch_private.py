"""All that the package needs of torch without a public name, looked up once, on import.

A name that a release of torch takes away switches off what needs it, and a warning says which and why: without names of
"kernels" every operator runs as its reference; `apply_checkpointing`, `plan` and the others raise RuntimeError
(`require`). Nothing goes on in silence without it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

_absent: dict[str, list[str]] = {}  # names by the feature that is off without them


def lacks(feature: str) -> str | None:
    """What this torch does not have of what a feature needs, in words; None where it has all of it."""
    names = _absent.get(feature)
    return f"torch {torch.__version__} has no {', '.join(names)}" if names else None


def require(feature: str, caller: str) -> None:
    """Raise RuntimeError where a feature is off."""
    missing = lacks(feature)
    if missing:
        raise RuntimeError(f"bigkernels.{caller}: {missing} (needed for {feature})")


def _found(path: str) -> Any:
    """What a dotted path names, or None."""
    value: Any = torch
    parts = path.split(".")
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return None
        value = getattr(value, part, None)
    return value


def _take(path: str, feature: str, instead: Any = None) -> Any:
    """torch's `path`; where it is gone, `instead`, and the feature is off."""
    value = _found(path)
    if value is None:
        _absent.setdefault(feature, []).append(path)
        return instead
    return value


def _take_variable(path: str, feature: str, value: Any) -> ModuleType | SimpleNamespace:
    """The module that has a variable of this path, which is read at each call; or one in which it has `value`."""
    module, _, name = path.rpartition(".")
    found = _found(module)
    if found is not None and hasattr(found, name):
        return found
    _absent.setdefault(feature, []).append(path)
    return SimpleNamespace(**{name: value})


class _Never:
    """In the place of a class that this torch does not have: nothing is an instance."""


def _nothing(*args: Any) -> None:
    return None


def _none(*args: Any) -> int:
    return 0


KERNELS, CHECKPOINTING, PLANNING = "running kernels", "checkpointing", "planning"
LAZY, PROGRAMS, ALLOCATION = "tensors without values", "step programs", "allocating outputs of GPU kernels"
MATRIX_UNITS, COMPILER, NORMS = "8-bit products of torch's", "leaving out of compiled graphs", "clipping"
BENCH, TRACES, PREPARED = "measuring on GPUs", "seeing profilers", "launching GPU kernels past the dispatcher"

# ---- who looks at a call ---------------------------------------------------------------------------------------------

transforms = _take("torch._C._functorch.peek_interpreter_stack", KERNELS, _nothing)  # None outside of torch.func
is_transformed = _take("torch._C._functorch.is_functorch_wrapped_tensor", KERNELS, _none)
is_batched = _take("torch._C._functorch.is_legacy_batchedtensor", KERNELS, _none)  # what `is_grads_batched` makes
is_jit_tracing = _take("torch._C._is_tracing", KERNELS, _none)
forward_ad = _take_variable("torch.autograd.forward_ad._current_level", KERNELS, -1)
dispatch_flag = _take_variable("torch.utils._python_dispatch._is_in_torch_dispatch_mode", KERNELS, False)
dispatch_modes = _take("torch._C._len_torch_dispatch_stack", KERNELS, _none)
dispatch_modes_above_autograd = _take("torch._ops._len_torch_dispatch_stack_pre_dispatch", KERNELS, _none)
function_modes = _take("torch._C._len_torch_function_stack", KERNELS, _none)
autocast_anywhere = _take("torch._C._is_any_autocast_enabled", KERNELS, _none)
_dispatch_mode = _take("torch._C._get_dispatch_mode", KERNELS, _nothing)
_dispatch_mode_above_autograd = _take("torch._ops._get_dispatch_mode_pre_dispatch", KERNELS, _nothing)
_PROXY = _take("torch._C._TorchDispatchModeKey.PROXY", KERNELS)
_FAKE = _take("torch._C._TorchDispatchModeKey.FAKE", KERNELS)
# The public one cannot be traced by the compiler.
flash_sdp_enabled = _found("torch._C._get_flash_sdp_enabled") or torch.backends.cuda.flash_sdp_enabled
is_traceable_wrapper_subclass = _take("torch.utils._python_dispatch.is_traceable_wrapper_subclass", KERNELS, _none)


def writes_graph() -> bool:
    """Whether `make_fx` or what is made of it, as `torch.export`, which notes what is above autograd, is active."""
    return _dispatch_mode(_PROXY) is not None or _dispatch_mode_above_autograd(_PROXY) is not None


def in_fake_mode() -> bool:
    return _dispatch_mode(_FAKE) is not None


def in_proxy_mode() -> bool:
    return _dispatch_mode(_PROXY) is not None


# ---- subclasses and modes of our own ---------------------------------------------------------------------------------

without_functions = _take("torch._C.DisableTorchFunction", CHECKPOINTING)  # subclasses and modes
without_subclass_functions = _take("torch._C.DisableTorchFunctionSubclass", LAZY)
no_function = _take("torch._C._disabled_torch_function_impl", LAZY)
without_modes = _take("torch.utils._python_dispatch._disable_current_modes", LAZY)
without_dispatch_modes = _take("torch._C._DisableTorchDispatch", CHECKPOINTING)
tree_flatten = _take("torch.utils._pytree.tree_flatten", LAZY)
tree_iter = _take("torch.utils._pytree.tree_iter", LAZY)
tree_map = _take("torch.utils._pytree.tree_map", LAZY)
tree_map_only = _take("torch.utils._pytree.tree_map_only", LAZY)
tree_unflatten = _take("torch.utils._pytree.tree_unflatten", LAZY)
_guard = _take("torch._C._SetExcludeDispatchKeyGuard", CHECKPOINTING)
_writes_key = _take("torch._C.DispatchKey.ADInplaceOrView", CHECKPOINTING)

if TYPE_CHECKING:  # classes
    from torch._ops import OpOverload as Overload
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    FakeTensor = _take("torch._subclasses.fake_tensor.FakeTensor", PLANNING, _Never)
    FakeTensorMode = _take("torch._subclasses.fake_tensor.FakeTensorMode", PLANNING)
    TorchDispatchMode = _take("torch.utils._python_dispatch.TorchDispatchMode", CHECKPOINTING, _Never)
    DataDependentOutputException = _take("torch._subclasses.fake_tensor.DataDependentOutputException", PLANNING, _Never)
    DynamicOutputShapeException = _take("torch._subclasses.fake_tensor.DynamicOutputShapeException", PLANNING, _Never)
    Overload = _take("torch._ops.OpOverload", KERNELS, _Never)

# ---- memory and autograd ---------------------------------------------------------------------------------------------

surrounding_hooks = _take(
    "torch._C._autograd._top_saved_tensors_default_hooks", CHECKPOINTING
)  # (pack, unpack) or None
below_autograd = _take("torch._C._AutoDispatchBelowAutograd", PREPARED, nullcontext)
backward_pass = _take("torch._C._current_graph_task_id", CHECKPOINTING)
storage_users = _take("torch._C._storage_Use_Count", PROGRAMS)
is_alias_of = _take("torch._C._is_alias_of", LAZY)
empty_cpu = _take("torch._C._dynamo.guards._empty_strided_cpu", ALLOCATION, torch.empty_strided)
empty_cuda = _take("torch._C._dynamo.guards._empty_strided_cuda", ALLOCATION, torch.empty_strided)
# A torch without CUDA lacks this one.
cuda_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

# ---- operators -------------------------------------------------------------------------------------------------------

int_mm = _take("torch._int_mm", MATRIX_UNITS)
scaled_mm = _take("torch._scaled_mm", MATRIX_UNITS)
foreach_mul_ = _take("torch._foreach_mul_", NORMS)
foreach_lerp_ = _take("torch._foreach_lerp_", BENCH)
scaled_dot_product_attention = _take("torch._C._nn.scaled_dot_product_attention", KERNELS)
is_profiled = _take("torch._C._autograd._profiler_enabled", TRACES, _none)
gpu_sleep = _take("torch.cuda._sleep", BENCH, _nothing)
disable_dynamo = _take("torch._compile._disable_dynamo", COMPILER, torch.compiler.disable)

CALL = "_call_impl"  # what a module's call goes through: `forward` and the hooks around it


def counting_writes():
    """A context below autograd in which tensors that are made count what is written to them, as outside of it."""
    return _guard(_writes_key, False)


@functools.cache
def calls_go_through_instances() -> bool:
    """Whether a module is called by what its own `__dict__` has under `CALL`, or else by its class's."""

    class Probe(nn.Module):
        def forward(self) -> str:
            return "class"

    probe = Probe()
    values = [probe()]
    probe.__dict__[CALL] = lambda: "instance"
    values.append(probe())
    return values == ["class", "instance"] and getattr(Probe, CALL, None) is getattr(nn.Module, CALL, 0)


def constant_to_the_compiler(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, which imports the compiler, and that imports triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


for _feature, _names in _absent.items():
    warnings.warn(f"bigkernels: {lacks(_feature)}; off without it: {_feature}", stacklevel=2)
