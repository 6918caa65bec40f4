"""bigkernels: kernels that make large models train, fine-tune and run faster in less memory."""

from . import _deprecated, checkpointing, functional, losses, memory, nn, optim, quantization, triton
from ._info import info
from ._version import __version__
from .checkpointing import apply_checkpointing, checkpoint, checkpointed, remove_checkpointing, saved_activations
from .gguf import load_gguf, save_gguf
from .integrations._folders import load_quantized, save_quantized
from .nn.linear import pack
from .ops import allow_nondeterministic, use
from .patch import LossMetrics, patch, patched, unpatch
from .quantization import dequantize, quantize, quantized, refresh

__all__ = [
    "LossMetrics",
    "__version__",
    "allow_nondeterministic",
    "apply_checkpointing",
    "checkpoint",
    "checkpointed",
    "checkpointing",
    "dequantize",
    "functional",
    "info",
    "load_gguf",
    "load_quantized",
    "losses",
    "memory",
    "nn",
    "optim",
    "pack",
    "patch",
    "patched",
    "plan",
    "quantization",
    "quantize",
    "quantized",
    "refresh",
    "remove_checkpointing",
    "save_gguf",
    "save_quantized",
    "saved_activations",
    "unpatch",
    "use",
]

triton.register()  # after the definitions of the operators


def __getattr__(name: str):
    # What plans are made with imports half of torch's compiler, and triton.
    if name == "plan":
        from .planning import plan

        return plan
    if name == "Cache":  # imports transformers
        from .program._cache_int8 import Cache

        return Cache
    if name == "reuse_memory":
        _deprecated.warn(__name__, name, "bigkernels.memory.reuse_memory")
        return memory.reuse_memory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
