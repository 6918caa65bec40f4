"""Drop-in modules over the operators."""

from .attention import Attention
from .batch_norm import BatchNorm
from .cache import KVCache
from .cross_entropy import CrossEntropyLoss
from .glu import GatedMLP
from .group_norm import GroupNorm
from .layer_norm import LayerNorm
from .linear import Linear
from .linear_cross_entropy import LinearCrossEntropyLoss
from .lora import LoRALinear
from .mlp import MLP
from .quantized_embedding import QuantizedEmbedding
from .quantized_experts import QuantizedExperts
from .quantized_linear import QuantizedLinear
from .rms_norm import RMSNorm
from .rope import RotaryEmbedding

__all__ = [
    "Attention",
    "BatchNorm",
    "CrossEntropyLoss",
    "GatedMLP",
    "GroupNorm",
    "KVCache",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LoRALinear",
    "MLP",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "RMSNorm",
    "RotaryEmbedding",
]
