"""transformers: quantizing as `from_pretrained` reads files, saving and loading what is quantized, attention by name.

Importing this module teaches transformers the quantization method "bigkernels" and the attention implementation of that
name::

    from bigkernels.integrations.transformers import Config

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=Config("int4"))
    model.save_pretrained(folder)  # a process that loads the folder imports this module first
"""

from ._attention import attention_forward, register_attention
from ._config import Config
from ._quantizer import Quantizer, forget, note, plain_saving, register_quantizer

__all__ = ["Config", "Quantizer", "attention_forward", "forget", "note", "plain_saving", "register"]


def register() -> None:
    """Teach transformers the names; importing the module has done so already."""
    register_quantizer()
    register_attention()


register()
