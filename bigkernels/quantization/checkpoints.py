"""Weights that other libraries quantized, and ours as another library reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ._weight import QuantizedWeight
from .book4 import DYNAMIC_CODEBOOK, FP4, NF4
from .format import pack4
from .int4 import Int4

_HERE = "bigkernels.quantization.checkpoints"
_CODEBOOKS = {"nf4": NF4, "fp4": FP4}
# The column of eight that each nibble of AWQ's integers holds, from the lowest.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def from_bitsandbytes(state: Mapping[str, Tensor], name: str = "weight") -> QuantizedWeight:
    """A 4-bit weight of a bitsandbytes checkpoint, code by code and scale by scale.

    Args:
        state: the tensors of the checkpoint: `name`, `name.absmax`, `name.quant_state.bitsandbytes__nf4` (or fp4), and
            with nested scales `name.nested_absmax` and `name.nested_quant_map`.
        name: of the weight.

    Raises:
        ValueError: blocks cross rows (the columns are no multiple of the block size), or the codebooks are not ours.
        KeyError: a tensor is missing.
    """
    kind = next((k for k in _CODEBOOKS if f"{name}.quant_state.bitsandbytes__{k}" in state), None)
    if kind is None:
        raise KeyError(f"{_HERE}.from_bitsandbytes: {name}.quant_state.bitsandbytes__nf4 or __fp4")
    described = state[f"{name}.quant_state.bitsandbytes__{kind}"]
    described = json.loads(bytes(described.cpu().tolist()).decode())
    (n, k), size, nested = described["shape"], described["blocksize"], f"{name}.nested_absmax" in state
    dtype = getattr(torch, str(described["dtype"]), None)
    if not all(isinstance(v, int) and v > 0 for v in (n, k, size)) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{_HERE}.from_bitsandbytes: {name} is described as {described}")
    if k % size:
        raise ValueError(f"{_HERE}.from_bitsandbytes: rows of {k} are no whole number of blocks of {size}")
    config = _CODEBOOKS[kind](size, double_quant=nested)
    book = torch.tensor(config.values, dtype=torch.float32, device="cpu")
    if not torch.allclose(state[f"{name}.quant_map"].cpu().float(), book, rtol=0, atol=1e-6):
        raise ValueError(f"{_HERE}.from_bitsandbytes: the codebook of {name} is not that of {kind}")
    packed = state[name].view(torch.uint8).reshape(n, -1)
    tensors = {"codes": packed >> 4 | packed << 4}  # its first element is in the high half
    scale = state[f"{name}.absmax"].view(n, k // size)
    if nested:
        outer, book = state[f"{name}.nested_absmax"], state[f"{name}.nested_quant_map"].cpu()
        ours = torch.tensor(DYNAMIC_CODEBOOK, dtype=torch.float32, device="cpu")
        same = torch.allclose(book.float(), ours, rtol=0, atol=1e-6)
        if described["nested_blocksize"] != 256 or not same:
            raise ValueError(
                f"{_HERE}.from_bitsandbytes: the nested scales of {name} are not in blocks of 256 of "
                "the signed dynamic codebook"
            )
        offset = torch.tensor([described["nested_offset"]], dtype=torch.float32, device=scale.device)
        tensors |= {"scale_codes": scale, "scale_scale": outer.float(), "scale_offset": offset}
    else:
        tensors["scale"] = scale.float()
    return QuantizedWeight(config, (n, k), dtype, tensors)


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    v2: bool = False,
    zeros: str | None = None,
) -> QuantizedWeight:
    """A 4-bit weight of a GPTQ checkpoint.

    Args:
        qweight: (K / 8, N) int32, eight neighbours along K in an integer.
        qzeros: (G, N / 8) int32, eight neighbours along N.
        scales: (G, N), float16.
        g_idx: (K,) the group of each element; where groups are not of neighbours (act-order), the weight is
            ``Int4(act_order=True)``.
        v2: zero points are stored as they are; else one less (the older format).
        zeros: how the older format's writer took one away, which matters where a zero point is 0: "nibbles", from each
            alone, so that 0 becomes 15; or "words", from all eight of an integer at once, where 0 borrows from its
            neighbour (GPTQModel). Need not be said where both mean the same, as in all symmetric checkpoints.

    Raises:
        ValueError: the shapes do not fit, groups are not of 32, 64 or 128, or zero points
            depend on `zeros`, which was not given.
    """
    codes = _nibbles(qweight, range(8)).permute(1, 0, 2).flatten(1)  # (N, K)
    zero = _nibbles(qzeros if v2 else _one_more(qzeros, zeros), range(8)).flatten(1)
    config = _config("from_gptq", codes, zero, scales)
    if g_idx is not None:
        natural = torch.arange(codes.shape[1], dtype=torch.int64, device=g_idx.device) // config.group_size
        if not torch.equal(g_idx.long(), natural):
            counts = torch.bincount(g_idx.long(), minlength=scales.shape[0])
            if (
                g_idx.shape != natural.shape
                or len(counts) != scales.shape[0]
                or (counts[:-1] != config.group_size).any()
            ):
                raise ValueError(f"{_HERE}.from_gptq: g_idx has groups that are not of {config.group_size} elements")
            order = g_idx.long().argsort(stable=True)
            tensors = _integers(replace(config, act_order=True), codes[:, order], zero, scales)
            tensors.tensors["order"] = order.to(torch.int32)
            return tensors
    return _integers(config, codes, zero, scales)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedWeight:
    """A 4-bit weight of an AWQ checkpoint (the "gemm" version).

    Args:
        qweight: (K, N / 8) int32, eight columns in an integer, in the order 0, 2, 4, 6, 1, 3, 5, 7.
        qzeros: (G, N / 8) int32, in the same order.
        scales: (G, N), float16.

    Raises:
        ValueError: the shapes do not fit, or groups are not of 32, 64 or 128.
    """
    codes = _nibbles(qweight, _AWQ_ORDER).flatten(1).T
    zero = _nibbles(qzeros, _AWQ_ORDER).flatten(1)
    return _integers(_config("from_awq", codes, zero, scales), codes, zero, scales)


def to_compressed_tensors(qweight: QuantizedWeight) -> dict[str, Tensor]:
    """An `Int4` weight as compressed-tensors stores it ("pack-quantized", 4 bits, asymmetric, by groups).

    Returns:
        weight_packed (N, ceil(K / 8)) int32, weight_scale (N, G) in the dtype of the weight, weight_zero_point
        (ceil(N / 8), G) int32 and weight_shape.

    Raises:
        ValueError: another format, or zero points that are no integers: quantize with ``Int4(algorithm="rtn")``.
    """
    if not isinstance(qweight.format, Int4):
        raise ValueError(f"{_HERE}.to_compressed_tensors: the weight is {qweight.format.name}; accepted is int4")
    if qweight.channel is not None:
        raise ValueError(f"{_HERE}.to_compressed_tensors: the layout has no place for what divides inputs (awq)")
    if qweight.order is not None:
        raise ValueError(f"{_HERE}.to_compressed_tensors: groups that are not of neighbours (act-order)")
    codes, scale, zero, row_scale, *_ = qweight.operands()
    assert scale is not None and zero is not None and row_scale is not None  # as int4 has them
    if not torch.equal(zero, zero.round()):
        raise ValueError(f"{_HERE}.to_compressed_tensors: zero points are no integers; use Int4(algorithm='rtn')")
    flat = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, : qweight.shape[1]]
    return {
        "weight_packed": _packed(flat),
        "weight_scale": (scale.float() * row_scale[:, None]).to(qweight.dtype),
        "weight_zero_point": _packed(zero.T).T.contiguous(),
        "weight_shape": torch.tensor(qweight.shape, dtype=torch.int64, device="cpu"),
    }


def _one_more(qzeros: Tensor, zeros: str | None) -> Tensor:
    """The eight zero points of each integer, stored as one less, as they are."""
    if zeros not in (None, "nibbles", "words"):
        raise ValueError(f"{_HERE}.from_gptq: zeros is {zeros!r}; accepted are 'nibbles', 'words' and None")
    by_words = (qzeros.long() + 0x11111111) & 0xFFFFFFFF
    nibbles = [((qzeros.long() >> 4 * i) + 1 & 15) << 4 * i for i in range(8)]
    by_nibbles = torch.stack(nibbles).sum(0)
    if zeros is None and not torch.equal(by_words, by_nibbles):
        raise ValueError(
            f"{_HERE}.from_gptq: some zero points are 0, which writers of this format store in two "
            "ways; say which by zeros='words' (GPTQModel) or zeros='nibbles'"
        )
    return by_nibbles if zeros == "nibbles" else by_words


def _nibbles(words: Tensor, order) -> Tensor:
    """(..., n) int32 as (..., n, 8): columns 0 to 7 of each integer, whose nibbles hold them in `order`."""
    parts = torch.stack([words >> 4 * i & 15 for i in range(8)], -1)
    return parts[..., [list(order).index(i) for i in range(8)]]


def _packed(values: Tensor) -> Tensor:
    """(n, m) values below 16 as (n, ceil(m / 8)) int32, the first in the lowest nibble."""
    values = torch.nn.functional.pad(values.to(torch.int64), (0, -values.shape[1] % 8)).unflatten(1, (-1, 8))
    shifted = (values << torch.arange(0, 32, 4, dtype=torch.int64, device=values.device)).sum(-1)
    return torch.where(shifted >= 2**31, shifted - 2**32, shifted).to(torch.int32)


def _config(op: str, codes: Tensor, zero: Tensor, scales: Tensor) -> Int4:
    (n, k), (groups, columns) = codes.shape, scales.shape
    size = -(-k // groups) if groups else 0
    if zero.shape != scales.shape or columns != n or size not in (32, 64, 128) or -(-k // size) != groups:
        raise ValueError(
            f"{_HERE}.{op}: a weight ({n}, {k}) with scales {tuple(scales.shape)} and zero points "
            f"{tuple(zero.shape)}; expected groups of 32, 64 or 128"
        )
    return Int4(size, "rtn")


def _integers(config: Int4, codes: Tensor, zero: Tensor, scales: Tensor) -> QuantizedWeight:
    tensors = {
        "codes": pack4(codes, codes.shape[1]),
        "scale": scales.T.to(torch.float16).contiguous(),
        "zero": zero.T.to(torch.float16).contiguous(),
        "row_scale": torch.ones(codes.shape[0], dtype=torch.float32, device=codes.device),
    }
    return QuantizedWeight(config, (codes.shape[0], codes.shape[1]), scales.dtype, tensors)
