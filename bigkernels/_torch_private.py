"""What the package needs of torch that has no public name; a test holds that each is there.

A name that a release of torch takes away fails here, on import, or at the call that says what is missing; nothing goes
on in silence without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch._C._dynamo.guards import _empty_strided_cpu as empty_cpu  # type: ignore[attr-defined]
from torch._C._dynamo.guards import _empty_strided_cuda as empty_cuda  # type: ignore[attr-defined]
from torch._compile import _disable_dynamo as disable_dynamo
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_iter, tree_map, tree_unflatten

__all__ = [
    "CALL",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "autocast_anywhere",
    "backward_pass",
    "below_autograd",
    "calls_go_through_instances",
    "counting_writes",
    "cuda_device",
    "disable_dynamo",
    "dispatch_modes",
    "empty_cpu",
    "empty_cuda",
    "function_modes",
    "is_jit_tracing",
    "is_profiled",
    "is_traceable_wrapper_subclass",
    "is_transformed",
    "storage_users",
    "surrounding_hooks",
    "transforms",
    "tree_flatten",
    "tree_iter",
    "tree_map",
    "tree_unflatten",
    "without_dispatch_modes",
    "without_functions",
]

transforms = torch._C._functorch.peek_interpreter_stack  # None outside of torch.func
surrounding_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # (pack, unpack) or None
backward_pass = torch._C._current_graph_task_id
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
autocast_anywhere = torch._C._is_any_autocast_enabled
is_jit_tracing = torch._C._is_tracing
is_profiled = torch._C._autograd._profiler_enabled
below_autograd = torch._C._AutoDispatchBelowAutograd
without_dispatch_modes = torch._C._DisableTorchDispatch
storage_users = torch._C._storage_Use_Count
without_functions = torch._C.DisableTorchFunction  # subclasses and modes
is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
cuda_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)  # a torch without CUDA lacks the first
CALL = "_call_impl"  # what a module's call goes through: `forward` and the hooks around it


def counting_writes():
    """A context below autograd in which tensors that are made count what is written to them, as outside of it."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)


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
