"""transformers: quantizing as `from_pretrained` reads files, saving and loading what is quantized, attention and
optimizers by name, and one object for `Trainer`.

Importing this module teaches transformers the quantization method "bigkernels", the attention implementation of that
name, and the optimizers ``TrainingArguments(optim="bigkernels_adamw_8bit")`` and the like::

    from bigkernels.integrations.transformers import Config, TrainerCallback

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=Config("int4"))
    model.save_pretrained(folder)  # a process that loads the folder imports this module first

    Trainer(model, args, train_dataset=data, callbacks=[TrainerCallback(optim="bigkernels_adamw_8bit")])
"""

from __future__ import annotations

from typing import Any

from ._attention import attention_forward, register_attention
from ._config import Config
from ._optimizers import optimizer_cls_and_kwargs, register_optimizers
from ._quantizer import Quantizer, forget, note, plain_saving, register_quantizer

__all__ = ["Config", "Quantizer", "TrainerCallback", "attention_forward", "forget", "note", "optimizer_cls_and_kwargs",
           "plain_saving", "register"]  # fmt: skip


def register() -> None:
    """Teach transformers the names; importing the module has done so already."""
    register_quantizer()
    register_attention()
    register_optimizers()


def __getattr__(name: str) -> Any:
    if name == "TrainerCallback":  # it needs the trainer of transformers, which takes a second to import
        from ._training import TrainerCallback

        return TrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
