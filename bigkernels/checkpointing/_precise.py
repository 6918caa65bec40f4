"""Which saved tensors 8 bits would spoil: those of operators whose backward divides by them or compares them.

A hook sees a tensor and not who saves it. A dispatch mode sees each operator after its inputs and before its results
were saved, so what hooks were given is held until the operators that follow are known, and only then put into codes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._torch_private import Overload, TorchDispatchMode, dispatch_modes, without_dispatch_modes

_HELD = 6  # operators: as far back as a quotient is looked for the functions that it is made of
_STATISTICS = 16  # a divisor this many times smaller than the dividend is a statistic of rows


_NONE: frozenset[int] = frozenset()


class Kind(Enum):
    """What an operator's backward does with what it has saved."""

    PLAIN = 0  # multiplies it: an error of a step is an error of a step
    COMPARES = 1  # with another value
    DIVIDES = 2  # by it, or takes its logarithm: what multiplies the quotient has to be as exact


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMPARES = _names("""
    amax amin max min aminmax median nanmedian maximum minimum fmax fmin clamp clamp_min clamp_max clip hardtanh
    threshold hardshrink softshrink hardsigmoid hardswish copysign fmod remainder floor_divide multi_margin_loss
    multilabel_margin_loss_forward mkldnn_max_pool2d mkldnn_max_pool3d max_pool2d max_pool3d index_reduce
    scatter_reduce _segment_reduce segment_reduce masked_scatter grid_sampler_2d grid_sampler_3d
    _grid_sampler_2d_cpu_fallback cudnn_grid_sampler affine_grid_generator
""")
_DIVIDES = _names("""
    div true_divide addcdiv log log2 log10 log1p sqrt rsqrt reciprocal acos asin acosh atanh atan2 hypot erfinv
    logit special_erfcx special_ndtri special_log_ndtri special_entr xlogy special_xlogy special_xlog1py
    special_zeta sinc lgamma digamma polygamma mvlgamma igamma igammac special_i1 special_i1e prod cumprod std
    std_mean norm linalg_vector_norm frobenius_norm nuclear_norm renorm dist _cdist_forward _pdist_forward
    _euclidean_dist _weight_norm_interface binary_cross_entropy kl_div _ctc_loss _cudnn_ctc_loss logcumsumexp
    special_bessel_j0 pow float_power tan cholesky cholesky_solve cholesky_inverse triangular_solve lu_unpack geqrf
    ormqr _linalg_det _linalg_slogdet _linalg_svd _linalg_eigh _linalg_solve_ex _linalg_check_errors
""")
# Nodes that a gradient passes element by element, on its way from a quotient to what that was made of.
_PASSES = _names("""
    Add Sub Rsub Neg Mul Div Exp Exp2 Expm1 Sigmoid Tanh Softmax LogSoftmax SafeSoftmax Softplus LogSigmoid Pow Sqrt
    Rsqrt Reciprocal Log Log1P Sin Cos Sinh Cosh Abs Square Erf Erfc Elu Silu Gelu Relu Clamp ClampMin ClampMax
    Maximum Minimum Where View UnsafeView Reshape ReshapeAlias Unsqueeze Squeeze Expand Slice Select Split Chunk
    Unbind T Transpose Permute Alias Clone ToCopy MaskedFill Cat Stack
""")


@cache
def kind_of(operator: Overload) -> Kind:
    namespace, _, name = operator._schema.name.partition("::")
    name = name.removeprefix("_foreach_").removesuffix("_")
    if namespace != "aten":
        return Kind.PLAIN
    if name in _DIVIDES or name.startswith("linalg_"):
        return Kind.DIVIDES
    return Kind.COMPARES if name in _COMPARES else Kind.PLAIN


def _kind_of_call(operator: Overload, args: tuple) -> Kind:
    """Of powers and quotients the numbers decide."""
    kind = kind_of(operator)
    if kind is not Kind.DIVIDES or len(args) < 2:
        return kind
    name, (first, second) = operator._schema.name.removesuffix("_"), args[:2]
    if name == "aten::pow":
        return Kind.PLAIN if isinstance(second, (int, float)) and second >= 1 else kind
    if name == "aten::div":
        small = not isinstance(second, Tensor) or (
            isinstance(first, Tensor) and second.numel() * _STATISTICS <= first.numel()
        )
        return Kind.PLAIN if small else kind
    return kind


class Watch(TorchDispatchMode):
    """Tells what is `held` by a saver which operator has saved it.

    `hold` is given each new tensor of the saver's; `settle` is called for it when it is known whether it is to stay as
    it is (`exact`), or may go into codes.
    """

    def __init__(self):
        super().__init__()
        self.waiting: list[Any] = []  # saved since the last operator
        self.held: deque[list[Any]] = deque()
        self.is_away = False
        self.results = _NONE  # storages that an operator has made whose backward asks for more

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def hold(self, kept: Any, storage: int) -> None:
        if storage in self.results:
            kept.exact = True
        self.waiting.append(kept)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Around operators of the saver's own."""
        alone = dispatch_modes() == 1
        with without_dispatch_modes() if alone else ExitStack():  # it costs less than calls that do nothing
            self.is_away = True
            try:
                yield
            finally:
                self.is_away = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.is_away:
            return func(*args, **(kwargs or {}))
        self.results = _NONE
        kind = kind_of(func)
        if kind is Kind.PLAIN and not (self.waiting or self.held):
            return func(*args, **(kwargs or {}))
        kind = _kind_of_call(func, args)
        if kind is not Kind.PLAIN:
            for kept in self.waiting:
                kept.exact = True
        if kind is Kind.DIVIDES and (self.waiting or self.held):
            for node in _made_of([t for t in _flat(args) if t.grad_fn is not None]):
                _keep_exactly(node)
        if func._schema.is_mutable:
            with self.away():
                self.settle()  # before something is written to it
        elif self.waiting or self.held:
            self.held.append(self.waiting)
            self.waiting = []
            if len(self.held) > _HELD:
                with self.away():
                    _settle(self.held.popleft())
        out = func(*args, **(kwargs or {}))
        if kind is not Kind.PLAIN:
            self.results = frozenset(t.untyped_storage()._cdata for t in _flat((out,)) if t.layout == torch.strided)
        return out

    def settle(self) -> None:
        for group in self.held:
            _settle(group)
        _settle(self.waiting)
        self.held.clear()
        self.waiting = []

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.settle()


def _settle(group: list[Any]) -> None:
    for kept in group:
        kept.settle()


def _flat(values: Any) -> list[Tensor]:
    functions = []
    for v in values:
        if isinstance(v, Tensor):
            functions.append(v)
        elif isinstance(v, (tuple, list)):
            functions += _flat(v)
    return functions


def _made_of(tensors: list[Tensor]) -> list[Any]:
    """Nodes of the functions of single elements that lead to some tensors, as far back as values are held."""
    nodes: list[Any] = [t.grad_fn for t in tensors]
    found: list[Any] = []
    for _ in range(_HELD):
        nodes = [n for n in nodes if n is not None and _base(n.name()) in _PASSES]
        found += nodes
        nodes = [following for n in nodes for following, _ in n.next_functions]
    return found


def _base(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("Backward")


def _keep_exactly(node: Any) -> None:
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved = getattr(node, name)
            for each in saved if isinstance(saved, (tuple, list)) else (saved,):
                try:
                    kept = getattr(getattr(each, "data", None), "kept", None)
                except RuntimeError:  # it has no hooks
                    continue
                if kept is not None:
                    kept.exact = True
