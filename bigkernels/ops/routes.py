"""Who computes what on GPUs, by compute capability: our kernels, or those of PyTorch and cuBLAS where these are faster.

One table, whose rows say what they rest on. `bigkernels info` prints it, `BIGKERNELS_LOG=1` logs the first choice of
each kind of call, and `use("triton")` or `use("torch")` goes before it.

The rule behind it: what a model had before `patch` is never exchanged for something that is slower, so rows that name
our kernels need a measurement, or an option that nothing else takes.
"""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._torch_private import MATRIX_UNITS, constant_to_the_compiler, lacks
from . import registry
from .registry import log, needs_grad

FEW_ROWS = 64  # queries times heads on one head of keys: what decode attention takes
MANY_TOKENS = 256  # of quantized layers: with more, decoding the weight once costs less than decoding it in each tile
INTEGER_TOKENS = 16  # `torch._int_mm` takes more than these on GPUs
_MUCH = 2**33  # products of scores from which on it pays to set the order of PyTorch's backends, which takes 25 us

Capability = tuple[int, int]


@dataclass(frozen=True)
class Route:
    """One row.

    Attributes:
        operator, call: of which calls it speaks.
        since, before: the compute capabilities [since, before).
        by: "triton", "gluon" (for Hopper alone) and "cuda", which are ours, or a library: "cudnn" and "flash" by
            `scaled_dot_product_attention`, "cublas", "_int_mm", "_scaled_mm", or "torch" where the choice is PyTorch's.
        evidence: "measured" by us, "published" by others, or "predicted" from machine code and bandwidths.
        source: of the evidence.
    """

    operator: str
    call: str
    since: Capability
    before: Capability
    by: str
    evidence: str
    source: str

    @property
    def ours(self) -> bool:
        return self.by in ("triton", "cuda")

    def __str__(self) -> str:
        return f"{self.operator}, {self.call}: {self.by} ({self.evidence}: {self.source})"


_FIRST, _END = (0, 0), (99, 0)
_ONLY = "no kernel of PyTorch's takes these options without a dense mask"
TABLE: tuple[Route, ...] = (
    Route("attention", "plain", (9, 0), _END, "cudnn", "published",
          "H100, D 128: 600 TFLOP/s forward, 518 backward; FlashAttention 2 370 and 320 (FlashAttention 3 paper)"),
    Route("attention", "plain", (8, 0), (9, 0), "flash", "published",
          "A100: FlashAttention 2 225 TFLOP/s, the same algorithm in Triton less (FlashAttention 2 paper)"),
    Route("attention", "plain", _FIRST, (8, 0), "torch", "predicted",
          "what models have; ours was never measured there"),
    Route("attention", "plain, float32", _FIRST, _END, "torch", "predicted",
          "what models have; ours was never measured there"),
    Route("attention", "plain, few queries", _FIRST, _END, "torch", "predicted",
          "bound by launches: one call of PyTorch's takes 15 us of the host, our two launches 20"),
    Route("attention", "deterministic gradients", _FIRST, _END, "triton", "predicted",
          "PyTorch's backward adds up by atomics unless told otherwise, and then slowly"),
    Route("attention", "odd heads", _FIRST, _END, "triton", "predicted", "PyTorch's kernels pad heads in copies"),
    Route("attention", "masked", _FIRST, _END, "triton", "predicted",
          "PyTorch runs masks by its memory-efficient kernels alone, which skip no blocks"),
    Route("attention", "masked, one query of a model", _FIRST, _END, "torch", "predicted",
          "what models have: of static caches; ours does not cut the keys into parts where there is a mask"),
    Route("attention", "ours on Hopper", _FIRST, _END, "triton", "predicted",
          "'gluon', kernels for 9.0 alone, once a GPU has run them; use(\"gluon\") or BIGKERNELS_GLUON=1 until then"),
    Route("attention", "with options", _FIRST, _END, "triton", "predicted", _ONLY),
    Route("varlen_attention", "packed", _FIRST, _END, "triton", "predicted", "models mask the other sequences densely"),
    Route("decode_attention", "over a cache", _FIRST, _END, "triton", "predicted",
          "PyTorch's kernels take no lengths, no pages and no 8-bit keys"),
    Route("quantized_linear", "few tokens", _FIRST, _END, "triton", "predicted", "bound by reading the codes"),
    Route("quantized_linear", "few tokens, in fragments", _FIRST, (8, 0), "triton", "predicted",
          "the CUDA kernels for 1 to 64 tokens copy asynchronously, which needs 8.0"),
    Route("quantized_linear", "few tokens, in fragments", (8, 0), _END, "triton", "predicted",
          "the CUDA kernels for 1 to 64 tokens have run on no GPU; use('cuda') or BIGKERNELS_FRAGMENTS=1 takes them, "
          "with a copy of the codes"),
    Route("quantized_linear", "few tokens, in fragments, backward", _FIRST, _END, "triton", "predicted",
          "the same kernels, from the same copy"),
    Route("quantized_linear", "many tokens", _FIRST, _END, "cublas", "predicted",
          "H200, 2048 tokens, 4096 x 4096: 18 us to decode once and 87 us of cuBLAS, ours 165 us"),
    Route("quantized_linear", "many tokens, float32", _FIRST, _END, "triton", "predicted",
          "three products of tf32 are faster than those of float32"),
    Route("quantized_linear", "int8-dynamic, many tokens", _FIRST, _END, "_int_mm", "predicted",
          "H200: 1300 TOP/s, ours 800 to 1000"),
    Route("quantized_linear", "fp8-dynamic", (9, 0), _END, "_scaled_mm", "published",
          "H100: 1.3 to 1.5 times the throughput of bfloat16 (torchao)"),
    Route("quantized_linear", "fp8-dynamic", _FIRST, (9, 0), "cublas", "predicted",
          "no scales by row in hardware: rounded tokens in 16 bits"),
)  # fmt: skip

_capabilities: dict[int, Capability] = {}


@constant_to_the_compiler
def _capability(index: int) -> Capability:
    capability = _capabilities.get(index)
    if capability is None:
        capability = _capabilities[index] = torch.cuda.get_device_capability(index)
    return capability


def capability_of(t: Tensor) -> Capability | None:
    """The compute capability of a tensor's device; None where there is none, and so no route."""
    return _capability(t.get_device()) if t.is_cuda else None


_logged: set[tuple] = set()


def find(operator: str, call: str, capability: Capability) -> Route:
    """The row of a kind of call."""
    for row in TABLE:
        if row.operator == operator and row.call == call and row.since <= capability < row.before:
            if not torch.compiler.is_compiling() and (operator, call, capability) not in _logged:
                _logged.add((operator, call, capability))
                log.info("%s on a GPU of capability %d.%d", row, *capability)
            return row
    raise LookupError(f"bigkernels: no route for {operator}, {call} on {capability}")


def routes(capability: Capability) -> list[Route]:
    """The rows that hold for a device."""
    return [row for row in TABLE if row.since <= capability < row.before]


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int,
    right: int,
    masked: bool,
    others: bool,
    deterministic: bool,
    of_model: bool = False,
) -> str:
    """The kind of a call, as the table names them. `others` are options beside mask, window and scale; `deterministic`
    is whether equal inputs have to give equal gradients; `of_model`, whether PyTorch's attention was there before.
    """
    queries, keys = q.shape[2], k.shape[2]
    causal = right == 0 and queries > 1
    if others or left >= 0 or right > 0 or (causal and queries != keys):
        return "with options"
    if masked:
        return "masked, one query of a model" if of_model and queries == 1 and not needs_grad(q, k, v) else "masked"
    size = q.shape[3]
    if size != v.shape[3] or size % 8 or size > 256:
        return "odd heads"
    if deterministic and needs_grad(q, k, v):
        return "deterministic gradients"
    if q.dtype == torch.float32:
        return "plain, float32"
    if queries * (q.shape[1] // k.shape[1]) <= FEW_ROWS:
        return "plain, few queries"
    return "plain"


def by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int,
    right: int,
    scale: float | None,
    masked: bool,
    others: bool,
    deterministic: bool,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor | None:
    """Attention by PyTorch's kernels, with the gradients that these have, where the table says so; else None.

    `mask` is given where it was PyTorch's that the call took the place of: rows that see nothing are then as they were.

    Raises:
        RuntimeError: PyTorch's are forced and do not take this.
    """
    forced = registry._forced
    capability = capability_of(q)
    if capability is None or (forced is not None and forced != "torch") or not _fits(q, k, v):
        return None
    call = attention_call(
        q,
        k,
        v,
        left=left,
        right=right,
        masked=masked,
        others=others,
        deterministic=deterministic,
        of_model=mask is not None,
    )
    row = find("attention", call, capability)
    if forced == "torch":
        if call in ("with options", "masked"):  # a mask of ours is not one of theirs
            raise RuntimeError(f"bigkernels.functional.attention: 'torch' was forced but this call is one {call}")
    elif row.ours or not torch.backends.cuda.flash_sdp_enabled():  # whoever switched it off wants no fused kernel
        return None
    causal = right == 0 and q.shape[2] > 1
    much = q.numel() * k.shape[2] >= _MUCH
    backends = _order() if much and row.by == "cudnn" else None
    options = {
        "attn_mask": mask,
        "is_causal": causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if backends is None:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are what `attention` takes; PyTorch broadcasts, so that not all that it takes is right."""
    if not q.dim() == k.dim() == v.dim() == 4 or not q.dtype == k.dtype == v.dtype:
        return False
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3] or not k.shape[1]:
        return False
    inside = q.dtype in registry.KERNEL_DTYPES and q.numel() > 0 and k.numel() > 0 and v.numel() > 0
    return inside and q.shape[1] % k.shape[1] == 0


def _order() -> list[SDPBackend] | None:
    """PyTorch's backends with the table's choice before the others; None where the order is right or is the user's."""
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return None
    if _active_flash() is not None:  # FlashAttention 3 or 4 in the place of PyTorch's own, by the user's wish
        return None
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if torch.backends.cuda.mem_efficient_sdp_enabled():
        order.append(SDPBackend.EFFICIENT_ATTENTION)
    if torch.backends.cuda.math_sdp_enabled():
        order.append(SDPBackend.MATH)
    return order


def _active_flash() -> str | None:
    """The FlashAttention that `torch.nn.attention.activate_flash_attention_impl` put in place, if that was called."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current is not None else None


# ---- quantized layers ------------------------------------------------------------------------------------------------


def takes_scaled_mm(x: Tensor, codes: Tensor) -> bool:
    """Whether `torch._scaled_mm` multiplies tokens (..., K) with codes (N, K) of fp8, scaled by rows: in bfloat16
    alone, in rows of 16 bytes.
    """
    n, k = codes.shape
    if lacks(MATRIX_UNITS) or x.dtype != torch.bfloat16 or k % 16 or n % 16 or not k or not n or not x.numel():
        return False
    capability = None if registry.is_forced("triton") else capability_of(x)
    return capability is not None and find("quantized_linear", "fp8-dynamic", capability).by == "_scaled_mm"
