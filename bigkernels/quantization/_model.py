"""Quantizing the linear layers of a model in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._calibration import grams, groups
from ._format import Format
from ._layers import rows
from ._owners import note
from ._report import QuantizeReport, Row
from ._select import Chosen, places, put, select
from ._ties import name_codes, name_weights
from ._weight import QuantizedWeight, quantize_weight
from .qat import plain_kind


def quantize(
    model: nn.Module,
    config: str | Format | Mapping[str, str | Format | None],
    *,
    skip: str | tuple[str, ...] = ("lm_head",),
    filter: Callable[[str, nn.Module], bool] | None = None,
    embeddings: bool = False,
    calibration: Iterable[Any] | None = None,
) -> QuantizeReport:
    """Replace the linear layers of a model by `bigkernels.nn.QuantizedLinear`, in place; on an error none of them.

    Args:
        model: any module; layers of class `torch.nn.Linear` are replaced (and of transformers' `Conv1D`), subclasses
            are not. So are 3-D weights of experts, parameters of a module that says how many it has (`num_experts`) or
            is called one of experts: by `bigkernels.nn.QuantizedExperts` under the parameter's name. Hooks stay; a
            layer under several names stays one. On the meta device, layers are made that a state dict fills
            (``assign=True``).
        config: a format or its name ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "fp8-dynamic", "q4_1",
            "q8_0"), for all layers; or a mapping of patterns of names (as in `fnmatch`; the first that matches counts)
            to formats, names, or None for layers to leave alone.
        skip: names, or last parts of names, of layers to leave alone; or one of them.
        filter: called with the name and the module of each layer; False leaves it alone.
        embeddings: whether embeddings are quantized too. Layers that share a weight are quantized where all of these
            may be (``skip=()`` for a head) and to the same format; a calibrated one gives way to what needs no data.
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
    from ..nn._quantized import Quantized

    report = QuantizeReport()
    selection = select(model, config, skip, filter, embeddings, report)
    for chosen in selection.alone:
        if plain_kind(chosen.module) is nn.Embedding:  # what it reads are ids
            chosen.config = chosen.config.blind()
    measured = [chosen for chosen in selection.alone if chosen.config.calibrated and not chosen.module.weight.is_meta]
    if measured and calibration is None:
        raise ValueError(f"bigkernels.quantize: {measured[0].config} is calibrated; give calibration batches")
    before: list[Chosen] = []
    parameters: dict[str, nn.Parameter] = {}

    def replace(chosen: Chosen, quantized: QuantizedWeight) -> nn.Module:
        kind = plain_kind(chosen.module)
        layer = QuantizedEmbedding if kind is nn.Embedding else QuantizedLinear
        made = layer.standing_for(chosen.module, quantized, kind)
        before.append(chosen)
        put(model, chosen.paths, made)
        return made

    def alone(chosen: Chosen, gram: Tensor | None = None) -> None:
        weight = rows(chosen.module, plain_kind(chosen.module))
        quantized = quantize_weight(weight, chosen.config, gram)
        replace(chosen, quantized)
        what = ", also ".join((chosen.config.name, *chosen.paths[1:]))
        report.quantized.append(Row(chosen.path, what, weight.nbytes, quantized.nbytes, _error(weight, quantized)))

    def shared(members: list[Chosen]) -> None:
        first, config = members[0], members[0].config.blind()
        weight = rows(first.module, plain_kind(first.module))
        quantized = quantize_weight(weight, config)
        sizes, source = (weight.nbytes, quantized.nbytes), None
        for chosen in members:
            made = replace(chosen, quantized)
            what = config.name if source is None else f"{config.name}, the weight of {first.path}"
            if source is None:
                source = made
            else:
                made.share(source)
                # transformers asks for it when it saves: these tensors are those of another module.
                made._tied_weights_keys = {name: f"{first.path}.{name}" for name in quantized.tensors}
            report.quantized.append(Row(chosen.path, what, *sizes, _error(weight, quantized)))
            sizes = 0, 0

    def experts(path: str, config: Format) -> None:
        owner, _, key = path.rpartition(".")
        module = model.get_submodule(owner)
        weight = parameters[path] = getattr(module, key)
        made = QuantizedExperts.from_parameter(weight, config, turned=getattr(module, "is_transposed", False))
        delattr(module, key)
        setattr(module, key, made.train(module.training))
        flat = (weight.transpose(1, 2) if made.turned else weight).flatten(0, 1)
        report.quantized.append(Row(path, config.name, weight.nbytes, made.qweight.nbytes, _error(flat, made.qweight)))

    try:
        for path, chosen_format in selection.experts.items():
            experts(path, chosen_format)
        for members in selection.shared:
            shared(members)
        for chosen in selection.alone:
            if chosen not in measured:
                alone(chosen)
        if measured:
            batches = calibration if isinstance(calibration, Sequence) else list(calibration)
            named = {chosen.path: chosen for chosen in measured}
            for some in groups({path: rows(chosen.module).shape[1] for path, chosen in named.items()}):
                found = grams(model, {path: named[path].module for path in some}, batches)
                for path in some:
                    if path in found:
                        alone(named[path], found[path])
                    else:
                        report.skip(path, "no calibration batch reaches it", named[path].module.weight.nbytes)
    except BaseException:
        for chosen in before:
            put(model, chosen.paths, chosen.module)
        for path, weight in parameters.items():
            _set_parameter(model, path, weight)
        raise
    trained = any(p.requires_grad for p in model.parameters())
    for module in model.modules():
        if isinstance(module, Quantized):
            module._among_trained = trained
    name_codes(model, {path: _stored(c) for members in selection.shared for c in members for path in c.paths})
    order = selection.order
    for listed in (report.quantized, report.skipped):
        listed.sort(key=lambda row: order.get(row.path, order.get(row.path.rpartition(".")[0], 0)))
    note(model)
    return report


def dequantize(model: nn.Module) -> None:
    """Replace each `QuantizedLinear` and `QuantizedEmbedding` of a model by the module that it stands for, and
    `QuantizedExperts` by their parameter, in place. What shared a weight shares it again.

    They are what they were: class and options, hooks, one layer under several names; in the dtype that the model was
    cast to. A weight requires a gradient if it did before `quantize`, unless its layer, its bias or all parameters that
    the model kept were frozen since.
    """
    from ..nn import QuantizedExperts
    from ..nn._quantized import Quantized

    found: list[tuple[Quantized, nn.Parameter]] = []
    untrained = not any(p.requires_grad for p in model.parameters())
    for module, paths in places(model).items():
        if not isinstance(module, Quantized) or not paths[0]:
            continue
        frozen = untrained and module._among_trained
        if isinstance(module, QuantizedExperts):
            values = nn.Parameter(module.dequantize(), requires_grad=module._trained and not frozen)
            for path in paths:
                _set_parameter(model, path, values)
            continue
        made = module.dequantize()
        bias = getattr(made, "bias", None)
        if frozen or (bias is not None and not bias.requires_grad):
            made.weight.requires_grad_(False)
        for other, weight in found:
            if module.shares(other) and weight.shape == made.weight.shape:
                made.weight = weight
        found.append((module, made.weight))
        put(model, paths, made)
    name_weights(model)
    note(model)


def refresh(model: nn.Module) -> None:
    """Forget what was derived from the weights of a model: packed copies of those that `pack` declared as not written,
    and scales computed from quantized ones.

    Writes that PyTorch counts, loading, casts and moves are seen without it. Call it after writing to such weights in a
    way that PyTorch does not count: through ``weight.data``, a numpy array or another process.
    """
    from ..nn._quantized import Quantized
    from ..nn.linear import forget_packed

    for module in model.modules():
        if isinstance(module, Quantized):
            module.refresh()
        for p in module._parameters.values():
            if p is not None:
                forget_packed(p)


def _stored(chosen: Chosen) -> tuple[str, ...]:
    return tuple(chosen.config.blind().layout(tuple(chosen.module.weight.shape)))


def _set_parameter(model: nn.Module, path: str, weight: nn.Parameter) -> None:
    owner, _, key = path.rpartition(".")
    module = model.get_submodule(owner)
    module._modules.pop(key, None)
    setattr(module, key, weight)


def _error(weight: Tensor, quantized: QuantizedWeight) -> float | None:
    """Root mean square of the error over that of the weight."""
    if weight.is_meta:
        return None
    error = total = 0.0
    values = quantized.dequantize(torch.float32)
    for a, b in zip(weight.detach().split(1024), values.split(1024), strict=True):
        error += (a.double() - b.double()).square().sum().item()
        total += a.double().square().sum().item()
    return (error / total) ** 0.5 if total else 0.0
