"""What of a model is quantized or adapted, as JSON says it, and a model without values made so again."""

# mypy: ignore-errors

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import LoRALinear, QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from ...nn.quantized import Quantized
from ...quantization import Format, quantize_weight
from ...quantization.layers import is_linear, rows
from ...quantization.qat import plain_kind
from ...quantization.select import places, put
from ._config import as_dict, from_dict


def quantized(model: nn.Module) -> dict[str, Quantized]:
    """The modules with codes by their (first) path; of layers under an adapter, the path of the adapter."""
    quantized = {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}
    return {_plain(model, path): module for path, module in quantized.items()}


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def describe(model: nn.Module) -> dict[str, Any]:
    """`formats`, `tied` and `adapters` of `Config`."""
    held, lora = quantized(model), adapters(model)
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    named = {path: (m.weight_format, None if m.dtype == usual else _name(m.dtype)) for path, m in held.items()}
    formats = []
    for (config, dtype), names in _collapsed(named, model).items():
        formats.append(as_dict(config) | ({} if dtype is None else {"dtype": dtype}) | {"layers": names})
    tied, first = {}, {}
    for path, module in held.items():
        source = first.setdefault(id(module._tie or module), path)
        if source != path:
            tied[path] = source
    by_options = {path: (m.rank, m.alpha, m.dropout, _name(m.lora_a.dtype)) for path, m in lora.items()}
    made = [
        dict(zip(("rank", "alpha", "dropout", "dtype"), options, strict=True)) | {"layers": names}
        for options, names in _collapsed(by_options, model).items()
    ]
    return {"formats": formats, "tied": tied, "adapters": made}


def build(model: nn.Module, held: Mapping[str, Any]) -> dict[str, str]:
    """Make the layers that `describe` found of a model without values.

    Returns:
        The layers of this model that read the codes of another: path and path.

    Raises:
        ValueError: a description is none, or a layer cannot be so.
    """
    names = list(dict.fromkeys(candidates(model)))
    prefix = getattr(model, "base_model_prefix", "")
    where = {path: paths for paths in places(model).values() for path in paths}
    formats = _by_name(held["formats"])
    for group in held["formats"]:
        from_dict({key: value for key, value in group.items() if key not in ("layers", "dtype")})
    for name in names:
        if (found := _found(formats, name, prefix)) is not None:
            stand(
                model,
                where,
                name,
                from_dict({k: v for k, v in found.items() if k not in ("layers", "dtype")}),
                found.get("dtype"),
            )
    lora = _by_name(held["adapters"])
    for name in names:
        if (found := _found(lora, name, prefix)) is None:
            continue
        base = model.get_submodule(name)
        try:
            adapter = LoRALinear(base, found["rank"], found["alpha"], found["dropout"], dtype=_dtype(found["dtype"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"bigkernels: config.json describes the adapter {name} as {found}") from error
        put(model, where[name], adapter.train(base.training))
    sources = {path: _found(held["tied"], path, prefix) for path in names}
    return {
        path: next((n for n in _spellings(source, prefix) if n in sources), None)
        for path, source in sources.items()
        if source is not None
    }


def stand(
    model: nn.Module,
    where: Mapping[str, list[str]],
    name: str,
    config: Format,
    dtype: str | None = None,
) -> Quantized:
    """Put a module with codes in the place of a layer, or of a parameter with experts, of which it has the size.

    Args:
        where: all paths of each layer, by any of them.
    """
    owner, _, key = name.rpartition(".")
    parent = model.get_submodule(owner)
    module = parent._modules.get(key)
    if module is None:
        weight = _typed(parent._parameters[key], dtype)
        stand_in = QuantizedExperts.from_parameter(weight, config, transposed=getattr(parent, "is_transposed", False))
        delattr(parent, key)
        setattr(parent, key, stand_in.train(parent.training))
        return stand_in
    kind = plain_kind(module)
    layer = QuantizedEmbedding if kind is nn.Embedding else QuantizedLinear
    qweight = quantize_weight(_typed(rows(module, kind), dtype), config)
    stand_in = layer.standing_for(module, qweight, kind)
    put(model, where[name], stand_in)
    return stand_in


def _typed(weight: Tensor, dtype: str | None) -> Tensor:
    return weight if dtype is None else weight.to(_dtype(dtype))


def candidates(model: nn.Module) -> Iterator[str]:
    """What a format can be of: linear layers, embeddings, and the weights of experts."""
    for path, module in model.named_modules():
        kind = plain_kind(module)
        if path and (is_linear(kind) or kind is nn.Embedding or isinstance(module, (Quantized, LoRALinear))):
            yield _plain(model, path)
        for key, p in module._parameters.items():
            if p is not None and p.dim() == 3:
                yield f"{path}.{key}".lstrip(".")


def _plain(model: nn.Module, path: str) -> str:
    owner, _, key = path.rpartition(".")
    adapted = key == "base" and isinstance(model.get_submodule(owner), LoRALinear)
    return owner if adapted else path


def _general(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _collapsed(named: Mapping[str, Hashable], model: nn.Module) -> dict[Hashable, list[str]]:
    """The names of each kind; those that differ by numbers alone are one, if all of the model are of that kind."""
    kinds = defaultdict(set)
    for name in candidates(model):
        kinds[_general(name)].add(named.get(name))
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, kind in named.items():
        general = _general(name)
        wanted = general if kinds[general] == {kind} else name
        if wanted not in groups[kind]:
            groups[kind].append(wanted)
    return groups


def _by_name(groups: Any) -> dict[str, dict]:
    try:
        return {str(name): dict(group) for group in groups for name in group["layers"]}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"bigkernels: the quantization_config of config.json is damaged: {groups}") from error


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    """A name, and what it is in a model inside of this one, or around it."""
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


def _found(table: Mapping[str, Any], name: str, prefix: str) -> Any:
    spelled = _spellings(name, prefix)
    return next((table[key] for key in (*spelled, *map(_general, spelled)) if key in table), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"bigkernels: config.json names the dtype {name!r}, which is none")
    return dtype
