"""`nn.GroupNorm` and `nn.BatchNorm`, themselves, and with the activation behind them.

A norm's forward is replaced as it is; where its result goes into an activation and nowhere else, a helper calls both at
once: `act(self.norm(x))`, `h = self.norm(x)` and `h = act(h)` as statements one after the other, and neighbours in an
`nn.Sequential`.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...nn.batch_norm import normalise
from ...nn.linear import may_pay
from ...ops.batch_norm import batch_norm
from ...ops.group_norm import group_norm
from ...ops.images import NUMBERS
from ...ops.registry import has_values
from .._own import Known
from .._rule import Fit, ModuleRule, Plan, Site, Skip, SourceRule, Write
from .._source import Source, call, resolve
from .._verify import Probes, compare, doubled, gradients, plain
from .add_norm import unobserved
from .mlp import _activation as activation_of
from .mlp import _functions, _is_known, _key, _name, is_pointwise

_BATCH = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}  # and the dimensions that they take
_NORMS: tuple[Any, ...] = (nn.GroupNorm, *_BATCH)
_FORWARDS = {cls: cls.forward for cls in _NORMS}  # whoever replaces one later is followed
KEY = "_bigkernels_image_activation"  # of an activation module: what it computes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


NORMED = "_bigkernels_normed"


def _fits(module: nn.Module, x: Any) -> bool:
    if not isinstance(x, Tensor) or not plain(x) or not x.is_cpu or x.dtype not in _DTYPES or not has_values(x):
        return False
    cls = type(module)
    if cls is nn.GroupNorm:
        if x.dim() < 2 or x.shape[1] != module.num_channels or not x.numel():
            return False
        if x.numel() == module.num_groups:
            return False  # the class's own error
    elif cls not in _BATCH or x.dim() not in _BATCH[cls] or x.shape[1] != module.num_features or not x.numel():
        return False
    elif module.training and x.numel() == x.shape[1]:
        return False  # the class's own error
    for name in ("weight", "bias", "running_mean", "running_var"):
        t = getattr(module, name, None)
        # PyTorch knows one mix of dtypes: 16-bit images and float32 for the rest.
        if t is not None and (not plain(t) or not t.is_cpu or t.dtype not in (x.dtype, torch.float32)):
            return False
    dtypes = {
        t.dtype
        for n in ("weight", "bias", "running_mean", "running_var")
        if (t := getattr(module, n, None)) is not None
    }
    if len(dtypes) > 1 or (torch.is_autocast_enabled("cpu") and x.dtype != torch.float32 and cls is nn.GroupNorm):
        return False
    return True


def compute(module: nn.Module, x: Tensor, activation: str | None = None) -> Tensor:
    if type(module) is nn.GroupNorm:
        return group_norm(x, module.num_groups, module.weight, module.bias, module.eps, activation=activation)
    return normalise(module, x, activation)


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a norm's forward: the kernel where it fits the call, the class's own code elsewhere."""
    cls = type(module)
    if len(args) == 1 and not kwargs and already_normed(module, args[0]) is not None:
        return args[0]
    if len(args) == 1 and not kwargs and _FORWARDS.get(cls) is cls.forward and _fits(module, args[0]):
        return compute(module, args[0])
    return cls.forward(module, *args, **kwargs)


def _plan(module: nn.Module, plan: Plan) -> tuple[Write, Fit] | None:
    error = error_of(module, plan)
    if error is None:
        return None
    kind = "group_norm" if type(module) is nn.GroupNorm else "batch_norm"
    return Write(module, "forward", functools.partial(forward, module)), Fit(kind, error)


def error_of(module: nn.Module, plan: Plan) -> float | None:
    """The largest error of a norm of this kind; None for what is none."""
    cls = type(module)
    if _FORWARDS.get(cls) is not cls.forward:
        return None
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(not plain(t) or not t.is_cpu or t.is_meta for t in tensors) or not may_pay():
        return None
    key = "image_norm", cls, module.weight is None, module.bias is None
    if key not in plan.memory:
        plan.memory[key] = _error(module)
    return plan.memory[key]


def _error(module: nn.Module) -> float:
    """The kernel against PyTorch's, where a small module stands for all of its class."""
    worst = 0.0
    sizes = (6, 5, 7, 4)[: 2 if type(module) is nn.BatchNorm1d else 3 if type(module) is nn.BatchNorm3d else 2]
    for dtype in (torch.float32, torch.bfloat16):
        probe = Probes("cpu", dtype)
        affine = [None if t is None else probe(8) for t in (module.weight, module.bias)]
        leaves = [probe(3, 8, *sizes, shift=0.5), *affine]

        def theirs(x, weight, bias):
            if type(module) is nn.GroupNorm:
                return nn.functional.group_norm(x, 4, weight, bias)
            return nn.functional.batch_norm(x, None, None, weight, bias, True)

        def ours(x, weight, bias):
            if type(module) is nn.GroupNorm:
                return group_norm(x, 4, weight, bias)
            return batch_norm(x, None, None, weight, bias, training=True)

        results = (gradients(ours, leaves), gradients(theirs, leaves), gradients(theirs, doubled(leaves)))
        worst = max(worst, compare(*results, f"in {str(dtype).removeprefix('torch.')}"))
    return worst


# ---- with an activation ---------------------------------------------------------------------------------------------


class Normed(NamedTuple):
    """Of a tensor: the norm that it has passed already (conv_norm.py), and whether a ReLU behind it, too."""

    norm: nn.Module
    rectified: bool


def already_normed(norm: Any, x: Any) -> Normed | None:
    """What `before_norm` has said of a tensor, once, where it was made for this norm."""
    mark = getattr(x, NORMED, None)
    if mark is None or mark.norm is not norm:
        return None
    delattr(x, NORMED)
    return mark


def is_patched(norm: Any, written: bool = False) -> bool:
    """Whether a module is a norm whose forward is this rule's, or (unless `written`) its class's, and that nobody
    observes.
    """
    if not isinstance(norm, nn.Module) or (type(norm) is not nn.GroupNorm and type(norm) not in _BATCH):
        return False
    if _FORWARDS[type(norm)] is not type(norm).forward:
        return False
    own = norm.__dict__.get("forward")
    ours = (own is None and not written) or (
        type(own) is functools.partial and own.func is forward and own.args[0] is norm
    )
    return ours and unobserved(norm)


def name_of(act: Any, approximate: str | None = None) -> str | None:
    if isinstance(act, nn.Module):
        known = act.__dict__.get(KEY) if unobserved(act) else None
        return None if known is None else known.name_of(act)
    name = _functions.get((act, approximate))
    return name if name in NUMBERS else None


def normed(act: Any, norm: Any, x: Any, approximate: str | None = None) -> Any:
    """act(norm(x))."""
    mark = already_normed(norm, x)
    if mark is not None:
        if name_of(act, approximate) == "relu":
            return x if mark.rectified else x.relu_()  # which nobody else has
        return act(x) if approximate is None else act(x, approximate=approximate)
    name = name_of(act, approximate)
    if name is not None and is_patched(norm) and _fits(norm, x):
        return compute(norm, x, name)
    y = norm(x)
    return act(y) if approximate is None else act(y, approximate=approximate)


def activation_name(act: Any, approximate: str | None, plan: Plan) -> tuple[str, float]:
    key = "mlp", _key(act), approximate
    if key not in plan.memory:
        plan.memory[key] = _name(act, approximate, plan.verify)
    name, error = plan.memory[key]
    if name not in NUMBERS:
        raise Skip(f"the activation {name} is none of {', '.join(n for n in NUMBERS if n)}")
    return name, error


def _sites(source: Source) -> Iterator[Site]:
    for node in source.body():
        activation = activation_of(source, node)
        if activation is not None:
            match activation[2]:
                case ast.Call(norm, [x], []) if source.attribute(norm) and not isinstance(x, ast.Starred):
                    yield _site(source, activation, node, norm, x, {})
    for owner in (source.tree, *source.body()):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(owner, field, None)
            for first, second in zip(block, block[1:], strict=False) if isinstance(block, list) else ():
                match first, second:
                    case ast.Assign([ast.Name(name)], ast.Call(norm, [x], [])), ast.Assign([ast.Name(again)], value):
                        if name != again or not source.attribute(norm) or isinstance(x, ast.Starred):
                            continue
                        activation = activation_of(source, value)
                        if activation and isinstance(activation[2], ast.Name) and activation[2].id == name:
                            yield _site(source, activation, value, norm, x, {first: ast.Pass()})


def _site(source, found, node, norm, x, more) -> Site:
    target, approximate, _ = found
    extra = {} if approximate is None else {"approximate": ast.Constant(approximate)}
    new = call("_bigkernels_normed", node.func, norm, x, **extra)
    return Site(
        _check(target, approximate, source.attribute(norm)), {node: new, **more}, {"_bigkernels_normed": normed}
    )


def _check(target: Any, approximate: str | None, path: list[str]):
    def check(module: nn.Module, plan: Plan) -> Fit | None:
        norm = resolve(module, path)
        error = error_of(norm, plan) if isinstance(norm, nn.Module) else None
        if error is None:
            return None
        act = resolve(module, target) if isinstance(target, list) else target
        if isinstance(act, nn.Module):
            if approximate is not None or not is_pointwise(act):
                return None
        elif not _is_known(act):
            return None
        name, by_act = activation_name(act, approximate, plan)
        what = f"{'group_norm' if type(norm) is nn.GroupNorm else 'batch_norm'} + {name}"
        if isinstance(act, nn.Module):
            return Fit(what, max(error, by_act), (Write(act, KEY, Known(act, name)),))
        _functions[act, approximate] = name
        return Fit(what, max(error, by_act))

    return check


MODULE_RULE = ModuleRule("norm", _plan)
RULE = SourceRule("norm", "image_norm", _sites)
