"""Quantizing the linear layers of a model in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from .._deprecated import renamed_arguments
from .._torch_private import LAZY, require
from ._owners import note
from ._plan import Plan, set_parameter
from ._report import QuantizeReport
from ._ties import name_weights
from .format import Format
from .select import places, put


@renamed_arguments("bigkernels.quantize", config="format")
def quantize(
    model: nn.Module,
    format: str | Format | Mapping[str, str | Format | None],
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
        format: a format or its name ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "fp8-dynamic", "q4_1",
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
    from ..nn.quantized import Quantized

    require(LAZY, "quantize")
    report = Plan.of(model, format, skip, filter, embeddings).write(calibration)
    trained = any(p.requires_grad for p in model.parameters())
    for module in model.modules():
        if isinstance(module, Quantized):
            module._among_trained = trained
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
    from ..nn.quantized import Quantized

    restored: list[tuple[Quantized, nn.Parameter]] = []
    untrained = not any(p.requires_grad for p in model.parameters())
    for module, paths in places(model).items():
        if not isinstance(module, Quantized) or not paths[0]:
            continue
        frozen = untrained and module._among_trained
        if isinstance(module, QuantizedExperts):
            values = nn.Parameter(module.dequantize(), requires_grad=module._trained and not frozen)
            for path in paths:
                set_parameter(model, path, values)
            continue
        layer = cast(Any, module).dequantize()
        bias = getattr(layer, "bias", None)
        if frozen or (bias is not None and not bias.requires_grad):
            layer.weight.requires_grad_(False)
        for other, weight in restored:
            if module.shares(other) and weight.shape == layer.weight.shape:
                layer.weight = weight
        restored.append((module, layer.weight))
        put(model, paths, layer)
    name_weights(model)
    note(model)


@contextmanager
def quantized(
    model: nn.Module, format: str | Format | Mapping[str, str | Format | None], **options: Any
) -> Iterator[QuantizeReport]:
    """`quantize(model, format, **options)` inside a `with` block; after it the layers that were replaced are back, with
    their weights bit for bit. Both are in memory inside of the block, to see what a format costs; `quantize` and
    `dequantize` keep one of them. What the block itself puts around or beside a
    layer stays, and moves and casts in the block are not the weights'.
    """
    from ..nn.quantized import Quantized

    modules = {(parent, name): child for parent in model.modules() for name, child in parent._modules.items()}
    weights = {(parent, name): p for parent in model.modules() for name, p in parent._parameters.items()}
    report = quantize(model, format, **options)
    replaced: dict[nn.Module, nn.Module | nn.Parameter | None] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            place = parent, name
            if isinstance(child, Quantized) and modules.get(place) is not child:
                replaced[child] = modules[place] if place in modules else weights[place]
    try:
        yield report
    finally:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                before = replaced.get(child) if child is not None else None
                if isinstance(before, nn.Parameter):
                    del parent._modules[name]
                    parent.register_parameter(name, before)
                elif before is not None and child is not None:
                    parent._modules[name] = before.train(child.training)
        note(model)


def refresh(model: nn.Module) -> None:
    """Forget what was derived from the weights of a model: packed copies of those that `pack` declared as not written,
    and scales computed from quantized ones.

    Writes that PyTorch counts, loading, casts and moves are seen without it. Call it after writing to such weights in a
    way that PyTorch does not count: through ``weight.data``, a numpy array or another process.
    """
    from ..nn.linear import forget_packed
    from ..nn.quantized import Quantized

    for module in model.modules():
        if isinstance(module, Quantized):
            module.refresh()
        for p in module._parameters.values():
            if p is not None:
                forget_packed(p)
