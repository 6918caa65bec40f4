"""One call of a model, recorded: which function made which tensor from which.

Everything that depends on the tokens is computed in float64, so that what a piece of the model computes can be told
from numbers; everything else (parameters, angles, masks, constants) as the model does, in its own dtypes, and is cast
where it meets such a tensor. No weight is copied: each is cast where it is used. To the model's code, a tensor seems to
have the dtype that it would have had.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch_private import is_transformed, without_functions
from ._layers import product


class Refused(Exception):
    """Why a model has no program; `step` is where it was noticed, if it was in a recorded call."""

    def __init__(self, reason: str, step: int | None = None):
        super().__init__(reason)
        self.step = step


class Ref(NamedTuple):
    """Output `number` of a step."""

    step: int
    number: int


@dataclass
class Step:
    """A call of `func`; tensors among `args` and `kwargs` that a step made are Refs there."""

    func: Callable
    args: tuple
    kwargs: dict
    outs: tuple[Tensor, ...]
    depends: bool  # on the tokens
    inputs: tuple[Ref, ...]  # those of them that depend on the tokens
    path: str
    module: nn.Module | None = None  # a leaf's
    number: int = -1

    @property
    def name(self) -> str:
        return getattr(self.func, "__name__", str(self.func))


@dataclass
class ModuleCall:
    """Steps [begin, end) were made by a call of a module."""

    module: nn.Module
    path: str
    args: tuple
    kwargs: dict
    begin: int
    end: int = -1
    outs: tuple[Any, ...] = ()


def floating(t: Any) -> bool:
    return isinstance(t, Tensor) and (t.dtype.is_floating_point or t.dtype.is_complex)


def exact(value: Any) -> Any:
    """The same in float64: a tensor, or a dtype."""
    if isinstance(value, Tensor):
        if value.dtype.is_complex:
            return value.to(torch.complex128)
        return value.double() if value.dtype.is_floating_point else value
    if isinstance(value, torch.dtype):
        return torch.complex128 if value.is_complex else torch.float64 if value.is_floating_point else value
    return value


def mapped(function: Callable, value: Any) -> Any:
    """A structure of tuples, lists, dicts and slices with function(leaf) for each leaf."""
    if type(value) in _LEAVES:
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [mapped(function, v) for v in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items) if type(value) in (tuple, list, torch.Size) else tuple(items)
    if isinstance(value, dict):
        return {k: mapped(function, v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(function, v) for v in (value.start, value.stop, value.step)))
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    found: list[Any] = []
    _collect(value, found)
    return iter(found)


def _collect(value: Any, found: list[Any]) -> None:
    kind = type(value)
    if kind in _LEAVES:
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for v in value:
            _collect(v, found)
    elif isinstance(value, dict):
        for v in value.values():
            _collect(v, found)
    elif kind is slice:
        found += (value.start, value.stop, value.step)
    else:
        found.append(value)


_LEAVES = {Ref, Tensor, nn.Parameter, int, float, bool, str, type(None), torch.dtype, torch.device}


_CASTS = {"float", "double", "half", "bfloat16", "to", "type", "type_as"}
# `empty_like` and `new_empty` are none of these: what is written to them, in parts, is of the tokens.
_LIKE = {
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_tensor",
}
_PICKS = {"embedding", "index_select", "gather"}  # rows of a table, which need not be cast whole
_READS = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "numpy",
    "__len__",
    "__contains__",
    "is_nonzero",
    "equal",
    "allclose",
}
_QUIET = {"size", "stride", "dim", "numel", "__len__", "is_contiguous", "element_size", "data_ptr", "is_floating_point",
          "is_complex", "get_device", "ndimension", "nelement", "__hash__", "storage_offset", "__repr__", "__format__",
          "is_signed", "untyped_storage"}  # fmt: skip


class Recorder(TorchFunctionMode):
    """Records what a model computes from what it is given."""

    def __init__(self):
        super().__init__()
        self.steps: list[Step] = []
        self.calls: list[ModuleCall] = []
        self.where: dict[int, Ref] = {}  # by id of a tensor, which `alive` keeps
        self.alive: list[Tensor] = []
        self.seeming: dict[int, torch.dtype] = {}  # of tensors that depend on the tokens
        self.stack: list[ModuleCall] = []
        self.changed: set[int] = set()  # storages that a step wrote to
        self.reads: str | None = None  # where the model's code looked at a number that depends on the tokens
        self.inside = 0  # calls of leaves

    def give(self, t: Tensor, seeming: torch.dtype | None = None) -> None:
        """`t`, token numbers or what is computed from them, is what the record is about."""
        self._note(_same, (), {}, (t,), True, ())
        if seeming is not None:
            self.seeming[id(t)] = seeming

    # ---- what is called by the model -----------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        if name in _QUIET or name == "__set__":
            return func(*args, **kwargs)
        tensors = [v for v in leaves((args, kwargs)) if isinstance(v, Tensor)]
        if any(is_transformed(t) for t in tensors):
            return func(*args, **kwargs)
        depends = any(self._depends(t) for t in tensors)
        if depends and name in _READS:
            if not self.inside and not (name == "__contains__" and not floating(args[0])):  # a warning about padding
                self.reads = self.reads or self.path
            return func(*args, **kwargs)
        if depends and name in _LIKE:
            depends = False
        if depends and name in ("type_as", "to", "expand_as", "view_as", "reshape_as") and not self._depends(args[0]):
            return self._like(func, name, args, kwargs)
        if not depends:
            return self._plainly(func, args, kwargs)
        if name in _CASTS and self._is_cast(name, args, kwargs):
            return self._cast(func, args, kwargs)
        return self._exactly(func, name, args, kwargs, tensors)

    def _attribute(self, func, args):
        out = func(*args)
        if func == torch.Tensor.dtype.__get__:
            return self.seeming.get(id(args[0]), out)
        if isinstance(out, Tensor) and out is not args[0]:
            refs = self._refs(args)
            self._note(func, args, {}, (out,), bool(refs), refs)
            if refs:
                self.seeming[id(out)] = self.seeming.get(id(args[0]), out.dtype)
        return out

    def _plainly(self, func, args, kwargs):
        args, kwargs = mapped(self._seen, args), mapped(self._seen, kwargs)
        out = func(*args, **kwargs)
        outs = tuple(t for t in leaves(out) if isinstance(t, Tensor))
        if outs:
            self._note(func, args, kwargs, outs, False, ())
        return out

    def _seen(self, value):
        """A number that depends on the tokens, as it would be; where only its shape and dtype are asked for."""
        if isinstance(value, Tensor) and id(value) in self.seeming:
            return value.to(self.seeming[id(value)])
        return value

    def _like(self, func, name, args, kwargs):
        other = args[1] if len(args) > 1 else next(iter(kwargs.values()), None)
        if name == "to" and not (isinstance(other, Tensor) and self._depends(other)):
            return self._plainly(func, args, kwargs)
        if name in ("to", "type_as"):
            return self._plainly(torch.Tensor.to, (args[0], self.seeming.get(id(other), other.dtype)), {})
        return self._plainly(
            {"expand_as": Tensor.expand, "view_as": Tensor.view, "reshape_as": Tensor.reshape}[name],
            (args[0], other.shape),
            {},
        )

    def _is_cast(self, name, args, kwargs) -> bool:
        if name == "type" and len(args) == 1 and not kwargs:
            return False
        if name in ("to", "type"):
            target = [v for v in leaves((args[1:], kwargs)) if isinstance(v, (torch.dtype, Tensor))]
            dtype = target[0] if target and isinstance(target[0], torch.dtype) else None
            if dtype is not None and not dtype.is_floating_point:
                return False
        return floating(args[0]) and not args[0].dtype.is_complex

    def _cast(self, func, args, kwargs):
        """A step of its own, so that the tensor may seem to have another dtype."""
        with without_functions():
            small = torch.empty(0, dtype=self.seeming.get(id(args[0]), args[0].dtype), device=args[0].device)
            rest = mapped(self._seen, (args[1:], kwargs))
            seeming = func(small, *rest[0], **rest[1]).dtype
            out = args[0].view(args[0].shape) if args[0].is_contiguous() else args[0].expand(args[0].shape)
        refs = self._refs((args[0],))
        self._note(_same, (args[0],), {}, (out,), True, refs)
        self.seeming[id(out)] = seeming
        return out

    def _exactly(self, func, name, args, kwargs, tensors):
        refs = self._refs((args, kwargs))
        seeming = [self.seeming.get(id(t), t.dtype) for t in tensors if floating(t)]
        asked = [v for v in leaves((args, kwargs)) if isinstance(v, torch.dtype)]
        raw = args, kwargs
        inplace = name.endswith("_") and not name.endswith("__") or name in ("__setitem__", *_IN_PLACE)
        if inplace and floating(args[0]) and not self._depends(args[0]):
            args[0].data = exact(args[0].data)
        numbers = any(floating(t) for t in tensors if self._depends(t))
        if numbers or name not in _PICKS or kwargs.get("max_norm") is not None:
            args, kwargs = mapped(exact, args), mapped(exact, kwargs)
        out = _run(func, args, kwargs)
        outs = (args[0],) if name == "__setitem__" else tuple(t for t in leaves(out) if isinstance(t, Tensor))
        if not outs:
            return out
        if out is not None and not numbers:
            # From token numbers to numbers: in the model's own dtype so far.
            cast = {id(t): exact(t) for t in outs if floating(t)}
            out = mapped(lambda t: cast.get(id(t), t), out)
            outs = tuple(cast.get(id(t), t) for t in outs)
        if inplace:
            self.changed.add(outs[0].untyped_storage().data_ptr())
        self._note(func, *raw, outs, True, refs)
        for t in outs:
            if floating(t) and not (inplace and id(t) in self.seeming):
                kinds = [a for a in asked if a.is_floating_point or a.is_complex]
                if kinds:
                    self.seeming[id(t)] = kinds[0]
                elif seeming:
                    dtype = seeming[0]
                    for s in seeming[1:]:
                        dtype = torch.promote_types(dtype, s)
                    self.seeming[id(t)] = dtype
        return out

    # ---- notes -------------------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        return self.stack[-1].path if self.stack else ""

    def _depends(self, t: Tensor) -> bool:
        ref = self.where.get(id(t))
        return ref is not None and self.steps[ref.step].depends

    def _refs(self, value: Any) -> tuple[Ref, ...]:
        refs = {self.where[id(t)]: None for t in leaves(value) if isinstance(t, Tensor) and self._depends(t)}
        return tuple(refs)

    def ref(self, t: Any) -> Any:
        return self.where.get(id(t), t) if isinstance(t, Tensor) else t

    def _note(self, func, args, kwargs, outs, depends, inputs, module=None) -> None:
        step = Step(
            func,
            mapped(self.ref, args),
            mapped(self.ref, kwargs),
            tuple(outs),
            depends,
            tuple(inputs),
            self.path,
            module,
            len(self.steps),
        )
        number = len(self.steps)
        self.steps.append(step)
        for i, t in enumerate(outs):
            self.alive.append(t)
            self.where[id(t)] = Ref(number, i)

    def leaf(self, function: Callable, args: tuple, kwargs: dict, module: nn.Module | None, quiet: bool) -> Any:
        """A call that is one step, whatever happens inside. `quiet`: in which nothing has to be watched."""
        refs = self._refs((args, kwargs))
        if quiet:
            with without_functions():
                out = function(*args, **kwargs)
        else:
            self.inside += 1
            try:
                out = function(*args, **kwargs)
            finally:
                self.inside -= 1
        seen = {id(t) for t in leaves((args, kwargs)) if isinstance(t, Tensor)}
        with without_functions():
            swap = {id(t): t.view(t.shape) for t in leaves(out) if id(t) in seen}  # what is handed through
        if swap:
            out = mapped(lambda t: swap.get(id(t), t), out)
        outs = [t for t in leaves(out) if isinstance(t, Tensor)]
        self._note(function, args, kwargs, outs, bool(refs), refs, module)
        if refs:
            given = next((self.seeming[id(t)] for t in leaves((args, kwargs)) if id(t) in self.seeming), None)
            for t in outs:
                if floating(t) and given is not None:
                    self.seeming.setdefault(id(t), given)
        return out


_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__iand__", "__ior__"}


def _same(x):
    return x


def _run(func, args, kwargs):
    if func is torch.nn.functional.linear and not kwargs and all(isinstance(a, Tensor) or a is None for a in args):
        return product(*args)
    return func(*args, **kwargs)
