"""Tensors whose elements are computed when an operator reads them."""

# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_private import in_fake_mode, tree_map_only, without_modes, without_subclass_functions

_aten = torch.ops.aten
# What reads memory without an operator that could be seen.
_IN_MEMORY = {
    getattr(Tensor, name)
    for name in """numpy tolist data_ptr storage _typed_storage __array__
    __dlpack__ __dlpack_device__ share_memory_ is_shared pin_memory __reduce_ex__""".split()
}


_DEFAULTS = (None, False, torch.strided, torch.preserve_format, torch.contiguous_format)


class Values:
    """The elements behind lazy tensors that share memory, as views do."""

    def __init__(self, compute: Callable[[], Tensor] | None, made: Tensor | None = None):
        self.compute, self.made, self.lent = compute, made, False

    def get(self) -> Tensor:
        compute = self.compute
        if compute is not None:
            self.made = self.fresh()
            self.compute = None
        return self.made

    def fresh(self) -> Tensor:
        """The elements, which are kept by nobody if nobody has read them yet."""
        compute = self.compute
        if compute is None:
            return self.made
        with torch.no_grad():
            return compute().contiguous()


class Kind(NamedTuple):
    """What a lazy tensor is like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...] | None  # None is contiguous, and has no offset
    offset: int | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, z: Tensor, dtype: torch.dtype | None = None) -> Kind:
        """Contiguous, and else like z."""
        return cls(z.shape, None, None, dtype or z.dtype, z.device)


class Lazy(Tensor):
    """A dense tensor that has no memory before it is read.

    To autograd it is a tensor like any other: operators are recorded before they arrive here, where they run on the
    elements. Views, copies and casts of what nobody has read are lazy too, so that looking for an attribute computes
    nothing. A write goes to the elements that views share.
    """

    values: Values
    path: tuple[Callable[[Tensor], Tensor], ...]  # from the shared elements to this view of them

    @staticmethod
    def __new__(cls, values: Values, kind: Kind, path: tuple = ()) -> Lazy:
        shape, stride, offset, dtype, device = kind
        lazy = Tensor._make_wrapper_subclass(cls, shape, stride, offset, dtype=dtype, device=device)
        lazy.values, lazy.path = values, path
        return lazy

    def dense(self) -> Tensor:
        """The elements as an ordinary tensor without history, computed once."""
        return _follow(self.values.get(), self.path)

    @property
    def made(self) -> Tensor | None:
        """The shared elements, None before somebody reads them."""
        return self.values.made

    def tensor(self) -> Tensor:
        """An ordinary tensor of the same memory and with the same history."""
        self.values.get()  # before which a view would be lazy too
        return _aten.expand.default(self, self.shape)

    def _derived(self, function: Any, step: Callable, values: Values, kind: Kind, path: tuple) -> Lazy:
        """The result of a view, a copy or a cast, which is `step`; subclasses say what they know of it."""
        return Lazy(values, kind, path)

    def _later(self, function: Any, rest: tuple, keywords: dict[str, Any]) -> Lazy | None:
        """The lazy result of a view, a copy or a cast of what nobody has read; None for other operators."""
        view = _is_view(function)
        if not view and not _is_copy(function, self, keywords):
            return None
        kind = self._viewed(function, rest, keywords) if view else Kind.of(self, keywords.get("dtype"))
        if kind.dtype.is_complex:
            return None
        step = functools.partial(_run, function, rest, keywords)
        values, path = self.values, self.path  # and not the tensor, whose history would be kept
        if view:
            return self._derived(function, step, values, kind, (*path, step))
        return self._derived(function, step, Values(lambda: step(_follow(values.fresh(), path))), kind, ())

    def _viewed(self, function: Any, rest: tuple, keywords: dict[str, Any]) -> Kind:
        """As a tensor without memory has it, which is no business of a mode that counts memory."""
        with without_modes():
            result = function(_like(self), *rest, **keywords)
        return Kind(result.shape, result.stride(), result.storage_offset(), result.dtype, self.device)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Lazy) and args[0].made is None:
            later = args[0]._later(function, args[1:], kwargs)
            if later is not None:
                return later
        if torch.Tag.inplace_view in function.tags:
            raise RuntimeError(
                f"bigkernels.patch: {function} cannot change the shape of logits in place; take a view "
                "of them, or patch(model, loss=False)"
            )
        dense: dict[int, Lazy] = {}
        aliases = any(argument.alias_info is not None for argument in function._schema.arguments)

        def elements(lazy: Lazy) -> Tensor:
            values = lazy.dense()
            dense[id(values)] = lazy
            lazy.values.lent |= aliases  # written to, or a view that may be
            return values

        result = function(*tree_map_only(Lazy, elements, args), **tree_map_only(Lazy, elements, kwargs))
        return dense.get(id(result), result)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with without_subclass_functions():
            if function in _IN_MEMORY or (function is Tensor.untyped_storage and not _is_fake()):
                args, kwargs = tree_map_only(Lazy, Lazy.tensor, (args, kwargs or {}))
            return function(*args, **kwargs or {})

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.dense().detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        if not self.is_leaf:
            return super().__deepcopy__(memo)  # which raises, as for other tensors with a history
        return self.dense().detach().clone().requires_grad_(self.requires_grad)

    # For compilers, which trace tensors with tensors inside.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_elements"], None

    @property
    def _elements(self) -> Tensor:
        return self.dense()

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Lazy:
        elements = inner["_elements"]
        return Lazy(Values(None, elements), Kind.of(elements))


def _is_fake() -> bool:
    """Whether a compiler looks at tensors, which takes them apart by `__tensor_flatten__`."""
    return in_fake_mode()


def _follow(elements: Tensor, path: tuple[Callable[[Tensor], Tensor], ...]) -> Tensor:
    for step in path:
        elements = step(elements)
    return elements


def _run(function: Any, rest: tuple, keywords: dict[str, Any], x: Tensor) -> Tensor:
    return function(x, *rest, **keywords)


def _like(lazy: Lazy) -> Tensor:
    """A tensor of its shape, strides and offset without memory."""
    last = sum((n - 1) * s for n, s in zip(lazy.shape, lazy.stride(), strict=True)) if lazy.numel() else 0
    whole = torch.empty(lazy.storage_offset() + last + 1, dtype=lazy.dtype, device="meta")
    return whole.as_strided(lazy.shape, lazy.stride(), lazy.storage_offset())


@functools.cache
def _is_view(function: Any) -> bool:
    schema = function._schema
    of_first = schema.arguments[0].alias_info if schema.arguments else None
    return (
        of_first is not None
        and not of_first.is_write
        and len(schema.returns) == 1
        and schema.returns[0].alias_info is not None
        and str(schema.returns[0].type) == "Tensor"
    ) or function is _aten._unsafe_view.default


def _is_copy(function: Any, lazy: Lazy, keywords: dict[str, Any]) -> bool:
    if function not in (_aten.clone.default, _aten._to_copy.default) or not lazy.is_contiguous():
        return False
    asked = {name: value for name, value in keywords.items() if value not in _DEFAULTS and value != lazy.device}
    if function is _aten.clone.default:
        return not asked
    return set(asked) == {"dtype"} and asked["dtype"].is_floating_point
