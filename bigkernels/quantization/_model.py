"""Quantizing the linear layers of a model in place, and back."""

from __future__ import annotations

import collections
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._calibration import grams, groups
from ._format import Format, named
from ._weight import quantize_weight
from .qat import FakeQuantizedLinear


class Row(NamedTuple):
    """One linear layer: what became of it, its bytes before and after, and the error of the weight relative to its size
    (root mean squares); None where it was skipped.
    """

    path: str
    what: str
    before: int
    after: int
    error: float | None


@dataclass
class QuantizeReport:
    """The outcome of `quantize`: `quantized` and `skipped` are lists of `Row`; `str()` joins equal rows."""

    quantized: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for title, rows in (("quantized", self.quantized), ("skipped", self.skipped)):
            groups = collections.defaultdict(list)
            for row in rows:
                groups[re.sub(r"\b\d+\b", "*", row.path), row.what].append(row)
            if rows:
                before, after = (sum(getattr(row, name) for row in rows) for name in ("before", "after"))
                lines.append(f"{title}: {len(rows)}, {_bytes(before)} -> {_bytes(after)}")
            for (path, what), members in groups.items():
                errors = [row.error for row in members if row.error is not None]
                error = f", weight error up to {max(errors):.1e}" if errors else ""
                lines.append(f"  {len(members):>4}  {path}: {what}{error}")
        return "\n".join(lines) if lines else "no linear layers"


def _bytes(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n} B"


def quantize(
    model: nn.Module,
    config: str | Format | Mapping[str, str | Format | None],
    *,
    skip: tuple[str, ...] = ("lm_head",),
    filter: Callable[[str, nn.Module], bool] | None = None,
    embeddings: bool = False,
    calibration: Iterable[Any] | None = None,
) -> QuantizeReport:
    """Replace the linear layers of a model by `bigkernels.nn.QuantizedLinear`, in place; on an error none of them.

    Args:
        model: any module; layers of class `torch.nn.Linear` are replaced, subclasses are not. So are 3-D weights of
            experts, parameters of a module that says how many it has (`num_experts`) or is called one of experts: by
            `bigkernels.nn.QuantizedExperts` under the parameter's name.
        config: a format or its name ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8"), for all layers; or a
            mapping of patterns of names (as in `fnmatch`; the first that matches counts) to formats, names, or None for
            layers to leave alone.
        skip: names, or last parts of names, of layers to leave alone.
        filter: called with the name and the module of each layer; False leaves it alone.
        embeddings: whether embeddings are quantized too, and with them the layers that share their weight, where all of
            these may be (``skip=()`` for a head) and to the same format; a calibrated one gives way to what needs no
            data.
        calibration: batches for formats that are calibrated (`Int4` by "gptq" or "awq"): each a tensor, a tuple of
            arguments or a mapping of keyword arguments of the model. A few dozen sequences like those to come are
            enough. Layers are quantized in the model's order, as many at once as 2 GiB of statistics allow; those that
            follow see what these make of the batches, which are run once for each such group.

    Returns:
        What was quantized and what was left alone, and why.

    Raises:
        ValueError, TypeError: as `quantize_weight`, or a calibrated format without batches; the model is then as it
            was.
    """
    from ..nn import QuantizedEmbedding, QuantizedExperts, QuantizedLinear

    patterns = {"*": config} if isinstance(config, (str, Format)) else dict(config)
    formats = {pattern: None if value is None else named(value) for pattern, value in patterns.items()}

    def format_of(name: str) -> Format | None:
        return next((f for pattern, f in formats.items() if fnmatch.fnmatchcase(name, pattern)), None)

    report = QuantizeReport()
    blind: dict[str, Format] = {}
    measured: dict[str, Format] = {}
    experts: dict[str, Format] = {}
    candidates: dict[str, Format] = {}
    owners: dict[int, list[str]] = collections.defaultdict(list)
    for path, p in model.named_parameters(remove_duplicate=False):
        owners[id(p)].append(path.rpartition(".")[0])
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedExperts, QuantizedEmbedding)):
            continue
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            for key, p in module.named_parameters(recurse=False):
                if p.dim() != 3 or not p.is_floating_point():
                    continue
                path = f"{name}.{key}".lstrip(".")
                chosen = format_of(path)
                reason = _refusal_of_experts(path, module, p, chosen, skip, filter, owners)
                if reason:
                    report.skipped.append(Row(path, reason, p.nbytes, p.nbytes, None))
                else:
                    experts[path] = chosen
            continue
        chosen = format_of(name)
        size = module.weight.nbytes
        reason = _refusal(name, module, chosen, skip, filter)
        if isinstance(module, nn.Embedding) and not embeddings:
            reason = "an embedding (embeddings=True quantizes it)"
        if reason:
            report.skipped.append(Row(name, reason, size, size, None))
            continue
        if not name:
            raise ValueError("bigkernels.quantize: the model is a linear layer itself; use QuantizedLinear.from_linear")
        candidates[name] = chosen
    shared: dict[int, list[str]] = collections.defaultdict(list)
    for name, chosen in candidates.items():
        module = model.get_submodule(name)
        others = owners[id(module.weight)]
        if isinstance(module, nn.Embedding) or len(others) > 1:
            if not embeddings or any(candidates.get(other) != chosen for other in others):
                size = module.weight.nbytes
                report.skipped.append(Row(name, "its weight is shared with another module", size, size, None))
            else:
                shared[id(module.weight)].append(name)
        else:
            (measured if chosen.calibrated else blind)[name] = chosen
    if measured and calibration is None:
        config = next(iter(measured.values()))
        raise ValueError(f"bigkernels.quantize: {config} is calibrated; give calibration batches")
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    before: dict[str, nn.Module] = {}
    parameters: dict[str, nn.Parameter] = {}

    def replace(name: str, config: Format, gram: Tensor | None = None) -> None:
        module = before[name] = model.get_submodule(name)
        quantized = quantize_weight(module.weight, config, gram)
        model.set_submodule(name, QuantizedLinear(quantized, module.bias).train(module.training))
        size, error = module.weight.nbytes, _relative_error(module.weight.detach(), quantized.dequantize(torch.float32))
        report.quantized.append(Row(name, config.name, size, quantized.nbytes, error))

    def replace_shared(names: list[str]) -> None:
        weight, config = model.get_submodule(names[0]).weight, candidates[names[0]].blind()
        quantized = quantize_weight(weight, config)
        error = _relative_error(weight.detach(), quantized.dequantize(torch.float32))
        sizes = weight.nbytes, quantized.nbytes
        for name in names:
            module = before[name] = model.get_submodule(name)
            if isinstance(module, nn.Embedding):
                made = QuantizedEmbedding(quantized)
            else:
                made = QuantizedLinear(quantized, module.bias)
            model.set_submodule(name, made.train(module.training))
            what = config.name if name == names[0] else f"{config.name}, the weight of {names[0]}"
            report.quantized.append(Row(name, what, *sizes, error))
            sizes = 0, 0

    def replace_experts(path: str, config: Format) -> None:
        owner, _, key = path.rpartition(".")
        module = model.get_submodule(owner)
        weight = parameters[path] = getattr(module, key)
        made = QuantizedExperts.from_parameter(weight, config, turned=getattr(module, "is_transposed", False))
        delattr(module, key)
        setattr(module, key, made.train(module.training))
        error = _relative_error(weight.detach().flatten(0, 1), made.dequantize(torch.float32).flatten(0, 1))
        report.quantized.append(Row(path, config.name, weight.nbytes, made.qweight.nbytes, error))

    try:
        for path, config in experts.items():
            replace_experts(path, config)
        for names in shared.values():
            replace_shared(names)
        for name, config in blind.items():
            replace(name, config)
        if measured:
            batches = calibration if isinstance(calibration, Sequence) else list(calibration)
            for some in groups({name: model.get_submodule(name) for name in measured}):
                found = grams(model, some, batches)
                for name, module in some.items():
                    if name in found:
                        replace(name, measured[name], found[name])
                    else:
                        size = module.weight.nbytes
                        report.skipped.append(Row(name, "no calibration batch reaches it", size, size, None))
    except BaseException:
        for name, module in before.items():
            model.set_submodule(name, module)
        for path, weight in parameters.items():
            _set_parameter(model, path, weight)
        raise
    for rows in (report.quantized, report.skipped):
        rows.sort(key=lambda row: order.get(row.path, order.get(row.path.rpartition(".")[0], 0)))
    return report


def dequantize(model: nn.Module) -> None:
    """Replace each `QuantizedLinear` and `QuantizedEmbedding` of a model by the module that it stands for, and
    `QuantizedExperts` by their parameter, in place. What shared a weight shares it again.
    """
    from ..nn import QuantizedEmbedding, QuantizedExperts, QuantizedLinear

    found: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedExperts) and name:
            _set_parameter(model, name, nn.Parameter(module.dequantize()))
        elif isinstance(module, (QuantizedLinear, QuantizedEmbedding)) and name:
            made = module.dequantize()
            made.weight = found.setdefault(
                next(iter(module.qweight.tensors.values())).data_ptr() or id(module), made.weight
            )
            model.set_submodule(name, made)


def _set_parameter(model: nn.Module, path: str, weight: nn.Parameter) -> None:
    owner, _, key = path.rpartition(".")
    module = model.get_submodule(owner)
    module._modules.pop(key, None)
    setattr(module, key, weight)


def _left_out(name, module, chosen, skip, filter) -> str | None:
    if any(name == part or name.endswith("." + part) for part in skip):
        return "left out by skip"
    if filter is not None and not filter(name, module):
        return "left out by filter"
    if chosen is None:
        return "no pattern names a format for it"
    return None


def _refusal_of_experts(path, module, weight, chosen, skip, filter, owners) -> str | None:
    name = type(module).__name__
    if getattr(module, "num_experts", None) != weight.shape[0] and "expert" not in name.lower():
        return f"a 3-D weight of a {name}"
    if reason := _left_out(path, module, chosen, skip, filter):
        return reason
    if chosen.calibrated:
        return "calibration measures the inputs of linear layers alone"
    if len(owners[id(weight)]) > 1:
        return "it is shared with another module"
    if weight.is_meta:
        return "it has no values (meta device)"
    return None


def _refusal(name, module, chosen, skip, filter) -> str | None:
    if type(module) not in (nn.Linear, nn.Embedding, FakeQuantizedLinear):
        return f"a {type(module).__name__}, not a torch.nn.Linear"
    if reason := _left_out(name, module, chosen, skip, filter):
        return reason
    if getattr(module, "max_norm", None) is not None:
        return "it changes its weight (max_norm)"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        return "it has hooks"
    if module.weight.is_meta:
        return "its weight has no values (meta device)"
    return None


def _relative_error(weight: Tensor, found: Tensor) -> float:
    """Root mean square of the error over that of the weight."""
    error = total = 0.0
    for a, b in zip(weight.split(1024), found.split(1024), strict=True):
        error += (a.double() - b.double()).square().sum().item()
        total += a.double().square().sum().item()
    return (error / total) ** 0.5 if total else 0.0
