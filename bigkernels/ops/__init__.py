"""The operators: one file each, holding its whole contract."""

import torch

from .._load import cpu_library, cuda_library
from . import (
    attention,
    batch_norm,
    compress,
    cross_entropy,
    decode_attention,
    glu,
    group_norm,
    grouped_linear,
    layer_norm,
    linear,
    linear_cross_entropy,
    mlp,
    optimizer,
    program,
    quantized_linear,
    rms_norm,
    rope,
    varlen_attention,
)
from .registry import OPERATORS, allow_nondeterministic, use

torch.library.define("bigkernels::cpu_isa", "() -> str")
# For tests: from how many bytes on CPU kernels use a second thread, and store past the caches. Returns those before.
torch.library.define("bigkernels::thresholds", "(int grain, int stream) -> (int, int)")

# After the definitions: a library only implements schemas that exist.
if cpu_library().reason is None:
    torch.ops.bigkernels.cpu_isa()  # an unknown BIGKERNELS_CPU_ISA is an error now, not at some first call
cuda_library()
for operator in OPERATORS.values():
    operator.prepare(None)

__all__ = [
    "OPERATORS",
    "allow_nondeterministic",
    "attention",
    "batch_norm",
    "compress",
    "cross_entropy",
    "decode_attention",
    "glu",
    "group_norm",
    "grouped_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "optimizer",
    "program",
    "quantized_linear",
    "rms_norm",
    "rope",
    "use",
    "varlen_attention",
]
