"""Stacked weights of experts as records: one weight an expert, in the memory that the model has."""

# mypy: ignore-errors

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ..nn.quantized_experts import QuantizedExperts
from . import _records as records
from ._ir import Experts
from ._trace import Refused
from ._weights import TYPES, Reads, plain_tensor, rows_of


def experts_record(o: Experts, reads: Reads, new: Callable[[int], int], integers: int) -> records.ExpertsRecord:
    """
    Args:
        new: gives a value of some columns.
        integers: what becomes of tokens that meet codes.

    Raises:
        Refused: with what records cannot hold.
    """
    place = o.stacked
    both, rounded = _weights(getattr(place.module, place.gate_up), place.transposed, reads)
    down, also = _weights(getattr(place.module, place.down), place.transposed, reads)
    inner = down[0].k
    both_bias = _biases(place.module, place.gate_up_bias, 2 * inner, reads)
    down_bias = _biases(place.module, place.down_bias, down[0].n, reads)
    halves = not place.interleaved
    if place.interleaved and place.up_first:
        raise Refused("experts whose ups come before their gates, in turn")
    first, second = (_parts(both, both_bias, i * inner, (i + 1) * inner) for i in range(2))
    if place.up_first:
        first, second = second, first
    gate, up = (first, second) if halves else ((both, both_bias), (None, None))
    record = records.ExpertsRecord(
        x=o.x,
        out=o.out,
        residual=-1,
        experts=o.experts,
        top=o.top,
        inner=inner,
        renormalize=o.renormalize,
        sigmoid=o.sigmoid,
        scale=o.scale,
        act=records.ACTS[o.act],
        integers=1 if rounded or also else integers,
        limit=o.limit,
        alpha=o.alpha,
        up_offset=o.up_offset,
    )
    record.hidden = new(o.top * inner)
    if o.logits is None:
        if o.scale != 1.0:
            raise Refused("experts whose given weights are scaled")
        record.logits, record.weights, record.chosen = -1, o.weights, o.chosen
    else:
        record.logits, record.weights, record.chosen = o.logits, new(o.top), new(o.top)
    for name, kind, several in (
        ("gate", records.Weight, gate[0]),
        ("up", records.Weight, up[0]),
        ("down", records.Weight, down),
        ("gate_bias", records.Vector, gate[1]),
        ("up_bias", records.Vector, up[1]),
        ("down_bias", records.Vector, down_bias),
    ):
        if several is not None:
            listed = (kind * len(several))(*several)
            reads.made.append(listed)
            setattr(record, name, ctypes.addressof(listed))
    return record


def _weights(held: Tensor | QuantizedExperts, transposed: bool, reads: Reads) -> tuple[list[records.Weight], bool]:
    """One an expert, and whether their format rounds tokens by itself."""
    if isinstance(held, QuantizedExperts):
        whole, rounds = reads.quantized(held.qweight)
        n = whole.n // held.num_experts
        return [rows_of(whole, i * n, (i + 1) * n) for i in range(held.num_experts)], rounds
    plain_tensor(held, "the weights of experts")
    if held.dtype not in TYPES:
        raise Refused(f"the weights of experts are {held.dtype}")
    if held.stride(2) != 1 and held.shape[2] > 1:
        raise Refused(f"the weights of experts have strides {tuple(held.stride())}")
    n, k = (held.shape[2], held.shape[1]) if transposed else held.shape[1:]
    begin, item = reads.address(held), held.itemsize
    row = held.stride(1) if held.shape[1] > 1 else held.shape[2]
    projections = [
        records.Weight(
            n=n,
            k=k,
            kind=TYPES[held.dtype],
            codes=begin + i * held.stride(0) * item,
            code_row=row * item,
            transposed=transposed,
        )
        for i in range(held.shape[0])
    ]
    return projections, False


def _biases(module: torch.nn.Module, name: str | None, n: int, reads: Reads) -> list[records.Vector] | None:
    if name is None:
        return None
    held = getattr(module, name)
    plain_tensor(held, "the biases of experts")
    if held.dtype not in TYPES or held.shape[1] != n or (held.stride(1) != 1 and n > 1):
        raise Refused(f"the biases of experts are {held.dtype} {tuple(held.shape)}")
    begin = reads.address(held)
    step = held.stride(0) * held.itemsize
    return [records.Vector(begin + i * step, TYPES[held.dtype], 0) for i in range(held.shape[0])]


def _parts(weights: list, biases: list | None, begin: int, end: int) -> tuple[list, list | None]:
    """Rows of all experts' weights, and of their biases."""
    item = {0: 4, 1: 2, 2: 2}
    some = None if biases is None else [records.Vector(b.data + begin * item[b.type], b.type, 0) for b in biases]
    return [rows_of(w, begin, end) for w in weights], some
