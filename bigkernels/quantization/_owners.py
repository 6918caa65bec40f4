"""Libraries that keep, beside a model, how it is quantized."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

from torch import nn


def note(model: nn.Module) -> None:
    """Tell the models of transformers in `model` what they hold now, so that `save_pretrained` writes what
    `from_pretrained` reads again, or refuses, where this transformers is too old for that; and PEFT that there are
    quantized layers.
    """
    if "peft" in sys.modules:
        importlib.import_module("bigkernels.integrations.peft")
    models = sys.modules.get("transformers.modeling_utils")
    kind = getattr(models, "PreTrainedModel", None)
    owners = [m for m in model.modules() if kind is not None and isinstance(m, kind)]
    if not owners:
        return
    try:
        library = importlib.import_module("bigkernels.integrations.transformers")
    except ImportError:
        for m in owners:
            m.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bigkernels"))
        return
    library.note(model)
