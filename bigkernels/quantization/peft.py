"""PEFT's low-rank adapters on quantized layers."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..nn.quantized_linear import QuantizedLinear
from ._layers import is_linear


def on_quantized_layers(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """Let a `peft.LoraConfig` put its adapters on `QuantizedLinear` layers too; returns it. "all-linear", which PEFT
    resolves by classes that it knows, needs the model.

    ``get_peft_model(model, on_quantized_layers(LoraConfig(target_modules=["q_proj"])))`` works as on a plain model.
    Merging quantizes the sum of weight and adapters again, in a format that needs no data; unmerging gives back the
    weight bit by bit.

    Raises:
        ValueError: "all-linear" without a model.
    """
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        if model is None:
            raise ValueError('bigkernels.quantization.peft: for target_modules="all-linear" give the model too')
        head = getattr(model, "get_output_embeddings", lambda: None)()
        config.target_modules = {
            name for name, m in model.named_modules()
            if (isinstance(m, (nn.Linear, QuantizedLinear)) or is_linear(type(m))) and m is not head
        }  # fmt: skip
    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
    return config


class LoraQuantizedLinear(Linear):
    """PEFT's LoRA layer over a `QuantizedLinear`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unmerged: tuple[QuantizedLinear, ...] = ()  # a tuple, so that it is no submodule

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self.base_layer
        weight = base.qweight.dequantize(torch.float32)
        for name in names:
            delta = self.get_delta_weight(name).float()
            weight = weight + (delta.T if self.fan_in_fan_out else delta)
        if safe_merge and not weight.isfinite().all():
            raise ValueError(f"bigkernels: merging {', '.join(names)} gives a weight that is not finite")
        self._unmerged = self._unmerged or (base,)
        self.base_layer = base.requantized(weight).requires_grad_(False)
        self.merged_adapters += names

    def unmerge(self) -> None:
        if self._unmerged:
            (self.base_layer,), self._unmerged = self._unmerged, ()
            self.merged_adapters.clear()
