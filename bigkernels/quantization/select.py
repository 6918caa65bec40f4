"""Which layers of a model are quantized, and why others are not: the same for `quantize` and `prepare_qat`."""

from __future__ import annotations

import collections
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ._report import QuantizeReport
from .format import Format, resolve_format
from .layers import exact_weight, has_own_forward, has_state_hooks, is_linear, is_spread, is_transposed

Filter = Callable[[str, nn.Module], bool]


@dataclass
class Chosen:
    """A layer: the module, all its paths, and its format."""

    module: nn.Module
    paths: list[str]
    format: Format

    @property
    def path(self) -> str:
        return self.paths[0]


@dataclass
class Selection:
    """What is quantized: layers with a weight of their own, groups of layers that share one, and weights of experts by
    their path; `order` has the paths of all modules as the model has them.
    """

    alone: list[Chosen] = field(default_factory=list)
    shared: list[list[Chosen]] = field(default_factory=list)
    experts: dict[str, Format] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)


def as_names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names; a single one may be given by itself."""
    return (names,) if isinstance(names, str) else tuple(names)


def places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Each module of a model with all its paths."""
    paths = collections.defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
    return paths


def put(model: nn.Module, paths: list[str], module: nn.Module) -> None:
    """Put a module in all the places of another."""
    for path in paths:
        model.set_submodule(path, module)


def never_called(model: nn.Module, path: str) -> str | None:
    """Why a layer's forward is not what its model computes with, if so."""
    owner, _, name = path.rpartition(".")
    if name == "out_proj" and isinstance(model.get_submodule(owner), nn.MultiheadAttention):
        return f"its {type(model.get_submodule(owner)).__name__} reads its weight and never calls it"
    return None


@dataclass
class _Rules:
    """What the caller of `quantize` says about names."""

    formats: dict[str, Format | None]
    skip: tuple[str, ...]
    filter: Filter | None

    def format_of(self, path: str) -> Format | None:
        return next((f for pattern, f in self.formats.items() if fnmatch.fnmatchcase(path, pattern)), None)

    def refusal(self, paths: list[str], module: nn.Module) -> str | None:
        if any(path == part or path.endswith("." + part) for part in self.skip for path in paths):
            return "left out by skip"
        if self.filter is not None and not all(self.filter(path, module) for path in paths):
            return "left out by filter"
        chosen = {self.format_of(path) for path in paths}
        if None in chosen:
            return "no pattern names a format for it"
        return f"its names {', '.join(paths)} have different formats" if len(chosen) > 1 else None


def select(
    model: nn.Module,
    format: str | Format | Mapping[str, str | Format | None],
    skip: str | tuple[str, ...],
    filter: Filter | None,
    embeddings: bool,
    report: QuantizeReport,
) -> Selection:
    """The layers that options choose; the others go to the report."""
    from ..nn.quantized import Quantized
    from .qat import plain_kind

    patterns = {"*": format} if isinstance(format, (str, Format)) else dict(format)
    formats = {pattern: None if value is None else resolve_format(value) for pattern, value in patterns.items()}
    rules = _Rules(formats, as_names(skip), filter)
    modules = places(model)
    owners = collections.defaultdict(list)
    for module, paths in modules.items():
        for p in module._parameters.values():
            if p is not None:
                owners[id(p)].append((module, paths))
    selection = Selection(order={path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))})
    candidates: dict[nn.Module, Chosen] = {}
    adapters = _adapters(modules)
    for module, paths in modules.items():
        kind, path = plain_kind(module), paths[0]
        if isinstance(module, Quantized):
            report.skip(path, f"already quantized ({module.weight_format.name})", module.qweight.nbytes)
        elif is_linear(kind) or kind is nn.Embedding:
            reason = never_called(model, path) or rules.refusal(paths, module)
            if module in adapters:
                reason = "part of an adapter"
            if kind is nn.Embedding and not embeddings:
                reason = "an embedding (embeddings=True quantizes it)"
            if reason := reason or _refusal(module):
                report.skip(path, reason, getattr(module.weight, "nbytes", 0))
            elif not path:
                raise ValueError(
                    "bigkernels.quantize: the model is a linear layer itself; use QuantizedLinear.from_linear"
                )
            else:
                config_of_it = rules.format_of(path)
                assert config_of_it is not None  # `refusal` has asked
                candidates[module] = Chosen(module, paths, config_of_it)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            reason = never_called(model, path)
            expected = "Linear" if isinstance(module, nn.Linear) else "Embedding"
            report.skip(path, reason or f"a {type(module).__name__}, not a torch.nn.{expected}", _nbytes(module))
        elif not isinstance(module, ParametrizationList):
            for key, reason, nbytes in _weights(module, path, rules, owners, selection):
                report.skip(f"{path}.{key}".lstrip("."), reason, nbytes)
            sized = hasattr(module, "in_features") and hasattr(module, "out_features")
            if sized and not module._modules and not module._parameters:
                report.skip(path, f"a {type(module).__name__}, not a torch.nn.Linear", _nbytes(module))
    _group(candidates, owners, selection, report)
    return selection


def _adapters(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """What PEFT put beside layers."""
    return {
        part
        for module in modules
        if "base_layer" in module._modules
        for name, child in module._modules.items()
        if name != "base_layer" and child is not None
        for part in child.modules()
    }


def _group(candidates, owners, made: Selection, report: QuantizeReport) -> None:
    """Sort candidates into those with a weight of their own and groups that share one, if all of these may go."""
    groups = collections.defaultdict(list)
    for chosen in candidates.values():
        groups[id(chosen.module.weight)].append(chosen)
    for key, members in groups.items():
        if len(owners[key]) == 1:
            made.alone += members
            continue
        transposed = {is_transposed(type(m.module)) for m in members}
        if len(members) == len(owners[key]) and len({m.format for m in members}) == len(transposed) == 1:
            made.shared.append(members)
            continue
        for m in members:
            others = ", ".join(paths[0] for module, paths in owners[key] if module is not m.module)
            report.skip(m.path, f"its weight is shared with another module ({others})", m.module.weight.nbytes)


def _weights(module, path: str, rules: _Rules, owners, made: Selection) -> Iterator[tuple[str, str, int]]:
    """Parameters with two or more dimensions that a module holds itself: experts are chosen, others reported."""
    name = type(module).__name__
    for key, p in module._parameters.items():
        if p is None or p.dim() < 2 or not p.is_floating_point():
            continue
        if p.dim() != 3 or (getattr(module, "num_experts", None) != p.shape[0] and "expert" not in name.lower()):
            yield key, f"a {p.dim()}-D weight of a {name}", p.nbytes
            continue
        paths = [f"{path}.{key}".lstrip(".")]
        reason = rules.refusal(paths, module)
        config = rules.format_of(paths[0])
        if not reason and (config is None or config.calibrated):
            reason = "calibration measures the inputs of linear layers alone"
        if not reason and len(owners[id(p)]) > 1:
            reason = "it is shared with another module"
        if not reason:
            _check_whole(p)
            reason = None if exact_weight(p) else _kind_of(p)
        if reason or config is None:
            yield key, reason or "no format is named for it", p.nbytes
        else:
            made.experts[paths[0]] = config


def _refusal(module: nn.Module) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is computed, no parameter"
    weight: Any = module.weight
    _check_whole(weight)
    if not exact_weight(weight):
        return _kind_of(weight)
    if getattr(module, "max_norm", None) is not None:
        return "it changes its weight (max_norm)"
    if has_own_forward(module):
        return "its forward was replaced"
    if has_state_hooks(module):
        return "it has hooks on its state dict"
    return None


def _check_whole(weight: Tensor) -> None:
    if is_spread(weight):
        raise ValueError(
            "bigkernels.quantize: weights of this model are spread over ranks (DTensor); quantize it before "
            "fully_shard or parallelize_module"
        )


def _kind_of(weight) -> str:
    kind = type(weight).__name__
    return f"its weight is {kind if kind not in ('Tensor', 'Parameter') else weight.dtype}"


def _nbytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
