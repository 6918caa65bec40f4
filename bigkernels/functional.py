"""The operators as functions."""

from .ops.attention import attention
from .ops.batch_norm import batch_norm
from .ops.cross_entropy import cross_entropy
from .ops.decode_attention import append_kv_, decode_attention
from .ops.glu import glu
from .ops.group_norm import group_norm
from .ops.layer_norm import layer_norm
from .ops.linear import linear
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.linear_distillation import linear_distillation
from .ops.linear_logprobs import linear_logprobs
from .ops.mlp import mlp
from .ops.quantized_linear import quantized_linear
from .ops.rms_norm import rms_norm
from .ops.rope import rope
from .ops.varlen_attention import varlen_attention
from .quantization import quantize_weight

__all__ = [
    "append_kv_",
    "attention",
    "batch_norm",
    "cross_entropy",
    "decode_attention",
    "glu",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_logprobs",
    "mlp",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "rope",
    "varlen_attention",
]
