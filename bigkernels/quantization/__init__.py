"""Weights in 8 and 4 bits: the formats, and quantizing weights and whole models.

A format is a frozen dataclass: how rows of a weight become named plain tensors, and how the operator reads these. What
is stored is the same on every device; nothing is packed for a kernel.
"""

from .._deprecated import renamed_functions
from . import checkpoints
from ._model import dequantize, quantize, quantized, refresh
from ._report import QuantizeReport
from ._weight import QuantizedWeight, quantize_weight
from .blocks import GGUFBlocks
from .book4 import FP4, NF4
from .format import Format, resolve_format
from .fp8 import FP8, FP8Dynamic
from .int4 import Int4
from .int8 import Int8, Int8Dynamic
from .mxfp4 import MXFP4
from .q4_1 import Q4_1
from .q8_0 import Q8_0
from .qat import FakeQuantizedEmbedding, FakeQuantizedLinear, fake_quantize, prepare_qat

__all__ = [
    "FP4",
    "FP8",
    "FP8Dynamic",
    "MXFP4",
    "NF4",
    "Q4_1",
    "Q8_0",
    "FakeQuantizedEmbedding",
    "FakeQuantizedLinear",
    "Format",
    "GGUFBlocks",
    "Int4",
    "Int8",
    "Int8Dynamic",
    "QuantizeReport",
    "QuantizedWeight",
    "checkpoints",
    "dequantize",
    "fake_quantize",
    "prepare_qat",
    "quantize",
    "quantize_weight",
    "quantized",
    "refresh",
    "resolve_format",
]

__getattr__ = renamed_functions(__name__, globals(), named="resolve_format")
