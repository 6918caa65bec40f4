"""Logits that a model's forward has asked for and nobody has read yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import functional
from ..ops._arguments import autocast_dtype


class Logits:
    """Stands for ``head(hidden)``, and what a forward made of it, until someone needs the numbers.

    Factors, divisors and a tanh, which is what models have between their head and their loss, are noted; a cross
    entropy of the result then needs no logits. Any other use of this object computes them, by the head and the very
    operations that were noted, and goes on with that tensor.
    """

    requires_grad, is_leaf, layout = True, False, torch.strided

    def __init__(self, head: Callable, hidden: Tensor, weight: Any, bias: Tensor | None):
        self.head, self.hidden, self.weight, self.bias = head, hidden, weight, bias
        self.rows = hidden  # reshaped as the logits are
        self.shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
        self.device = hidden.device
        self.autocast = autocast_dtype(hidden.device)
        self.dtype = self.autocast or hidden.dtype
        # These logits are scale * z, or cap * tanh(scale * z), of the head's z.
        self.scale, self.cap = 1.0, None
        self.steps: tuple[Callable[[Tensor], Tensor], ...] = ()
        self.made: Tensor | None = None
        self.sources = [(t, t._version) for t in (hidden, *_tensors(weight), bias) if t is not None]

    def tensor(self) -> Tensor:
        """The logits, with their gradients. They are computed once.

        Raises:
            RuntimeError: the head's weight was written to since, so that these logits are lost.
        """
        if self.made is None:
            if any(t._version != version for t, version in self.sources) or not self._has_its_weight():
                raise RuntimeError("bigkernels.patch: a model in training does not compute its logits, and now its head"
                                   " has other weights: read `logits` before they change, or "
                                   "patch(model, loss=False)")  # fmt: skip
            kind, lowered = self.device.type, self.autocast
            known = torch.amp.is_autocast_available(kind)
            cast = torch.autocast(kind, lowered, lowered is not None) if known else nullcontext()
            with torch.enable_grad(), cast:
                z = self.head(self.hidden)
                for step in self.steps:
                    z = step(z)
            self.made = z
        return self.made

    def _has_its_weight(self) -> bool:
        now = getattr(self.head, "weight", None)
        return not isinstance(self.weight, Tensor) or now is self.weight

    def cross_entropy(self, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
        """As `bigkernels.functional.cross_entropy` of these logits, in float32."""
        scale = self.scale if self.cap is None else self.scale * self.cap
        return functional.linear_cross_entropy(self.rows, self.weight, target, self.bias, class_weight=weight,
                                               softcap=self.cap, logit_scale=scale, **options)  # fmt: skip

    # ---- what is noted ----

    def _then(self, step: Callable[[Tensor], Tensor], **changes: Any) -> Any:
        if self.made is not None:
            return step(self.made)
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, steps=(*self.steps, step), **changes)
        return new

    def __mul__(self, factor: Any) -> Any:
        def step(z):
            return z * factor

        if type(factor) not in (int, float) or not math.isfinite(factor):
            return step(self.tensor())
        if self.cap is None:
            return self._then(step, scale=self.scale * factor)
        return self._then(step, cap=self.cap * factor) if factor > 0 else step(self.tensor())

    __rmul__ = mul = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        def step(z):
            return z / divisor

        if type(divisor) not in (int, float) or not divisor or not math.isfinite(divisor):
            return step(self.tensor())
        if self.cap is None:
            return self._then(step, scale=self.scale / divisor)
        return self._then(step, cap=self.cap / divisor) if divisor > 0 else step(self.tensor())

    def div(self, divisor: Any, *args: Any, **kwargs: Any) -> Any:
        return self.tensor().div(divisor, *args, **kwargs) if args or kwargs else self / divisor

    def tanh(self) -> Any:
        return self._then(torch.tanh, cap=1.0) if self.cap is None else self.tensor().tanh()

    def float(self) -> Any:
        return self._then(Tensor.float, dtype=torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and args in ((torch.float32,), (self.device,)):
            return self.float() if args == (torch.float32,) else self
        return self.tensor().to(*args, **kwargs)

    def contiguous(self) -> Any:
        return self

    def reshape(self, *shape: Any) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        vocabulary = self.shape[-1]
        if self.made is not None or sizes not in ((-1, vocabulary), (self.numel() // vocabulary, vocabulary)):
            return self.tensor().reshape(*shape)
        rows = self.rows.reshape(-1, self.rows.shape[-1])
        return self._then(lambda z: z.reshape(-1, vocabulary), rows=rows, shape=torch.Size((rows.shape[0], vocabulary)))

    view = reshape

    # ---- what is known ----

    def dim(self) -> int:
        return len(self.shape)

    ndim = property(dim)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return repr(self.made) if self.made is not None else f"Logits({tuple(self.shape)}, not computed)"

    # ---- everything else computes ----

    def __getattr__(self, name: str) -> Any:
        if "made" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.tensor().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        args, kwargs = tree_map_only(Logits, lambda z: z.tensor(), (args, kwargs or {}))
        return function(*args, **kwargs)


def _forwarded(name: str) -> Callable:
    def method(self: Logits, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*(a.tensor() if isinstance(a, Logits) else a for a in args))

    method.__name__ = name
    return method


# Operators are looked up in the class, where __getattr__ is not asked.
for _name in """add radd sub rsub rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul neg pos abs invert and
                rand or ror xor rxor lt le gt ge eq ne getitem setitem contains iter reversed bool int float index
                complex array dlpack dlpack_device""".split():  # fmt: skip
    setattr(Logits, f"__{_name}__", _forwarded(f"__{_name}__"))
Logits.__hash__ = object.__hash__


def settled(logits: Any) -> Any:
    """The tensor of logits that have been computed; what is given where that is something else."""
    return logits.made if isinstance(logits, Logits) and logits.made is not None else logits


def _tensors(weight: Any) -> list[Tensor]:
    return [weight] if isinstance(weight, Tensor) else list(weight.tensors.values())
