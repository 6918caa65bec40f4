"""The records of a step program as C sees them: csrc/include/bigkernels/program.h, field by field."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from ctypes import Structure, Union, byref, c_bool, c_float, c_int32, c_int64, c_void_p, memmove, sizeof

import torch
from torch import Tensor

from ..ops.activations import NUMBERS

MAX_TERMS, MAX_WEIGHTS, MAX_ANGLES = 4, 4, 4

# Op, NormKind, Activation, Type and Codes.
NORM, COMBINE, ACTIVATE, PRODUCT, HEADS, ATTEND, EXPERTS, KEEP, CALL, TURN, MIX = range(11)
NORMS = {"rms": 1, "layer": 2}
ACTS = NUMBERS


def _struct(name: str, **fields: type) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": list(fields.items())})


_i, _l, _f, _p = c_int32, c_int64, c_float, c_void_p

Vector = _struct("Vector", data=_p, type=_i, pad=_i)

NormOf = _struct("NormOf", kind=_i, eps=_f, offset=_f, pad=_i, weight=Vector, bias=Vector)

Weight = _struct(
    "Weight",
    n=_l,
    k=_l,
    kind=_i,
    codes=_p,
    code_row=_l,
    scale=_p,
    zero=_p,
    row_scale=_p,
    book=_p,
    group=_l,
    groups=_l,
    transposed=c_bool,
    panels=_p,
    panel_step=_l,
)

NormRecord = _struct("NormRecord", x=_i, out=_i, residual=_i, pad=_i, size=_l, norm=NormOf, scale=_f, residual_scale=_f)

CombineRecord = _struct(
    "CombineRecord", out=_i, count=_i, x=_i * MAX_TERMS, scale=_f * MAX_TERMS, channel=Vector * MAX_TERMS
)

ActivateRecord = _struct(
    "ActivateRecord",
    x=_i,
    up=_i,
    out=_i,
    act=_i,
    x_column=_i,
    up_column=_i,
    width=_i,
    scale=_f,
    softcap=_f,
    limit=_f,
    alpha=_f,
    up_offset=_f,
)

ProductRecord = _struct(
    "ProductRecord",
    x=_i,
    count=_i,
    out=_i * MAX_WEIGHTS,
    column=_i * MAX_WEIGHTS,
    weight=Weight * MAX_WEIGHTS,
    bias=Vector * MAX_WEIGHTS,
    act=_i,
    gated=_i,
    integers=_i,
    residual=_i,
    out_scale=_f,
    residual_scale=_f,
    x_column=_i,
    pad=_i,
)

HeadsOf = _struct("HeadsOf", x=_i, count=_i, column=_p)

HeadsRecord = _struct(
    "HeadsRecord",
    q=HeadsOf,
    k=HeadsOf,
    v=HeadsOf,
    out=_i,
    layer=_i,
    d=_i,
    dv=_i,
    q_norm=NormOf,
    k_norm=NormOf,
    angles=_i,
    rotary=_i,
    interleaved=_i,
    pad=_i,
)

AttendRecord = _struct(
    "AttendRecord",
    q=_i,
    out=_i,
    layer=_i,
    heads=_i,
    groups=_i,
    d=_i,
    dv=_i,
    scale=_f,
    softcap=_f,
    pad=_i,
    window=_l,
    sinks=Vector,
    alibi=_p,
    state=_i,
    pad2=_i,
)

ExpertsRecord = _struct(
    "ExpertsRecord",
    x=_i,
    out=_i,
    logits=_i,
    weights=_i,
    chosen=_i,
    hidden=_i,
    residual=_i,
    experts=_i,
    top=_i,
    inner=_i,
    renormalize=_i,
    sigmoid=_i,
    scale=_f,
    act=_i,
    integers=_i,
    gate=_p,
    up=_p,
    down=_p,
    gate_bias=_p,
    up_bias=_p,
    down_bias=_p,
    plain=_i,
    limit=_f,
    alpha=_f,
    up_offset=_f,
)

KeepRecord = _struct("KeepRecord", x=_i, out=_i)

CallRecord = _struct("CallRecord", reads=_i, writes=_i, x=_p, out=_p)


TurnRecord = _struct("TurnRecord", x=HeadsOf, out=_i, d=_i, norm=NormOf, angles=_i, rotary=_i, interleaved=_i, pad=_i)

MixRecord = _struct(
    "MixRecord",
    q=HeadsOf,
    k=HeadsOf,
    v=HeadsOf,
    out=_i,
    heads=_i,
    groups=_i,
    d=_i,
    dv=_i,
    scale=_f,
    softcap=_f,
    causal=_i,
    scores=_i,
    type=_i,
    sinks=Vector,
)


class _Any(Union):
    _fields_ = [
        ("norm", NormRecord),
        ("combine", CombineRecord),
        ("activate", ActivateRecord),
        ("product", ProductRecord),
        ("heads", HeadsRecord),
        ("attend", AttendRecord),
        ("experts", ExpertsRecord),
        ("keep", KeepRecord),
        ("call", CallRecord),
        ("turn", TurnRecord),
        ("mix", MixRecord),
    ]


class Record(Structure):
    _anonymous_ = ("of",)
    _fields_ = [("op", _i), ("pad", _i), ("of", _Any)]


ProgramHeader = _struct(
    "ProgramHeader",
    id=_l,
    records=_i,
    values=_i,
    layers=_i,
    angles=_i,
    hidden=_i,
    logits=_i,
    scores=_i,
    pad=_i,
    width=_p,
    record=_p,
)

AngleTable = _struct("AngleTable", cos=_p, sin=_p, type=_i, by_row=_i, stride=_l, rows=_l)

LayerCache = _struct(
    "LayerCache",
    k=_p,
    v=_p,
    k_batch=_l,
    k_head=_l,
    k_token=_l,
    v_batch=_l,
    v_head=_l,
    v_token=_l,
    held=_l,
    capacity=_l,
    type=_i,
    bits=_i,
    k_scale=_p,
    v_scale=_p,
    scale_batch=_l,
    scale_head=_l,
)

ScoresTable = _struct(
    "ScoresTable",
    mask=_p,
    mask_batch=_l,
    mask_head=_l,
    mask_query=_l,
    mask_key=_l,
    bias=_p,
    bias_batch=_l,
    bias_head=_l,
    bias_query=_l,
    bias_key=_l,
    left=_l,
    right=_l,
    type=_i,
    pad=_i,
)

_ids = itertools.count(1)


def pack(
    records: Sequence[Structure],
    widths: Sequence[int],
    *,
    hidden: int,
    logits: int,
    layers: int,
    angles: int,
    scores: int = 0,
) -> Tensor:
    """A program as the runner reads it. What records point to has to outlive it."""
    header = ProgramHeader(
        id=next(_ids),
        records=len(records),
        values=len(widths),
        layers=layers,
        angles=angles,
        hidden=hidden,
        logits=logits,
        scores=scores,
    )
    start, size = sizeof(ProgramHeader), sizeof(Record)
    end = start + len(records) * size
    out = torch.zeros(end + 4 * len(widths), dtype=torch.uint8, device="cpu")
    address = out.data_ptr()
    header.record, header.width = address + start, address + end
    memmove(address, byref(header), start)
    for i, record in enumerate(records):
        memmove(address + start + i * size, byref(record), size)
    memmove(address + end, (c_int32 * len(widths))(*widths), 4 * len(widths))
    return out
