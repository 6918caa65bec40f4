"""Attention for training on GPUs: the launches; `varlen_attention` shares them.

Sizes of tiles stand in tables, one for each kind of GPU (`_tiles.py`); nothing is tuned at run time.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import attention as op
from ..ops._dropout import dropout_threshold
from ..ops.registry import KERNEL_DTYPES, is_forced, nondeterministic
from . import _hopper
from ._attention import attend
from ._attention_backward import backward_bias, backward_keys, backward_queries
from ._attention_backward import delta as delta_kernel
from ._launch import capability, launch, power_of_2
from ._tiles import LARGEST, tiles
from .decode_attention import serve_attention
from .rope import _inner_contiguous

_LOG2E = 1.4426950408889634


def _parts(size: int) -> tuple[int, int]:
    """A head as a block and a rest, so that 80 elements are 64 and 16 and not 128."""
    block = max(16, 1 << (size.bit_length() - 1))
    return block, max(16, power_of_2(size - block)) if size > block else 0


@dataclass(frozen=True)
class Call:
    """One call, dense or packed, as the kernels take it: sizes, strides and options by the names of their parameters.

    Attributes:
        tensors: what forward and backward read besides q, k and v.
        common: scalars and constants of every kernel.
    """

    batch: int
    queries: int
    keys: int
    head: int
    key_heads: int
    wide: bool
    heavy: bool
    capability: int
    tensors: dict[str, Tensor | None]
    common: dict[str, object]
    scale: float

    def tiles(self, kernel: str) -> dict[str, int | None] | None:
        sizes = tiles(kernel, self.head, self.wide, self.heavy, self.capability)
        return None if sizes is None else sizes.constants()


def strides(name: str, t: Tensor | None, *, packed: bool) -> dict[str, int]:
    """Strides of (B, H, S, size), or packed (T, H, size), by the kernels' parameter names; zeros for None."""
    if t is None:
        return {f"{name}_batch": 0, f"{name}_head": 0, f"{name}_token": 0}
    batch, head, token = (0, t.stride(1), t.stride(0)) if packed else t.stride()[:3]
    return {f"{name}_batch": batch, f"{name}_head": head, f"{name}_token": token}


def lse_strides(lse: Tensor, *, packed: bool) -> dict[str, int]:
    return {"lse_batch": 0 if packed else lse.stride(0), "lse_head": lse.stride(-2)}


def prepare(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, alibi_slopes: Tensor | None,
    prefix_lengths: Tensor | None, seed: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, batch: int,
    queries: int, keys: int, left: int, right: int, scale: float, softcap: float, dropout_p: float,
) -> Call:  # fmt: skip
    packed = cu_q is not None
    size, value_size = q.shape[-1], v.shape[-1]
    heads, key_heads = q.shape[1], k.shape[1]
    score_strides = {}
    scores = (batch, heads, queries, keys)
    for name, t in (("bias", bias), ("mask", mask)):
        view = (0, 0, 0, 0) if t is None else t.expand(scores).stride()
        by_row, by_key = view[2] or None, view[3] or None
        if t is not None and by_row is None and by_key is None:
            by_key = 0
        view = (*view[:2], by_row, by_key)
        score_strides |= dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row", f"{name}_key"), view, strict=True))
    (block_d, rest_d), (block_dv, rest_dv) = _parts(size), _parts(value_size)
    dense = mask is not None or prefix_lengths is not None
    common = {
        "queries": queries, "keys": keys, "left": left, "right": right,
        "scale": scale / softcap if softcap else scale * _LOG2E, "softcap": softcap * _LOG2E if softcap else None,
        "threshold": dropout_threshold(dropout_p), "kept_scale": 1.0 / (1.0 - dropout_p),
        **strides("q", q, packed=packed), **strides("k", k, packed=packed), **strides("v", v, packed=packed),
        **score_strides,
        "HEADS": heads, "GROUP": heads // key_heads, "D": size, "DV": value_size, "BLOCK_D": block_d,
        "REST_D": rest_d, "BLOCK_DV": block_dv, "REST_DV": rest_dv, "LEFT": left >= 0, "RIGHT": right >= 0,
        "DROPOUT": dropout_p > 0, "PRECISION": "ieee" if q.dtype == torch.float32 else None,
    }  # fmt: skip
    tensors = {
        "BIAS": bias,
        "MASK": mask,
        "SLOPES": alibi_slopes,
        "PREFIXES": prefix_lengths,
        "SEED": seed,
        "CU_Q": cu_q,
        "CU_K": cu_k,
    }
    common["PARTS"] = 1 if dense else 3 if left >= 0 else 2
    heavy = dense or bias is not None or dropout_p > 0
    others = (bias, alibi_slopes, prefix_lengths, cu_q)
    if mask is not None and common["mask_row"] is None and all(t is None for t in others):
        # A mask of padding is a vector; that it fits beside the tiles of plain calls was seen for these alone.
        usual = size == value_size and size in (64, 128) and q.dtype != torch.float32 and capability(q) // 10 == 9
        heavy = heavy and not (usual and left < 0 and not softcap and not dropout_p)
    return Call(
        batch,
        queries,
        keys,
        max(size, value_size),
        key_heads,
        q.dtype == torch.float32,
        heavy,
        capability(q),
        tensors,
        common,
        scale,
    )


def run_forward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None = None,
) -> None:
    """Fills out and lse; with `rest` not out, but lse in base 2 and the rest of its rounding."""
    packed = call.tensors["CU_Q"] is not None
    if rest is None and _hopper.takes(call, q, k, v, out):
        given = strides("out", out, packed=packed) | lse_strides(lse, packed=packed)
        return _hopper.forward(call, q, k, v, sinks, out, lse, given)
    tiles = call.tiles("attend")
    grid = (-(-call.queries // tiles["BLOCK_M"]) * call.batch * q.shape[1],)
    launch(
        attend,
        grid,
        q,
        k,
        v,
        out,
        lse,
        REST=rest,
        SINKS=sinks,
        **call.tensors,
        **call.common,
        **strides("out", out, packed=packed),
        **lse_strides(lse, packed=packed),
        **tiles,
    )


def run_backward(
    call: Call,
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    by_atomics: bool,
) -> Tensor | None:
    """Fills dq, dk, dv and dbias; returns the gradient of the sinks. `by_atomics`: dq by `backward_keys` as well."""
    packed = call.tensors["CU_Q"] is not None
    heads, value_size = q.shape[1], v.shape[-1]
    delta, base_2 = torch.empty_like(lse), torch.empty_like(lse)
    tokens = q.shape[0] if packed else call.queries
    given, rows = strides("grad", grad, packed=packed), lse_strides(lse, packed=packed)
    block = power_of_2(value_size)
    per_program = max(1, 4096 // block)
    launch(
        delta_kernel,
        (-(-tokens // per_program) * (1 if packed else call.batch) * heads,),
        grad,
        out,
        grad_lse,
        lse,
        delta,
        None if call.wide else base_2,
        queries=tokens,
        **given,
        **strides("out", out, packed=packed),
        **rows,
        HEADS=heads,
        DV=value_size,
        BLOCK_DV=block,
        BLOCK_M=per_program,
        num_warps=4,
    )
    common = call.common | given | rows
    rest = None
    if call.wide:
        rest = torch.empty_like(lse)
        run_forward(call, q, k, v, sinks, out, base_2, rest)
    if dbias is None and not by_atomics and _hopper.takes(call, q, k, v, grad, dq, dk, dv):
        by_name = given | rows
        for name, t in (("dq", dq), ("dk", dk), ("dv", dv)):
            by_name |= strides(name, t, packed=packed)
        _hopper.backward(call, q, k, v, grad, base_2, delta, dq, dk, dv, by_name)
        return _sink_gradient(sinks, lse, delta, packed)
    inputs = (q, k, v, grad, base_2, rest, delta)
    by_atomics = by_atomics and not call.wide and call.tiles("sum") is not None
    q_sum = q.new_zeros(q.shape, dtype=torch.float32) if by_atomics else None
    if q_sum is None:
        tiles = call.tiles("queries")
        launch(
            backward_queries,
            (-(-call.queries // tiles["BLOCK_M"]) * call.batch * heads,),
            *inputs,
            dq,
            q_scale=call.scale,
            **call.tensors,
            **common,
            **strides("dq", dq, packed=packed),
            **tiles,
        )
    tiles = call.tiles("keys" if q_sum is None else "sum")
    launch(
        backward_keys,
        (-(-call.keys // tiles["BLOCK_N"]) * call.batch * call.key_heads,),
        *inputs,
        q_sum,
        dk,
        dv,
        q_scale=call.scale,
        **call.tensors,
        **common,
        **strides("sum", q_sum, packed=packed),
        **strides("dk", dk, packed=packed),
        **strides("dv", dv, packed=packed),
        **tiles,
    )
    if q_sum is not None:
        dq.copy_(q_sum.mul_(call.scale))
    if dbias is not None:
        tiles = call.tiles("bias")
        b, h, m, n = dbias.shape
        grid = ((-(-m // tiles["BLOCK_M"]) if m > 1 else 1) * (-(-n // tiles["BLOCK_N"]) if n > 1 else 1) * b * h,)
        options = {name: value for name, value in (common | tiles).items() if name not in ("PARTS", "STAGES")}
        tensors = {name: value for name, value in call.tensors.items() if not name.startswith("CU_")}
        launch(
            backward_bias,
            grid,
            *inputs,
            dbias,
            batches=call.batch,
            BATCHED=b > 1,
            HEADED=h > 1,
            ROWED=m > 1,
            KEYED=n > 1,
            **tensors,
            **options,
        )
    return _sink_gradient(sinks, lse, delta, packed)


def _sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor, packed: bool) -> Tensor | None:
    if sinks is None:
        return None
    # A sink has no value: its scores' gradient is its weight times -delta, summed over all rows of its head.
    weight = torch.exp(sinks.float()[:, None] - lse) * delta
    return -(weight.sum(1) if packed else weight.sum((0, 2))).to(sinks.dtype)


def _serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.dtype in KERNEL_DTYPES and max(q.shape[-1], v.shape[-1]) <= LARGEST and q.numel() > 0 and k.numel() > 0


def _rows(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else _inner_contiguous(t) for t in tensors)


def _call(q, k, v, bias, mask, alibi_slopes, prefix_lengths, seed, *options) -> Call:
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    prefix = None if prefix_lengths is None else prefix_lengths.contiguous()
    return prepare(q, k, v, bias, mask, slopes, prefix, seed, None, None, q.shape[0], q.shape[2], k.shape[2], *options)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    op._check(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths)
    options = (left, right, scale, softcap, dropout_p)
    if not _serves(q, k, v):
        return op._fwd_fallback(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, seed, *options)
    if bias is None and mask is None and prefix_lengths is None and not dropout_p and not is_forced("gluon"):
        found = serve_attention(q, k, v, alibi_slopes, sinks, left, right, scale, softcap)
        if found is not None:
            return found
    out = op.like(q, v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = _rows(q, k, v)
    sinks = None if sinks is None else sinks.contiguous()
    call = _call(q, k, v, bias, mask, alibi_slopes, prefix_lengths, seed, *options)
    run_forward(call, q, k, v, sinks, out, lse)
    return out, lse


def infer(*args) -> Tensor:
    return forward(*args)[0]


def backward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward_by(nondeterministic(), *args)


def backward_by(
    atomics: bool,
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`backward`, with the queries' gradient added up by atomics or not."""
    options = (left, right, scale, softcap, dropout_p)
    if not _serves(q, k, v):
        return op._bwd_fallback(
            grad,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            bias,
            mask,
            alibi_slopes,
            sinks,
            prefix_lengths,
            seed,
            *options,
            bias_grad,
        )
    dq, dk, dv = (op.like(t, t.shape[-1]) for t in (q, k, v))
    dbias = bias.new_empty(bias.shape) if bias_grad else None
    grad, q, k, v, out = _rows(grad, q, k, v, out)
    grad_lse, lse = (t if t is None else t.contiguous() for t in (grad_lse, lse))
    call = _call(q, k, v, bias, mask, alibi_slopes, prefix_lengths, seed, *options)
    dsinks = run_backward(call, grad, grad_lse, q, k, v, out, lse, sinks, dq, dk, dv, dbias, atomics)
    return dq, dk, dv, *(q.new_empty(0) if d is None else d for d in (dbias, dsinks))


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    """Calls whose launches the ahead-of-time check compiles: usual heads with usual masks, and all options."""
    q, k = (torch.empty(2, 2048, h, 128, dtype=dtype, device="meta").transpose(1, 2) for h in (32, 8))
    padding = torch.empty(2, 1, 1, 2048, dtype=torch.bool, device="meta")
    options = (None, padding, None, None, None, None, -1, 0, 0.1, 0.0, 0.0)
    yield forward, (q, k, k, *options)
    lse = torch.empty(2, 32, 2048, device="meta", dtype=torch.float32)
    yield backward, (q, None, q, k, k, q, lse, *options, False)
    for heads, key_heads, size, value_size, left, everything in (
        (32, 8, 128, 128, -1, False),
        (16, 16, 64, 64, -1, False),
        (32, 8, 128, 128, 1023, False),
        (16, 4, 64, 64, 255, True),
        (32, 8, 128, 128, 255, True),
        (12, 12, 80, 80, -1, False),
        (16, 16, 96, 96, -1, False),
        (16, 16, 192, 128, -1, False),
        (8, 4, 256, 256, -1, False),
        (8, 8, 256, 256, 255, True),
        (16, 16, 576, 512, -1, False),
    ):
        q, k, v = (
            torch.empty(2, 2048, h, n, dtype=dtype, device="meta").transpose(1, 2)
            for h, n in ((heads, size), (key_heads, size), (key_heads, value_size))
        )
        out = op.like(q, value_size)
        lse = torch.empty(2, heads, 2048, device="meta", dtype=torch.float32)
        vector = torch.empty(heads, device="meta", dtype=torch.float32) if everything else None
        bias = torch.empty(2, heads, 2048, 2048, dtype=dtype, device="meta") if everything else None
        mask = torch.empty(2, 1, 2048, 2048, dtype=torch.bool, device="meta") if everything else None
        prefix = torch.empty(2, dtype=torch.int32, device="meta") if everything else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if everything else None
        extra = (bias, mask, vector, vector, prefix, seed)
        options = (left, 0, 0.1, 30.0 if everything else 0.0, 0.1 if everything else 0.0)
        yield forward, (q, k, v, *extra, *options)
        if size <= 256:
            rest = (out, lse if everything else None, q, k, v, out, lse, *extra, *options, everything)
            yield backward, rest
            if not everything:
                yield backward_by, (True, *rest)
