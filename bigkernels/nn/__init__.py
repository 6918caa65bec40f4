"""Drop-in modules over the operators."""

from .attention import Attention
from .cache import KVCache
from .cross_entropy import CrossEntropyLoss
from .glu import GatedMLP
from .layer_norm import LayerNorm
from .linear import Linear
from .linear_cross_entropy import LinearCrossEntropyLoss
from .lora import LoRALinear
from .quantized_embedding import QuantizedEmbedding
from .quantized_experts import QuantizedExperts
from .quantized_linear import QuantizedLinear
from .rms_norm import RMSNorm
from .rope import RotaryEmbedding

__all__ = [
    "Attention",
    "CrossEntropyLoss",
    "GatedMLP",
    "KVCache",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LoRALinear",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "RMSNorm",
    "RotaryEmbedding",
]
