"""RMSNorm and LayerNorm modules, by what they compute: any class, any name for eps, with or without an offset."""

# mypy: ignore-errors

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional
from .._device import probe_device
from .._isolated import sandbox
from .._own import Own
from .._rule import Fit, ModuleRule, Plan, Skip, Write
from .._source import find_source
from .._verify import Probes, compare, doubled, gradients, outputs_only, plain


class Norm(NamedTuple):
    """What a module computes."""

    kind: str  # "rms" or "layer"
    offset: float  # added to the weight
    eps: str | float | None  # an attribute's name, a number, or None: `default_eps`
    weight: bool
    bias: bool
    size: int | None  # of the last dimension where no weight tells it; None accepts any
    autocast: bool  # whether a 16-bit input gives an output of its dtype under autocast too
    own: Own | None = None  # what the module's class had for it
    copies: bool = False  # whether the input may be written to before backward, which the module's own code allows

    @property
    def kernel(self) -> str:
        name = "rms_norm" if self.kind == "rms" else "layer_norm"
        return f"{name} (weight + {self.offset:g})" if self.offset else name

    def fits(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the kernel gives for `x` what the module's own forward gives, dtype included."""
        if not plain(x) or x.dim() == 0:
            return False
        size = self.size
        for name, present in (("weight", self.weight), ("bias", self.bias)):
            parameter = getattr(module, name, None)
            if not present:
                if parameter is not None:
                    return False
                continue
            # With two dtypes, families differ in what they return.
            if not plain(parameter) or parameter.dtype != x.dtype or parameter.device != x.device:
                return False
            size = parameter.shape[0]
        if size is not None and x.shape[-1] != size:
            return False
        return x.dtype == torch.float32 or self.autocast or not torch.is_autocast_enabled(x.device.type)

    def compute(self, module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Any:
        eps = getattr(module, self.eps) if isinstance(self.eps, str) else self.eps
        if eps is None:
            eps = default_eps(x.dtype)
        if self.copies and x.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
            x = x.clone()
        return self.apply(x, module.weight if self.weight else None, module.bias if self.bias else None, eps, residual)

    def apply(self, x, weight, bias, eps, residual=None):
        if self.kind == "rms":
            return functional.rms_norm(x, weight, eps, offset=self.offset, residual=residual)
        return functional.layer_norm(x, weight, bias, eps, residual=residual)


def default_eps(dtype: torch.dtype) -> float:
    """What `torch.nn.RMSNorm` takes for eps=None: that of the dtype it computes in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def forward(module: nn.Module, norm: Norm, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a norm's forward: the kernel where it fits the call, the class's own code elsewhere."""
    if len(args) != 1 or kwargs or not norm.own.holds(module) or not norm.fits(module, args[0]):
        return type(module).forward(module, *args, **kwargs)
    return norm.compute(module, args[0])


def current(module: Any) -> Norm | None:
    """What a module computes if `patch` replaces it and nothing was put around it since; None otherwise."""
    function = getattr(module, "forward", None)
    if type(function) is functools.partial and function.func is forward and function.args[0] is module:
        norm = function.args[1]
        return norm if norm.own.holds(module) else None
    return None


def _plan(module: nn.Module, plan: Plan) -> tuple[Write, Fit] | None:
    if not _is_candidate(module):
        return None
    key = _fingerprint(module)
    if key not in plan.memory:
        try:
            plan.memory[key] = _identify(module, plan.verify)
        except Skip as skip:
            plan.memory[key] = skip
    known = plan.memory[key]
    if isinstance(known, Skip):
        raise known
    norm, error = known
    norm = plan.norms[module] = norm._replace(copies=module in plan.written and type(module) is not nn.LayerNorm)
    return Write(module, "forward", functools.partial(forward, module, norm)), Fit(norm.kernel, error)


RULE = ModuleRule("norm", _plan)


def _is_candidate(module: nn.Module) -> bool:
    cls = type(module)
    if cls.__module__.startswith("torch.nn.") and cls not in (nn.LayerNorm, nn.RMSNorm):
        return False
    if next(module.children(), None) is not None or next(module.buffers(), None) is not None:
        return False
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if not set(parameters) <= {"weight", "bias"} or isinstance(module, torch.jit.ScriptModule):
        return False
    named = "norm" in cls.__name__.lower() or any("eps" in name.lower() for name in _floats(module))
    return named and find_source(cls) is not None


def _floats(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, float)]


def _fingerprint(module: nn.Module) -> tuple:
    """Modules with equal fingerprints compute the same function of input and parameters."""
    parameters = tuple(
        (n, p if p is None else (tuple(p.shape), p.dtype, p.device, p.is_meta, type(p)))
        for n, p in module._parameters.items()
    )
    simple = (int, float, bool, str, type(None), tuple, torch.dtype, torch.Size)
    hidden = {*vars(nn.Module()), "forward", "_bigkernels_patch"}
    attributes = tuple(
        (name, repr(value) if isinstance(value, simple) else id(value))
        for name, value in sorted(vars(module).items())
        if name not in hidden
    )
    return type(module), parameters, attributes


def _identify(module: nn.Module, verify: bool) -> tuple[Norm, float]:
    own = Own(type(module))
    module = sandbox(module)
    parameters = {name: _whole(p) for name, p in module._parameters.items() if p is not None}
    for p in parameters.values():
        if isinstance(p, nn.parameter.UninitializedTensorMixin) or p.is_meta:
            raise Skip("its parameters are not materialised yet")
        if p.dim() != 1 or not p.is_floating_point() or not plain(p):
            raise Skip("its parameters are not plain floating vectors")
        if p.shape != next(iter(parameters.values())).shape:
            raise Skip("its weight and bias differ in size")
        if p.numel() < 2:
            raise Skip("one element cannot be normalised")
    device = probe_device()
    size, fixed = _size(module, parameters)
    norm = _hypothesis(module, parameters, device, size, fixed)
    dtypes = {torch.float32, torch.bfloat16, *(p.dtype for p in parameters.values())} - {torch.float64}
    error = 0.0
    for dtype in sorted(dtypes, key=str) if verify else (torch.float32,):
        error = max(error, _check(module, parameters, norm, device, dtype, size, gradients if verify else outputs_only))
    if verify and fixed is None and not parameters:
        error = max(error, _check(module, parameters, norm, device, torch.float32, size + 32, gradients))
    return norm._replace(autocast=_keeps_dtype(module, parameters, device, size), own=own), error


def _whole(p: Tensor) -> Tensor:
    """An empty vector in the place of a parameter that is spread over ranks, which `fully_shard` puts together for each
    call: probes bring values of their own. Where a call sees the parts, `Norm.fits` does not hold."""
    return torch.empty(p.shape, dtype=p.dtype, device=p.device) if hasattr(p, "to_local") else p


def _size(module: nn.Module, parameters: dict[str, Tensor]) -> tuple[int, int | None]:
    """The size to probe with, and the size that calls must have where no parameter tells it."""
    for p in parameters.values():
        return p.shape[0], None
    shape = getattr(module, "normalized_shape", None)
    if shape is None:
        return 64, None
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(shape) != 1:
        raise Skip("it normalises over more than the last dimension")
    return shape[0], shape[0]


def _hypothesis(module, parameters, device, size, fixed) -> Norm:
    """The kernel that agrees in float32 on inputs of every scale and with a mean; decided by numbers alone."""
    constants = [
        c for c in find_source(type(module)).function.__code__.co_consts if isinstance(c, float) and 0 < c < 0.01
    ]
    eps = [*sorted(_floats(module), key=lambda name: "eps" not in name.lower()), *constants, 1e-5, 1e-6, 1e-8, 1e-12]
    if getattr(module, "eps", 0.0) is None:
        eps.insert(0, None)
    kinds = [("rms", 0.0), ("rms", 1.0), ("layer", 0.0)] if "bias" not in parameters else [("layer", 0.0)]
    for kind, offset in kinds:
        if offset and not parameters:
            continue
        for name in eps:
            norm = Norm(kind, offset, name, "weight" in parameters, "bias" in parameters, fixed, True)
            try:
                _check(module, parameters, norm, device, torch.float32, size, outputs_only)
                return norm
            except Skip:
                continue
            except Exception as error:  # noqa: BLE001  it may refuse an input in any way
                raise Skip(f"does not take rows of {size} values in any shape ({type(error).__name__})") from error
    raise Skip("computes neither RMSNorm nor LayerNorm of the last dimension")


def _twin(module: nn.Module, parameters: dict[str, Tensor], training: bool) -> nn.Module:
    """A module with the same class and attributes and the given parameters; hooks and the original stay untouched."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(vars(module))
    twin.__dict__.pop("forward", None)
    twin.__dict__["_parameters"] = {**dict.fromkeys(module._parameters), **parameters}
    twin.__dict__["training"] = training
    return twin


def _check(module, parameters, norm, device, dtype, size, observe) -> float:
    """The largest error over probes of several ranks and scales."""
    probe, error = Probes(device, dtype), 0.0
    scales = (1.0, 1e-3, 100.0) if dtype == torch.float16 else (1.0, 1e-3, 1e-6, 1e4)
    shapes = ((7, size), (2, 3, size), (2, 1, 3, size), (1, 2, 1, 5, size))
    for number, (scale, shape) in enumerate(zip(scales, shapes * 2, strict=False)):
        leaves = [probe(*shape, scale=scale, shift=1.5 * scale)]
        leaves += [probe(size, shift=0.5) if name in parameters else None for name in ("weight", "bias")]
        names = [name for name in ("weight", "bias") if name in parameters]
        before = leaves[0].detach().clone()

        def theirs(x, *given, training=bool(number % 2), names=names):
            given = dict(zip(("weight", "bias"), given, strict=True))
            return type(module).forward(_twin(module, {n: given[n] for n in names}, training), x)

        def ours(x, weight, bias):
            value = getattr(module, norm.eps) if isinstance(norm.eps, str) else norm.eps
            return norm.apply(x, weight, bias, default_eps(dtype) if value is None else value)

        results = [observe(f, t) for f, t in ((ours, leaves), (theirs, leaves), (ours, doubled(leaves)))]
        if not torch.equal(leaves[0].detach(), before):
            raise Skip("it changes its input")
        error = max(error, compare(*results, f"in {str(dtype).removeprefix('torch.')}"))
    return error


def _keeps_dtype(module, parameters, device, size) -> bool:
    probe = Probes(device, torch.bfloat16)
    twin = _twin(module, {name: probe(size) for name in parameters}, False)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        return type(module).forward(twin, probe(3, size)).dtype == torch.bfloat16
