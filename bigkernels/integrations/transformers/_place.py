"""Weights that come in codes, put into a model by transformers' loader."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import QuantizedExperts
from ...published._packed import Packed
from ...quantization.layers import is_transposed
from ...quantization.qat import plain_kind
from ...quantization.select import places, put
from ._config import Config
from ._held import candidates
from ._read import ReadingBase


class Placed:
    """What `from_pretrained` gets of a folder of another library.

    Attributes:
        state: by name, what has ``[...]`` that gives a tensor or a `Packed`.
        config: the quantization_config that goes with it.
        dense: layers whose weights are tensors though the folder has them in codes.
        errors: what was wrong with weights.
    """

    def __init__(self, config: Config, state: Mapping[str, Any]) -> None:
        self.state, self.config = state, config
        self.dense: list[str] = []
        self.errors: list[ValueError] = []
        config.reading = lambda model, _: Placing(model, self.dense, self.errors, state)


class Placing(ReadingBase):
    """The operation of transformers' loader."""

    def __init__(self, model: nn.Module, dense: list[str], errors: list[ValueError], state: Mapping[str, Any]) -> None:
        self.dense, self.errors, self.grouped = dense, errors, []
        self.coded = {name for name, held in state.items() if not hasattr(held, "get_shape")}
        self.where = {path: paths for paths in places(model).values() for path in paths}
        names = list(candidates(model))
        self.chosen = dict.fromkeys(
            [
                *(f"{name}.weight" for name in names if name in self.where),
                *(name for name in names if name not in self.where),
            ]
        )

    def bytes_an_element(self, name: str, param: Tensor) -> float:
        return param.element_size()

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        kept = {}
        for name, held in input_dict.items():
            found = held[0] if isinstance(held, list) else held
            try:
                if isinstance(found, Packed):
                    self._place(model, name, found)
                else:
                    kept[name] = self._plain(model, name, found)
                    continue
            except ValueError as error:
                self.errors.append(error)  # transformers would tell its text alone, in a log
                raise
            if missing_keys is not None:
                missing_keys.discard(name)
        return kept

    def _plain(self, model: nn.Module, name: str, found: Tensor) -> Tensor:
        owner, _, key = name.rpartition(".")
        before = getattr(model.get_submodule(owner), key)
        if name in self.coded:
            self.dense.append(name.removesuffix(".weight"))
            parent = model.get_submodule(owner)
            if is_transposed(type(parent)) or (found.dim() == 3 and getattr(parent, "is_transposed", False)):
                found = found.transpose(-2, -1).contiguous()
        if found.shape != before.shape:
            raise ValueError(
                f"bigkernels.load_quantized: {name} has shape {tuple(found.shape)}, expected {tuple(before.shape)}"
            )
        return found.to(before.dtype)

    def _place(self, model: nn.Module, name: str, packed: Packed) -> None:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        before = module._parameters[key]
        if len(packed.shape) == 3:
            transposed = getattr(module, "is_transposed", False)
            shape = (packed.shape[0], packed.shape[2], packed.shape[1]) if transposed else tuple(packed.shape)
            experts = QuantizedExperts(packed.qweight(before.dtype), packed.shape[0], transposed, before.requires_grad)
        else:
            from ...nn import QuantizedEmbedding, QuantizedLinear

            kind = plain_kind(module)
            shape = tuple(reversed(packed.shape)) if is_transposed(kind) else tuple(packed.shape)
            layer = QuantizedEmbedding if kind is nn.Embedding else QuantizedLinear
        if shape != tuple(before.shape):
            raise ValueError(f"bigkernels.load_quantized: {name} has shape {shape}, expected {tuple(before.shape)}")
        if len(packed.shape) == 3:
            delattr(module, key)
            setattr(module, key, experts.train(module.training))
        else:
            put(model, self.where[owner], layer.standing_for(module, packed.qweight(before.dtype), kind))
