"""Heads and attention of the step program against their formulas in float64: every option, type and level."""

from __future__ import annotations

import itertools
from ctypes import Structure, addressof, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bigkernels.program import _records as records

pytest.importorskip("bigkernels._native", reason="bigkernels._native is in development builds only")

SNIPPET = """
import sys; sys.path.insert(0, "tests/program")
import test_attend; test_attend.check_level()
"""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Of values of order 1: a rounding of keys is in the reference, too, those of queries and weights are not.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-6}


class Run(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "tokens", "past", "keep")),
        *((name, c_void_p) for name in ("positions", "starts")),
        ("angles", records.AngleTable * records.MAX_ANGLES),
        ("caches", c_void_p),
        ("sequences", c_int64),
        *((name, c_void_p) for name in ("offsets", "numbers", "scores")),
    ]


def native():
    from bigkernels import _native

    return _native


def vector(x: Tensor | None) -> records.Vector:
    return records.Vector() if x is None else records.Vector(data=x.data_ptr(), type=TYPES[x.dtype])


@dataclass
class Cache:
    """k (B, Hk, capacity, d) and v, in a type or int8 with scales (B, Hk, capacity)."""

    k: Tensor
    v: Tensor
    held: int
    dtype: torch.dtype
    scales: tuple[Tensor, Tensor] | None = None

    @classmethod
    def make(cls, b, groups, held, tokens, d, dv, dtype, int8=False, room=3) -> Cache:
        shape = (b, groups, held + tokens + room)
        k, v = torch.randn(*shape, d, dtype=torch.float32), torch.randn(*shape, dv, dtype=torch.float32)
        if not int8:
            return cls(k.to(dtype), v.to(dtype), held, dtype)
        scales = tuple((x.abs().amax(-1) / 127).contiguous() for x in (k, v))
        codes = [(x / s[..., None]).round().to(torch.int8) for x, s in zip((k, v), scales, strict=True)]
        return cls(*codes, held, dtype, scales)

    def values(self) -> tuple[Tensor, Tensor]:
        k, v = self.k.double(), self.v.double()
        if self.scales:
            k, v = k * self.scales[0][..., None].double(), v * self.scales[1][..., None].double()
        return k, v

    def record(self) -> records.LayerCache:
        k, v = self.k.stride(), self.v.stride()
        c = records.LayerCache(
            k=self.k.data_ptr(),
            v=self.v.data_ptr(),
            k_batch=k[0],
            k_head=k[1],
            k_token=k[2],
            v_batch=v[0],
            v_head=v[1],
            v_token=v[2],
            held=self.held,
            capacity=self.k.shape[2],
            type=TYPES[self.dtype],
            bits=8 if self.scales else 0,
        )
        if self.scales:
            c.k_scale, c.v_scale = (s.data_ptr() for s in self.scales)
            c.scale_batch, c.scale_head, _ = self.scales[0].stride()
        return c


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 4
    groups: int = 2
    d: int = 16
    dv: int = 16
    held: int = 21
    tokens: int = 1
    dtype: torch.dtype = torch.float32
    int8: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: torch.dtype | None = None
    alibi: bool = False
    starts: tuple[int, ...] | None = None
    dropped: int = 0  # tokens that the cache no longer has
    head_last: bool = False  # token by token instead of head by head
    scale: float = 0.3
    backwards: bool = True
    threads: int = 1


def run(case: Case, cache: Cache, q: Tensor, sinks: Tensor | None, slopes: Tensor | None) -> tuple[Tensor, dict]:
    c = case
    starts = None if c.starts is None else torch.tensor(c.starts)
    layer = cache.record()
    r = records.AttendRecord(
        q=0,
        out=1,
        layer=0,
        heads=c.heads,
        groups=c.groups,
        d=c.d,
        dv=c.dv,
        scale=c.scale,
        softcap=c.softcap,
        window=c.window,
        sinks=vector(sinks),
        alibi=slopes.data_ptr() if c.alibi else None,
    )
    step = Run(
        batch=c.batch,
        tokens=c.tokens,
        past=c.held + c.dropped,
        keep=c.tokens,
        caches=addressof(layer),
        starts=None if starts is None else starts.data_ptr(),
    )
    out = torch.full((c.batch * c.tokens, c.heads * c.dv), float("nan"))
    rows = q.reshape(c.batch * c.tokens, -1)
    plan = native().program_attend(
        bytes(r),
        bytes(step),
        [rows.data_ptr(), out.data_ptr()],
        [rows.shape[1], out.shape[1]],
        c.backwards,
        c.threads,
    )
    return out.view(c.batch, c.tokens, c.heads, c.dv), plan


def formula(case: Case, cache: Cache, q: Tensor, sinks: Tensor | None, slopes: Tensor | None) -> Tensor:
    c = case
    end = c.held + c.tokens
    k, v = (x[:, :, :end].repeat_interleave(c.heads // c.groups, 1) for x in cache.values())
    s = torch.einsum("bshd,bhnd->bhsn", q.double(), k) * c.scale
    if c.softcap:
        s = c.softcap * torch.tanh(s / c.softcap)
    row, slot = torch.arange(c.held, end)[:, None], torch.arange(end)[None]
    if c.alibi:
        s = s + slopes.double()[:, None, None] * (slot - row)
    hidden = slot > row
    if c.window:
        hidden = hidden | (slot <= row - c.window)
    hidden = hidden.expand(c.batch, 1, -1, -1)
    if c.starts is not None:
        hidden = hidden | (slot + c.dropped < torch.tensor(c.starts)[:, None, None, None])
    s = s.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        s = torch.cat((s, sinks.double()[None, :, None, None].expand(c.batch, -1, c.tokens, 1)), -1)
    p = torch.softmax(s, -1).nan_to_num(0)[..., :end]  # a row that sees no key
    return torch.einsum("bhsn,bhnd->bshd", p, v)


def check(case: Case) -> dict:
    torch.manual_seed(0)
    c = case
    q = torch.randn(c.batch, c.tokens, c.heads, c.d)
    cache = Cache.make(c.batch, c.groups, c.held, c.tokens, c.d, c.dv, c.dtype, c.int8)
    if c.head_last:
        cache.k, cache.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache.k, cache.v))
    sinks = torch.randn(c.heads).to(c.sinks) if c.sinks else None
    slopes = torch.rand(c.heads) * 0.2
    out, plan = run(c, cache, q, sinks, slopes)
    expected = formula(c, cache, q, sinks, slopes)
    error = (out - expected).abs().max().item()
    assert error <= TOLERANCE[c.dtype], f"{case}: {error}"
    return plan


OPTIONS = {
    "plain": {},
    "window": {"window": 7},
    "wide window": {"window": 700},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.float32},
    "sinks in bfloat16": {"sinks": torch.bfloat16},
    "alibi": {"alibi": True},
    "padding": {"starts": (0, 9)},
    "nothing but padding": {"starts": (0, 100)},
    "padding of a short cache": {"starts": (0, 9), "dropped": 5, "window": 12},
    "all": {"window": 9, "softcap": 3.0, "sinks": torch.float16, "alibi": True, "starts": (3, 20)},
    "other size of values": {"dv": 24},
    "values that fill no vector": {"d": 20, "dv": 7},
    "odd heads": {"d": 33, "dv": 80, "heads": 3, "groups": 1},
    "one head each": {"heads": 3, "groups": 3},
    "many heads of one": {"heads": 71, "groups": 1, "d": 8, "dv": 8},
    "token by token": {"head_last": True},
    "empty cache": {"held": 0},
}
DTYPES = [
    (torch.float32, False),
    (torch.bfloat16, False),
    (torch.float16, False),
    (torch.bfloat16, True),
    (torch.float32, True),
]


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    for (dtype, int8), tokens in itertools.product(DTYPES, (1, 3, 40)):
        check(replace(Case(dtype=dtype, int8=int8, tokens=tokens), **OPTIONS[name]))


@pytest.mark.parametrize(("dtype", "int8"), DTYPES)
def test_keys_are_cut_and_merged(dtype, int8):
    case = Case(batch=2, heads=6, groups=2, d=64, dv=64, held=1999, dtype=dtype, int8=int8, scale=0.2)
    assert check(case)["parts"] > 1
    assert check(replace(case, tokens=5, starts=(0, 1500), sinks=torch.float32))["parts"] > 1
    assert check(replace(case, tokens=2, window=900))["parts"] >= 1
    # A part without keys for one sequence.
    assert check(replace(case, starts=(0, 1990), alibi=True))["parts"] > 1


@pytest.mark.parametrize(("dtype", "int8"), DTYPES)
def test_whole_blocks_of_any_size(dtype, int8):
    """What one token reads a long cache with, for one to nine heads that share it."""
    for group, (d, dv) in itertools.product((1, 2, 3, 4, 5, 9), ((64, 64), (128, 128), (80, 80), (40, 24), (96, 200))):
        check(Case(batch=1, heads=group, groups=1, d=d, dv=dv, held=150, dtype=dtype, int8=int8, scale=d**-0.5))
    for d, dv in ((256, 64), (64, 128), (128, 64)):
        check(Case(batch=1, heads=3, groups=1, d=d, dv=dv, held=150, dtype=dtype, int8=int8, scale=d**-0.5))
    check(Case(batch=2, heads=4, groups=2, d=64, dv=64, held=150, tokens=3, dtype=dtype, int8=int8, starts=(0, 30)))
    check(Case(batch=2, heads=4, groups=2, d=64, dv=64, held=150, dtype=dtype, int8=int8, head_last=True, window=140))
    # A later score that is far above those before it.
    check(Case(batch=1, heads=2, groups=1, d=64, dv=64, held=1000, dtype=dtype, int8=int8, scale=6.0))


@pytest.mark.parametrize("d", [64, 256])
def test_codes_at_their_ends(d):
    """Products of bytes: the largest sums that there can be, and scales of either sign."""
    case = Case(batch=1, heads=3, groups=1, d=d, dv=d, held=200, dtype=torch.bfloat16, int8=True, scale=1e-4)
    torch.manual_seed(3)
    cache = Cache.make(1, 1, 200, 1, d, d, torch.bfloat16, int8=True)
    cache.k[:] = torch.where(torch.rand(cache.k.shape[2], 1) < 0.5, 127, -128).to(torch.int8)
    cache.v[:, :, :90], cache.v[:, :, 90:] = -128, 127
    for sign in (1.0, -1.0):
        cache.scales[0][:], cache.scales[1][:] = 0.02, 0.01
        cache.scales[1][:, :, 70:] *= sign
        for q in (torch.ones(1, 1, 3, d), -torch.ones(1, 1, 3, d)):
            expected = formula(case, cache, q, None, None)
            out, _ = run(case, cache, q, None, None)
            torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=3e-5)


def test_values_whose_scale_is_not_a_number_show():
    case = Case(batch=1, heads=6, groups=2, d=64, dv=64, held=130, dtype=torch.bfloat16, int8=True)
    q, cache = torch.randn(1, 1, 6, 64), Cache.make(1, 2, 130, 1, 64, 64, torch.bfloat16, int8=True)
    cache.scales[1][0, 1, 20] = float("nan")
    out, _ = run(case, cache, q, None, None)
    assert out[0, 0, :3].isfinite().all() and out[0, 0, 3:].isnan().all()


def test_many_rows_in_pieces():
    case = Case(batch=3, heads=4, groups=2, d=64, dv=64, held=100, tokens=300, starts=(0, 250, 500))
    assert check(case)["chunks"] > 6
    assert check(replace(case, threads=4))["chunks"] > 12
    case = Case(batch=1, heads=40, groups=1, d=64, dv=64, held=5, tokens=7, dtype=torch.bfloat16, threads=2)
    assert check(case)["chunks"] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"window": 90, "sinks": torch.float32}, {"softcap": 5.0, "alibi": True}, {"int8": True}], ids=str
)
def test_bits_do_not_depend_on_the_pieces_of_many_rows(dtype, options):
    case = Case(batch=2, heads=6, groups=2, d=64, dv=64, held=130, tokens=200, starts=(0, 40), dtype=dtype, **options)
    torch.manual_seed(1)
    q = torch.randn(2, 200, 6, 64)
    cache = Cache.make(2, 2, 130, 200, 64, 64, dtype, int8=case.int8)
    sinks = torch.randn(6) if case.sinks else None
    slopes = 2.0 ** -torch.arange(1.0, 7) if case.alibi else None
    outs = [run(replace(case, threads=t), cache, q, sinks, slopes) for t in (1, 2, 3, 7, 64)]
    assert len({plan["chunks"] for _, plan in outs}) > 1
    assert all(torch.equal(out, outs[0][0]) for out, _ in outs)


def test_bits_do_not_depend_on_when_chunks_are_made():
    case = Case(batch=1, heads=6, groups=2, d=64, dv=64, held=1500, dtype=torch.bfloat16)
    torch.manual_seed(1)
    q, cache = torch.randn(1, 1, 6, 64), Cache.make(1, 2, 1500, 1, 64, 64, torch.bfloat16)
    once, twice = (run(replace(case, backwards=b), cache, q, None, None)[0] for b in (False, True))
    assert torch.equal(once, twice)


def test_a_key_that_is_not_a_number_shows():
    case = Case(batch=1, heads=2, groups=2)
    q, cache = torch.randn(1, 1, 2, 16), Cache.make(1, 2, case.held, 1, 16, 16, torch.float32)
    cache.k[0, 1, 3] = float("nan")
    out, _ = run(case, cache, q, None, None)
    assert out[0, 0, 0].isfinite().all() and out[0, 0, 1].isnan().all()


# ---- heads ----------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool) -> Tensor:
    """x (B, S, H, d) by cos, sin (B, S, rotary)."""
    part, rest = x[..., :rotary], x[..., rotary:]
    cos, sin = cos[:, :, None], sin[:, :, None]
    if interleaved:
        quarter = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        quarter = torch.cat((-part[..., rotary // 2 :], part[..., : rotary // 2]), -1)
    return torch.cat((part * cos + quarter * sin, rest), -1)


def normed(x: Tensor, kind: str | None, weight: Tensor, bias: Tensor, offset: float) -> Tensor:
    if kind is None:
        return x
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    return x * (weight.double() + offset) + (bias.double() if kind == "layer" else 0)


def check_heads(
    dtype, *, int8=False, d=24, dv=16, rotary=24, interleaved=False, norm=None, by_row=False, table=torch.float32
) -> None:
    torch.manual_seed(3)
    b, s, heads, groups, held = 2, 3, 4, 2, 5
    width = (heads + groups) * d + 2
    x, values = torch.randn(b, s, width), torch.randn(b, s, groups * dv)
    weight, bias = torch.randn(d).bfloat16(), torch.randn(d)
    angle = torch.randn(b * s if by_row else 40, max(rotary, 1))
    cos, sin = angle.cos().to(table), angle.sin().to(table)
    positions = torch.randint(0, 40, (b, s))
    at = torch.arange(b * s).view(b, s) if by_row else positions
    cache = Cache.make(b, groups, held, s, d, dv, dtype, int8)
    before = cache.values()
    spec = records.NormOf(
        kind={None: 0, "rms": 1, "layer": 2}[norm],
        eps=1e-5,
        offset=1.0,
        weight=vector(weight),
        bias=vector(bias if norm == "layer" else None),
    )
    # Queries after two columns of something else, keys backwards.
    columns = [
        (c_int32 * n)(*at)
        for n, at in (
            (heads, [2 + h * d for h in range(heads)]),
            (groups, [2 + (heads + groups - 1 - h) * d for h in range(groups)]),
            (groups, [h * dv for h in range(groups)]),
        )
    ]
    r = records.HeadsRecord(
        q=records.HeadsOf(x=0, count=heads, column=addressof(columns[0])),
        k=records.HeadsOf(x=0, count=groups, column=addressof(columns[1])),
        v=records.HeadsOf(x=1, count=groups, column=addressof(columns[2])),
        out=2,
        layer=0,
        d=d,
        dv=dv,
        q_norm=spec,
        k_norm=spec,
        angles=0 if rotary else -1,
        rotary=rotary,
        interleaved=interleaved,
    )
    layer = cache.record()
    step = Run(batch=b, tokens=s, past=held, keep=s, positions=positions.data_ptr(), caches=addressof(layer))
    step.angles[0] = records.AngleTable(
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        type=TYPES[table],
        by_row=by_row,
        stride=cos.stride(0),
        rows=cos.shape[0],
    )
    out = torch.full((b, s, heads * d), float("nan"))
    addresses = [t.data_ptr() for t in (x, values, out)]
    native().program_heads(bytes(r), bytes(step), addresses, [width, groups * dv, heads * d])

    def ready(columns) -> Tensor:
        h = torch.stack([x[..., c : c + d] for c in columns], 2).double()
        h = normed(h, norm, weight, bias, 1.0)
        return rotated(h, cos.double()[at], sin.double()[at], rotary, interleaved) if rotary else h

    torch.testing.assert_close(out.view(b, s, heads, d).double(), ready(columns[0]), rtol=1e-5, atol=1e-5)
    k, v = cache.values()
    new = ready(columns[1]).transpose(1, 2), values.view(b, s, groups, dv).transpose(1, 2).double()
    for found, expected, old in zip((k, v), new, before, strict=True):
        assert torch.equal(found[:, :, :held], old[:, :, :held])
        assert torch.equal(found[:, :, held + s :], old[:, :, held + s :])
        found = found[:, :, held : held + s]
        if int8:
            step_size = expected.abs().amax(-1, keepdim=True) / 127
            assert ((found - expected).abs() <= 0.5001 * step_size + 1e-7).all()
        else:
            rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
            torch.testing.assert_close(found, expected, rtol=rounding, atol=1e-5)


HEADS = {
    "halves": {},
    "pairs": {"interleaved": True},
    "partly": {"rotary": 8},
    "partly, pairs": {"rotary": 10, "interleaved": True},
    "not at all": {"rotary": 0},
    "rms": {"norm": "rms"},
    "layer": {"norm": "layer", "rotary": 12},
    "odd size": {"d": 19, "dv": 35, "rotary": 14, "norm": "layer"},
    "angles by row": {"by_row": True},
    "angles in bfloat16": {"table": torch.bfloat16},
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    for dtype, int8 in DTYPES:
        check_heads(dtype, int8=int8, **HEADS[name])


def test_queries_alone():
    """A layer that reads another layer's cache writes nothing there."""
    x, out = torch.randn(1, 8), torch.zeros(1, 8)
    column = (c_int32 * 2)(0, 4)
    r = records.HeadsRecord(q=records.HeadsOf(x=0, count=2, column=addressof(column)), out=1, layer=0, d=4, angles=-1)
    step = Run(batch=1, tokens=1, past=7, keep=1)
    native().program_heads(bytes(r), bytes(step), [x.data_ptr(), out.data_ptr()], [8, 8])
    assert torch.equal(x, out)


def check_level() -> None:
    for options, (dtype, int8), tokens in itertools.product(OPTIONS.values(), DTYPES, (1, 3, 40)):
        check(replace(Case(dtype=dtype, int8=int8, tokens=tokens), **options))
    for options, (dtype, int8) in itertools.product(HEADS.values(), DTYPES):
        check_heads(dtype, int8=int8, **options)
    for dtype, int8 in DTYPES:
        test_keys_are_cut_and_merged(dtype, int8)
        test_whole_blocks_of_any_size(dtype, int8)
    print("checked")


def test_every_level(isa):
    assert "checked" in isa.run(SNIPPET)
