"""Segments under a policy: as calls, as a context, and as the blocks of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad
from torch.autograd.graph import saved_tensors_hooks

from .._torch_private import CHECKPOINTING, disable_dynamo, require, transforms, tree_flatten
from ._policy import Policy, Selection, resolve_policy
from ._recompute import Segment, within_segment
from ._saver import Saver, is_parameter
from ._select import ATTENTION, PRODUCTS, Plan, Results

_plans: WeakKeyDictionary[Any, dict[Selection, Plan]] = WeakKeyDictionary()


def checkpoint(fn: Callable, *args: Any, policy: str | Policy = "recompute", **kwargs: Any) -> Any:
    """``fn(*args, **kwargs)``, with less kept for backward.

    As `torch.utils.checkpoint.checkpoint` without reentrance: any arguments and results, segments within segments,
    inputs and parameters with and without gradients, autocast and the random number generators as they were, and no
    work after the last tensor that backward needs. Buffers of modules that `fn` is, is of, is given or closes over move
    once, and `fn` runs again with what they were: statistics of batch norms, power iterations. `fn` must do the same
    each time. With "recompute", "selective" and "offload"
    the gradients are, bit for bit, those of a plain call.

    Args:
        policy: how activations are saved: a name, names with "+" between them, or a policy of
            `bigkernels.checkpointing`.

            "recompute": not at all; backward runs `fn` again.
            "selective": results of attention and of matrix products; backward runs the rest of `fn` again.
            "int8", "fp8": all of them in 8 bits, or the way to compute them from others that are; as they are where
            backward divides by them or compares them (`log`, `sqrt`, quotients, `amax`, `clamp`), with what such a
            quotient was made of element by element.
            "offload": in host memory, or files.

            "recompute+offload" moves the inputs of `fn`, "int8+offload" moves half as much as "offload".

    Raises:
        TypeError, ValueError: there is no such policy, or its parts contradict.
        CheckpointError: in backward, `fn` does something else when it runs again.
    """
    require(CHECKPOINTING, "checkpoint")
    return run(fn, args, kwargs, resolve_policy(policy), None)


@contextmanager
def saved_activations(policy: str | Policy = "int8") -> Iterator[None]:
    """Whatever autograd saves inside the `with` block is saved under a policy that runs nothing again: "int8", "fp8",
    "offload", or "int8+offload".

    Raises:
        TypeError, ValueError: there is no such policy, or it recomputes, which needs a function to run again.
    """
    require(CHECKPOINTING, "saved_activations")
    policy = resolve_policy(policy)
    if policy.keep not in (None, "all"):
        raise ValueError(
            "bigkernels.saved_activations: a policy that recomputes needs a function to run again; use "
            "bigkernels.checkpoint"
        )
    with _saving(policy, ()):
        yield


@contextmanager
def _saving(policy: Policy, values: tuple) -> Iterator[None]:
    if (policy.code is None and policy.place is None) or within_segment():
        yield
        return
    saver = Saver(policy, _constants(values))
    with saved_tensors_hooks(saver.pack, saver.unpack), saver.watching():
        try:
            yield
        finally:
            saver.close()


def _constants(values: tuple) -> list[Tensor]:
    return [t for t in tree_flatten(values)[0] if isinstance(t, Tensor) and not t.requires_grad]


def run(fn: Callable, args: tuple, kwargs: dict, policy: Policy, plan: Plan | None) -> Any:
    """A segment. `plan`: what earlier runs of it have taught about what to keep."""
    if not torch.is_grad_enabled():
        return fn(*args, **kwargs)
    if torch.compiler.is_dynamo_compiling():  # before what follows, which it would find true
        return _compiled(fn, args, kwargs, policy)
    if transforms() is not None or _forward_ad._current_level >= 0:
        return fn(*args, **kwargs)
    return _eager(fn, args, kwargs, policy, plan)


def _eager(fn: Callable, args: tuple, kwargs: dict, policy: Policy, plan: Plan | None) -> Any:
    if policy.keep in (None, "all"):
        with _saving(policy, (args, kwargs)):
            return fn(*args, **kwargs)
    if within_segment():  # it will run again, and what is kept here would not be given up
        return Segment(fn).run(args, kwargs)
    stores = policy.code is not None or policy.place is not None
    if policy.keep == "nothing":
        hooks = None
        if stores:
            saver = Saver(policy, _constants((args, kwargs)))
            hooks = saver.pack, saver.unpack
        return Segment(fn, hooks).run(args, kwargs)
    assert isinstance(policy.keep, Selection)
    results = Results(plan or _plan_of(fn, policy.keep), Saver(policy) if stores else None)
    if results.plan.measures:
        inputs = (t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.requires_grad)
        results.input_bytes = sum(t.nbytes for t in inputs if not is_parameter(t))
    return Segment(fn, None, results.forward, results.recompute, results.watch).run(args, kwargs)


def _plan_of(fn: Callable, selection: Selection) -> Plan:
    """What earlier calls have taught: of the same code, as a lambda is another each time, or the same module."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    key = getattr(fn, "__code__", fn)
    try:
        return _plans.setdefault(key, {}).setdefault(selection, Plan(selection))
    except TypeError:  # it takes no weak reference, or has no hash
        return Plan(selection)


def _compiled(fn: Callable, args: tuple, kwargs: dict, policy: Policy) -> Any:
    """The compiler knows torch's checkpoints, and partitions by them; of ours it takes what says the same."""
    from torch.utils.checkpoint import checkpoint as torchs

    if policy.code is not None or policy.place is not None or policy.keep in (None, "all"):
        return disable_dynamo(_eager)(fn, args, kwargs, policy, None)
    if policy.keep == "nothing":
        return torchs(fn, *args, use_reentrant=False, **kwargs)
    assert isinstance(policy.keep, Selection)
    return torchs(fn, *args, use_reentrant=False, context_fn=_contexts(policy.keep), **kwargs)


def _contexts(selection: Selection) -> Callable:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    names = ATTENTION | PRODUCTS if selection.operators is None else selection.operators

    def choose(ctx, op, *args, **kwargs):
        keep = op._schema.name in names
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, choose)
