"""PEFT: adapters on quantized layers.

A `bigkernels.nn.QuantizedLinear` is a linear layer to PEFT, so that ``get_peft_model``, ``PeftModel.from_pretrained``
and TRL take quantized models as they are, ``target_modules="all-linear"`` included. What this module adds: low-rank
adapters (LoRA, DoRA) can be merged into a format, and that initialisations that change the weight (PiSSA, OLoRA, CorDA,
LoRA-GA) put what is left of it into codes. `bigkernels.quantize` imports it where PEFT is loaded.
"""

# mypy: ignore-errors

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..nn.quantized_linear import QuantizedLinear
from ..quantization.layers import is_transposed, rows


class LoraQuantizedLinear(Linear):
    """PEFT's LoRA layer over a `QuantizedLinear`.

    Merging quantizes the sum of weight and updates again, in a format that needs no data, with a warning: what the
    rounding loses is in `merge_error`. Unmerging gives back the weight bit by bit. To merge without a loss,
    `bigkernels.dequantize` the model first.

    Attributes:
        merge_error: root mean square of what the last merge lost, relative to that of the update; None where nothing
            was merged.
    """

    merge_error: float | None = None

    def __init__(self, base_layer: QuantizedLinear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        transposed = _is_transposed(base_layer)
        if config.fan_in_fan_out != transposed:
            config = copy.copy(config)
            config.fan_in_fan_out = transposed
        kwargs["is_target_conv_1d_layer"] = transposed
        self.__dict__["_unmerged"] = ()
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._unmerged: tuple[QuantizedLinear, ...] = ()  # a tuple, so that it is no submodule

    @contextmanager
    def _plain(self) -> Iterator[nn.Module]:
        """The layer on a base whose weight can be written; what it was written to goes into codes."""
        base = self.base_layer
        dense = base.dequantize()
        before = rows(dense).detach().clone()
        if dense.bias is not None:
            dense.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
        self.base_layer = dense
        try:
            yield dense
        except BaseException:
            self.base_layer = base
            raise
        layer = base
        if not torch.equal(rows(dense), before):
            layer = base.requantized(rows(dense).detach()).requires_grad_(False)
            asked, got = rows(dense).detach().float(), layer.qweight.dequantize(torch.float32)
            update = (asked - before.float()).square().sum()
            self.merge_error = ((got - asked).square().sum() / update).sqrt().item()
        if dense.bias is not None and not torch.equal(dense.bias, base.bias):
            if layer is base:
                layer = base.requantized(before)
            layer.bias = dense.bias
        self.base_layer = layer

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not isinstance(self.base_layer, QuantizedLinear):  # dequantized since
            return super().merge(safe_merge, adapter_names)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return None
        before, merged = self.base_layer, list(self.merged_adapters)
        if self._unmerged:  # all of them into the weight that was there, which is rounded once
            (self.base_layer,) = self._unmerged
        original = self.base_layer
        self.merged_adapters.clear()
        try:
            with self._plain():
                super().merge(safe_merge, merged + names)
        except BaseException:
            self.base_layer, self.merged_adapters[:] = before, merged
            raise
        self._unmerged = (original,)
        warnings.warn(
            f"bigkernels: adapters are merged into {original.weight_format.name}, which rounds the sum of weight and "
            "updates; `merge_error` of a layer is what it lost, relative to the update. `unmerge` restores it bit by "
            "bit, and bigkernels.dequantize(model) before merging loses nothing",
            stacklevel=2,
        )
        return None

    def unmerge(self) -> None:
        if not self._unmerged:  # or merged since it was dequantized
            return super().unmerge()
        (self.base_layer,), self._unmerged = self._unmerged, ()
        self.merged_adapters.clear()
        self.merge_error = None
        return None


def _on_plain(name: str):
    def initialise(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self._plain():
            out = getattr(super(LoraQuantizedLinear, self), name)(*args, **kwargs)
        self.merge_error = None
        return out

    initialise.__name__ = name
    return initialise


for _name in ("pissa_init", "olora_init", "corda_init", "lora_ga_init", "mica_init"):
    if hasattr(Linear, _name):
        setattr(LoraQuantizedLinear, _name, _on_plain(_name))


def _is_transposed(module: nn.Module) -> bool:
    return module._shell is not None and is_transposed(module._shell.kind)


def register() -> None:
    """Let PEFT's LoRA put `LoraQuantizedLinear` on quantized layers; importing the module has done so already."""
    create, inject = LoraModel._create_new_module, BaseTuner.inject_adapter
    if getattr(create, "_bigkernels", False):
        return

    def create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, QuantizedLinear) and kwargs.get("parameter_name") is None:
            kwargs.pop("parameter_name", None)
            return LoraQuantizedLinear(target, adapter_name, config=lora_config, **kwargs)
        return create(lora_config, adapter_name, target, **kwargs)

    def inject_adapter(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = inject(self, model, *args, **kwargs)
        for path, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraQuantizedLinear):
                base = module.get_base_layer()
                if isinstance(base, QuantizedLinear) and _is_transposed(base):
                    raise ValueError(
                        f"bigkernels: {path} is a quantized Conv1D, which of PEFT's adapters LoRA alone supports"
                    )
        return out

    create_new_module._bigkernels = True
    LoraModel._create_new_module = staticmethod(create_new_module)
    BaseTuner.inject_adapter = inject_adapter


register()
