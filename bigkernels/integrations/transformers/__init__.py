"""transformers: quantizing as `from_pretrained` reads files, saving and loading what is quantized, attention and
optimizers by name, and one object for `Trainer`.

Importing this module teaches transformers the quantization method "bigkernels", the attention implementation of that
name, and the optimizers ``TrainingArguments(optim="bigkernels_adamw_8bit")`` and the like::

    from bigkernels.integrations.transformers import Config, TrainerCallback

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=Config("int4"))
    model.save_pretrained(folder)  # a process that loads the folder imports this module first

    bigkernels.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)  # in the codes of the file

    Trainer(model, args, train_dataset=data, callbacks=[TrainerCallback(optim="bigkernels_adamw_8bit")])
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ._attention import attention_forward, register_attention
from ._config import Config
from ._gguf import register_gguf
from ._optimizers import optimizer_cls_and_kwargs, register_optimizers
from ._quantizer import Quantizer, forget, note, plain_saving, register_quantizer

if TYPE_CHECKING:
    from ._training import TrainerCallback

__all__ = [
    "Config",
    "Quantizer",
    "TrainerCallback",
    "attention_forward",
    "forget",
    "note",
    "optimizer_cls_and_kwargs",
    "plain_saving",
    "register",
]


def register(published: bool | Collection[str] | None = None, *, gguf: bool | None = None) -> None:
    """Teach transformers to read files that others wrote: GGUF, and quantized folders of other libraries. Its own names
    (the method "bigkernels", attention, optimizers) it has learned when this module was imported.

    Args:
        published: methods whose folders `from_pretrained` reads by bigkernels from now on, as
            `bigkernels.load_quantized` does, where otherwise the library that made them would have to be installed:
            names among "gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq", "mxfp4" and "torchao", or True for
            all. Those that are not named are read by their owners again; None leaves it as it is. Quantizing while
            loading (a `BitsAndBytesConfig` given to `from_pretrained`) stays with the owners.
        gguf: whether ``from_pretrained(folder, gguf_file=name)`` keeps the codes of the file from now on, as
            `bigkernels.load_gguf` does, where transformers by itself dequantizes. None leaves it as it is, but
            ``register()``, with nothing named, is True.

    Raises:
        ValueError: there is no such method.
    """
    _register_names()
    if gguf is not None or published is None:
        register_gguf(gguf is not False)
    if published is not None:
        from ._published import register_published

        register_published(published)


def _register_names() -> None:
    register_quantizer()
    register_attention()
    register_optimizers()


def __getattr__(name: str) -> Any:
    if name == "TrainerCallback":  # it needs the trainer of transformers, which takes a second to import
        from ._training import TrainerCallback

        return TrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register_names()
