"""The former name of what `bigkernels.integrations.peft` does by itself; deprecated."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig


def on_quantized_layers(config: LoraConfig, model: Any = None) -> LoraConfig:
    """Deprecated: PEFT takes quantized layers for linear ones, so that any configuration will do. Returns `config`."""
    warnings.warn(
        "bigkernels: on_quantized_layers is no longer needed; give the configuration to PEFT as it is",
        DeprecationWarning,
        stacklevel=2,
    )
    importlib.import_module("bigkernels.integrations.peft")
    return config


def __getattr__(name: str) -> Any:
    if name == "LoraQuantizedLinear":
        return importlib.import_module("bigkernels.integrations.peft").LoraQuantizedLinear
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
