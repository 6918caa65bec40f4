"""What ``layer.weight`` is of a layer that holds no such tensor."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch_private import is_alias_of, tree_flatten, tree_map, without_subclass_functions

_T = Tensor
# Answered without values.
_DESCRIBED = {
    _T.shape.__get__, _T.dtype.__get__, _T.device.__get__, _T.layout.__get__, _T.ndim.__get__, _T.grad.__get__,
    _T.grad_fn.__get__, _T.is_leaf.__get__, _T.is_cpu.__get__, _T.is_cuda.__get__, _T.is_meta.__get__,
    _T.is_sparse.__get__, _T.is_quantized.__get__, _T.is_nested.__get__, _T.itemsize.__get__, _T.nbytes.__get__,
    _T._version.__get__, _T.size, _T.dim, _T.numel, _T.nelement, _T.element_size, _T.stride,
    _T.storage_offset, _T.is_contiguous, _T.is_floating_point, _T.is_complex, _T.is_inference, _T.get_device,
    _T.ndimension, _T.__len__, _T.__hash__, torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.numel,
    torch.is_inference,
}  # fmt: skip
_REQUIRES_GRAD = _T.requires_grad.__get__
_FREEZING = {_T.requires_grad_, _T.requires_grad.__set__}
_SAME = {_T.data.__get__, _T.detach, torch.detach}
# Whoever has the memory could write to it.
_MEMORY = {
    "data_ptr",
    "untyped_storage",
    "storage",
    "_typed_storage",
    "__dlpack__",
    "__dlpack_device__",
    "__cuda_array_interface__",
    "is_set_to",
    "is_shared",
    "is_pinned",
}
_WRITING = {
    "__setitem__",
    "__set__",
    "__delete__",
    *(f"__i{name}__" for name in ("add sub mul div truediv floordiv mod pow and or xor lshift rshift matmul".split())),
}


class LazyWeight(Tensor):
    """Shape, dtype and device of a weight; its values are computed when an operator reads them, and not kept.

    Reading it is reading a tensor. What is written to it, or to a view of it, would be lost, and raises. Where it is
    computed from parameters that are trained, gradients reach these.

    Args:
        make: gives the values, in this dtype and on this device.
        stride, offset: of the values; those of a contiguous tensor by default.
        owner: the module whose weight it is.
        linear: of (x, bias), what `torch.nn.functional.linear` computes from the values; None to read them.
        trained: whether gradients go through `make`.
    """

    _is_hf_initialized = True  # transformers leaves it alone where it fills weights that no file had
    _is_param = True  # `isinstance(layer.weight, nn.Parameter)`, which is asked before weights are tied

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], Tensor],
        *,
        stride: tuple[int, ...] | None = None,
        offset: int | None = None,
        owner: nn.Module | None = None,
        linear: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        trained: bool = False,
    ) -> LazyWeight:
        lazy = Tensor._make_wrapper_subclass(
            cls, shape, strides=stride, storage_offset=offset, dtype=dtype, device=device
        )
        lazy._make, lazy._owner, lazy._linear, lazy._trained = make, owner, linear, trained
        return lazy

    @classmethod
    def _of(cls, values: Tensor) -> LazyWeight:
        """A view of a weight: it may be read and not written."""
        lazy = cls(
            values.shape,
            values.dtype,
            values.device,
            lambda: values,
            stride=values.stride(),
            offset=values.storage_offset(),
            trained=values.requires_grad,
        )
        lazy._is_param = False
        return lazy

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _DESCRIBED:
            with without_subclass_functions():
                return func(*args, **kwargs)
        if func == _REQUIRES_GRAD:
            return args[0]._trained
        if func in _SAME and isinstance(args[0], cls):
            return args[0]._detached()
        if func in _FREEZING and not (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
            return args[0]
        if func is F.linear and not isinstance(args[0], cls) and len(args) > 1 and getattr(args[1], "_linear", None):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return args[1]._linear(args[0], bias)
        return _run(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0]._detached()
        if func._schema.is_mutable and isinstance(args[0], cls):  # what does not pass `__torch_function__`, as `set_`
            _refuse(func)
        flat, _ = tree_flatten((args, kwargs))
        if torch.is_grad_enabled() and any(isinstance(t, cls) and t._trained for t in flat):
            raise RuntimeError(
                f"bigkernels: {func} reads a weight that is computed from trained parameters where "
                "gradients cannot follow"
            )
        return _run(func, args, kwargs)

    def _detached(self) -> LazyWeight:
        make = (lambda: self._make().detach()) if self._trained else self._make
        lazy = LazyWeight(
            self.shape,
            self.dtype,
            self.device,
            make,
            stride=self.stride(),
            offset=self.storage_offset(),
            owner=self._owner,
            linear=None if self._trained else self._linear,
        )
        lazy._is_param = self._is_param
        return lazy


def _run(func: Callable, args: tuple, kwargs: dict) -> Any:
    name = getattr(func, "__name__", "")
    written = (name.endswith("_") and not name.endswith("__")) or name in _WRITING
    if written and args and isinstance(args[0], LazyWeight):
        _refuse(func)
    if name in _MEMORY:
        raise RuntimeError(
            f"bigkernels: {name} of a weight that has no memory of its own: it is computed when it is "
            "read; copy it first (weight.clone())"
        )
    read: list[Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, LazyWeight):
            read.append(_values(value))
            return read[-1]
        return value

    args, kwargs = tree_map(plain, (tuple(args), kwargs))
    before = [None if t.is_inference() else t._version for t in read]
    out = func(*args, **kwargs)
    if any(version is not None and version != t._version for version, t in zip(before, read, strict=True)):
        _refuse(func)

    def guarded(value: Any) -> Any:
        if isinstance(value, Tensor) and any(value is t or is_alias_of(value, t) for t in read):
            return LazyWeight._of(value)
        return value

    if isinstance(out, Iterator):
        return iter([guarded(value) for value in out])
    if type(out).__module__ == "numpy" and hasattr(out, "flags"):
        out.flags.writeable = False
    return tree_map(guarded, out)


def _values(weight: LazyWeight) -> Tensor:
    if not torch.is_inference_mode_enabled():
        return weight._make()
    with torch.inference_mode(False), torch.no_grad():  # writes to tensors made in inference mode are not counted
        return weight._make()


def _refuse(func: Callable) -> None:
    raise RuntimeError(
        f"bigkernels: {getattr(func, '__name__', func)} would write to a weight that is computed when it is read, and "
        "be lost. Bring the layer back first: bigkernels.dequantize(model), or `merge` of an adapter"
    )
