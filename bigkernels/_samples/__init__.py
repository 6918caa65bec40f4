"""Small sample inputs of every operator: what `bigkernels check` and the tests run.

They cover every option, odd sizes, empty tensors and strided inputs. A new operator adds one entry to `SAMPLES`.
"""

from . import attention, decode_attention, images, linear, linear_cross_entropy, mlp, quantized_linear, rows
from ._sample import Draw, Sample, widen

SAMPLES: dict[str, list[Sample]] = {
    "rms_norm": rows.RMS_NORM,
    "layer_norm": rows.LAYER_NORM,
    "rope": rows.ROPE,
    "glu": rows.GLU,
    "cross_entropy": rows.CROSS_ENTROPY,
    "attention": attention.ATTENTION,
    "varlen_attention": attention.VARLEN_ATTENTION,
    "decode_attention": decode_attention.DECODE_ATTENTION,
    "linear": linear.LINEAR,
    "linear_cross_entropy": linear_cross_entropy.LINEAR_CROSS_ENTROPY,
    "quantized_linear": quantized_linear.QUANTIZED_LINEAR,
    "mlp": mlp.MLP,
    "group_norm": images.GROUP_NORM,
    "batch_norm": images.BATCH_NORM,
}

__all__ = ["SAMPLES", "Draw", "Sample", "widen"]
