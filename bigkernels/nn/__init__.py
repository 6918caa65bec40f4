"""Drop-in modules over the operators."""

from .cross_entropy import CrossEntropyLoss
from .glu import GatedMLP
from .layer_norm import LayerNorm
from .rms_norm import RMSNorm
from .rope import RotaryEmbedding

__all__ = ["CrossEntropyLoss", "GatedMLP", "LayerNorm", "RMSNorm", "RotaryEmbedding"]
