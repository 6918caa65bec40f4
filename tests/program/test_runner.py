"""Programs of row records, made by hand, against float64; the records' sizes; what is refused."""

from __future__ import annotations

import ctypes

import pytest
import torch
from step_programs import ACTIVATIONS, Maker, no_records, norm, run

from bigkernels._load import cpu_library
from bigkernels.ops import program as raw
from bigkernels.program import _records as r

pytestmark = pytest.mark.skipif(cpu_library().reason is not None, reason=str(cpu_library().reason))


def test_records_have_the_sizes_of_c():
    names = (
        "Vector NormOf Weight NormRecord CombineRecord ActivateRecord ProductRecord HeadsOf HeadsRecord AttendRecord "
        "ExpertsRecord KeepRecord CallRecord Record ProgramHeader AngleTable LayerCache TurnRecord MixRecord "
        "ScoresTable"
    )
    assert [ctypes.sizeof(getattr(r, name)) for name in names.split()] == list(raw.sizes())


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [((1, 1), 64), ((2, 3), 37), ((1, 5), 200)])
def test_norms(kind, dtype, rows, width):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*rows, width, generator=g)
    weight, bias = (torch.randn(width, generator=g).to(dtype) for _ in range(2))
    m = Maker(width)
    first = m.norm(m.hidden, kind, weight, bias, offset=1.0, scale=0.5)
    second = m.norm(first, kind, residual=m.hidden, residual_scale=-2.0, size=width if width % 4 else width // 4)
    out = run(m.program(second), x, width, keep=rows[1])
    y = 0.5 * norm(x, kind, weight, bias, offset=1.0)
    heads = y.unflatten(-1, (-1, width if width % 4 else width // 4))
    expected = norm(heads, kind, None, None).flatten(-2) - 2.0 * x.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_activations(act):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 2 * 37 + 5, generator=g) * 3
    m = Maker(x.shape[-1])
    more = {"scale": 0.5, "softcap": 3.0, "up_offset": 1.0, "up_column": 38, "x_column": 1, "limit": 2.5}
    out = run(m.program(m.activate(m.hidden, act, width=37, up=m.hidden, **more)), x, 37, keep=3)
    y = ACTIVATIONS[act](x[..., 1:38].double().clamp(max=2.5)) * (x[..., 38:75].double().clamp(-2.5, 2.5) + 1.0) * 0.5
    torch.testing.assert_close(out.double(), 3.0 * torch.tanh(y / 3.0), rtol=1e-5, atol=1e-6)


def test_sums_and_kept_rows():
    g = torch.Generator().manual_seed(3)
    x, channel = torch.randn(3, 5, 45, generator=g), torch.randn(45, generator=g).half()
    m = Maker(45)
    a = m.combine((m.hidden, 2.0, channel), (m.hidden, -1.0, None))
    b = m.combine((m.keep(a), 1.0, None), (m.keep(m.hidden), 3.0, None))
    for keep in (1, 2, 5):
        out = run(m.program(b), x, 45, keep=keep)
        expected = (x.double() * (2 * channel.double() - 1) + 3 * x.double())[:, -keep:]
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_states_and_logits(dtype):
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    m = Maker(64)
    out = run(m.program(m.combine((m.hidden, 2.0, None))), x, 64, keep=3)
    assert out.dtype == dtype and torch.equal(out, 2 * x)


def test_the_models_own_code_in_between():
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(5))
    m = Maker(16)
    a = m.combine((m.hidden, 2.0, None))
    (b,) = m.call([a], [20])
    last = m.keep(m.activate(b, "identity"))
    program = m.program(last)
    positions = torch.zeros(2, 3, dtype=torch.int64)
    number = raw.start(program, x, positions, None, no_records(15), no_records(), 1, 0)
    try:
        assert raw.step(number) == 1
        seen = torch.empty(2, 3, 16)
        raw.read(number, a, seen)
        with pytest.raises(RuntimeError, match="not to be read"):
            raw.read(number, b, torch.empty(2, 3, 20))
        with pytest.raises(RuntimeError, match="not to be written"):
            raw.write(number, a, seen)
        with pytest.raises(RuntimeError, match="6 rows of 20"):
            raw.write(number, b, seen)
        raw.write(number, b, torch.cat((seen, seen[..., :4]), -1))
        assert raw.step(number) == -1
        logits = torch.empty(2, 1, 20)
        raw.read(number, last, logits)
    finally:
        raw.finish(number)
    assert torch.equal(seen, 2 * x) and torch.equal(logits, torch.cat((2 * x, 2 * x[..., :4]), -1)[:, -1:])
    with pytest.raises(RuntimeError, match="no run"):
        raw.step(number)
    with pytest.raises(RuntimeError, match="own code"):
        run(program, x, 20)


def test_what_is_refused():
    x = torch.zeros(1, 2, 8)
    good = Maker(8)
    program = good.program(good.keep(good.combine((good.hidden, 1.0, None))))
    positions = torch.zeros(1, 2, dtype=torch.int64)

    def call(program=program, hidden=x, positions=positions, caches=None, angles=None, logits=None, past=0):
        logits = torch.empty(1, 1, 8) if logits is None else logits
        caches, angles = no_records(15) if caches is None else caches, no_records() if angles is None else angles
        raw.run(program, hidden, positions, None, caches, angles, logits, past)

    call()
    for wrong, message in (
        ({"hidden": torch.zeros(1, 2, 9)}, "hidden states"),
        ({"hidden": torch.zeros(1, 0, 8)}, "a run of"),
        ({"hidden": torch.zeros(1, 2, 8, dtype=torch.float64)}, "float32, bfloat16"),
        ({"positions": torch.zeros(1, 3, dtype=torch.int64)}, "positions"),
        ({"positions": torch.zeros(1, 2, dtype=torch.int32)}, "positions"),
        ({"logits": torch.empty(1, 3, 8)}, "a run of"),
        ({"logits": torch.empty(1, 1, 9)}, "logits"),
        ({"past": -1}, "a run of"),
        ({"caches": torch.zeros(1, 15, dtype=torch.int64)}, "0 caches"),
        ({"caches": torch.zeros(1, 14, dtype=torch.int64)}, "half a record"),
        ({"program": program[:40].clone()}, "no program"),
        ({"program": program.clone()}, "elsewhere"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)

    for make, message in (
        (lambda m: m.activate(5, "silu", width=8), "no such activation"),
        (lambda m: m.activate(0, "silu", width=9) and 0, "operand"),
        (lambda m: m.norm(0, size=3), "no such norm"),
        (lambda m: m.combine((0, 1.0, None), (m.value(8), 1.0, None)), "a term"),
        (lambda m: m.combine((m.keep(0), 1.0, None), (0, 1.0, None)), "a term"),
        (lambda m: m.add(99) or m.value(8), "no such operation"),
        (lambda m: m.value(8), "no logits"),
        (lambda m: m.add(r.KEEP, keep=r.KeepRecord(x=0, out=0)) or 0, "of its own"),
    ):
        m = Maker(8)
        with pytest.raises(RuntimeError, match=message):
            call(program=m.program(make(m)))


def test_a_stop_before_everything_else():
    """The model's own code may come first; what it writes is read by the next record."""
    x = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(4))
    m = Maker(5)
    (first,) = m.call([m.hidden], [5])
    (second,) = m.call([first], [5])
    program = m.program(m.combine((second, 2.0, None)))
    positions = torch.arange(3).expand(1, 3).contiguous()
    for _ in range(2):  # the place of the first run is used again
        number = raw.start(program, x, positions, None, no_records(15), no_records(), 3, 0)
        given, out = torch.empty(1, 3, 5), torch.empty(1, 3, 5)
        assert raw.step(number) == 0
        raw.read(number, m.hidden, given)
        raw.write(number, first, -given)
        assert raw.step(number) == 1
        raw.read(number, first, given)
        raw.write(number, second, given + 1)
        assert raw.step(number) == -1
        raw.read(number, m.records[-1].combine.out, out)
        raw.finish(number)
        assert torch.equal(out, 2 * (1 - x))


@pytest.mark.parametrize("threads", [1, 3])
def test_no_rows_are_kept(threads):
    """The caches are filled, and what comes after the last rows were dropped is not made."""
    torch.manual_seed(0)
    m = Maker(48)
    weight = [torch.randn(n, 48) / 7 for n in (48, 48, 48, 300)]
    q, k, v = m.product(m.norm(m.hidden), *weight[:3])
    (y,) = m.product(m.attend(m.heads(q, k, v, 3, 3, 16, 0), 0, 3, 3, 16), weight[0])
    last = m.keep(m.combine((y, 1.0, None), (m.hidden, 1.0, None)))
    (logits,) = m.product(m.norm(last, weight=torch.full((48,), float("nan"))), weight[3])
    program = m.program(logits, angles=1)
    angle = torch.rand(40, 16)
    cos, sin = angle.cos(), angle.sin()
    angles = torch.tensor([[cos.data_ptr(), sin.data_ptr(), 0, 16, 40]])
    before, filled = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    for keep in (1, 0):
        cache = torch.zeros(2, 2, 3, 40, 16)
        caches = torch.zeros(1, 15, dtype=torch.int64)
        strides = [3 * 40 * 16, 40 * 16, 16]
        caches[0, :11] = torch.tensor([cache[0].data_ptr(), cache[1].data_ptr(), *strides, *strides, 0, 40, 0])
        x = torch.randn(2, 30, 48, generator=torch.Generator().manual_seed(1))
        out = run(program, x, 300, keep=keep, caches=caches, angles=angles)
        assert out.shape == (2, keep, 300)
        filled.append(cache)
    torch.set_num_threads(before)
    assert torch.equal(*filled) and filled[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match="a run of"):
        raw.run(
            program,
            torch.zeros(1, 1, 48),
            torch.zeros(1, 1, dtype=torch.int64),
            None,
            caches,
            angles,
            torch.empty(1, 2, 300),
            0,
        )
