"""Quantizing weights as `from_pretrained` reads them."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from ...nn import QuantizedExperts
from ...quantization import QuantizedWeight, QuantizeReport, quantize_weight
from ...quantization._ties import name_codes
from ...quantization.layers import is_transposed
from ...quantization.qat import plain_kind
from ...quantization.select import Chosen, put, select
from ._config import Config


class ReadingBase(ConversionOps):
    """An operation of transformers' loader that puts modules in the places of weights.

    Attributes:
        chosen: the names of the weights that it is for.
        grouped: the paths of layers that share their codes with another.
    """

    chosen: Mapping[str, Any]
    grouped: list[str]


class Reading(ReadingBase):
    """An operation of transformers' loader: a weight that it read goes into codes, and its layer into one that holds
    these. A model holds the layers that were read in codes, and the others without values.

    Attributes:
        chosen: by the name of each weight, what it is of: layers that share it, or None for experts.
        grouped: the paths of layers that share their codes with another.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        if config.format is None:
            raise ValueError("bigkernels: quantization_config names no format; as in Config('int4')")
        for target, source in getattr(model, "all_tied_weights_keys", {}).items():
            owner, _, key = target.rpartition(".")
            try:
                shared = model.get_parameter(source)
            except AttributeError:
                continue
            model.get_submodule(owner)._parameters[key] = shared
        self.report = QuantizeReport()
        selection = select(model, config.format, config.skip, None, config.embeddings, self.report)
        self.chosen: dict[str, list[Chosen] | None] = {}
        self._formats = selection.experts
        for members in (*([one] for one in selection.alone), *selection.shared):
            for member in members:
                self.chosen |= {f"{path}.weight": members for path in member.paths}
        self.chosen |= dict.fromkeys(selection.experts)
        self.grouped = [path for members in selection.shared for member in members for path in member.paths]

    def bytes_an_element(self, name: str, param: Tensor) -> float:
        members = self.chosen[name]
        config = self._formats[name] if members is None else members[0].format.blind()
        flat = torch.empty(param.shape[-2:], dtype=param.dtype, device="meta")
        return quantize_weight(flat, config).nbytes / max(flat.numel(), 1)

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        kept = {}
        for name, held in input_dict.items():
            weight = held[0] if isinstance(held, list) else held
            if name not in self.chosen:
                kept[name] = weight
                continue
            try:
                done = (self._experts if self.chosen[name] is None else self._layers)(model, name, weight)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            (missing_keys if missing_keys is not None else set()).difference_update(done)
        return kept

    def _experts(self, model: nn.Module, name: str, weight: Tensor) -> list[str]:
        owner, _, key = name.rpartition(".")
        parent = model.get_submodule(owner)
        before = parent._parameters[key]
        if weight.shape != before.shape:
            raise ValueError(f"bigkernels: it has shape {tuple(weight.shape)}, expected {tuple(before.shape)}")
        experts = QuantizedExperts.from_parameter(
            weight, self._formats[name], transposed=getattr(parent, "is_transposed", False)
        )
        experts._trained = before.requires_grad
        delattr(parent, key)
        setattr(parent, key, experts.train(parent.training))
        return [name]

    def _layers(self, model: nn.Module, name: str, weight: Tensor) -> list[str]:
        from ...nn import QuantizedEmbedding, QuantizedLinear
        from ...nn.quantized import Quantized

        members = self.chosen[name]
        first = members[0]
        current = [model.get_submodule(member.path) for member in members]
        shape = first.module.weight.shape
        if weight.shape != shape:
            raise ValueError(f"bigkernels: it has shape {tuple(weight.shape)}, expected {tuple(shape)}")
        transposed = is_transposed(plain_kind(first.module))
        qweight = quantize_weight(weight.T if transposed else weight, first.format.blind())
        if any(isinstance(m, Quantized) for m in current):  # the file has the weight of each of several tied layers
            if not _equal(current[0].qweight, qweight):
                raise ValueError(
                    "bigkernels: layers that the model ties have different weights in the checkpoint; set "
                    "tie_word_embeddings=False in its config, or leave them out by `skip`"
                )
            return [f"{path}.weight" for member in members for path in member.paths]
        source = None
        for member in members:
            kind = plain_kind(member.module)
            layer = QuantizedEmbedding if kind is nn.Embedding else QuantizedLinear
            stand_in = layer.standing_for(member.module, qweight, kind)
            put(model, member.paths, stand_in)
            if source is None:
                source = stand_in
            else:
                stand_in.share(source)
                stand_in._tied_weights_keys = {key: f"{first.path}.{key}" for key in qweight.tensors}
        if source is not None and len(members) > 1:
            stored = tuple(qweight.tensors)
            name_codes(model, {path: stored for member in members for path in member.paths})
        return [f"{path}.weight" for member in members for path in member.paths]


def _equal(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())
