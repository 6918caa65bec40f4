"""The records of routed experts, made by hand, against float64: every layout, format and number of rows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from step_programs import Maker, run
from torch import Tensor, nn

from bigkernels._load import cpu_library
from bigkernels.nn import QuantizedExperts
from bigkernels.ops import program as raw
from bigkernels.program import _records as r
from bigkernels.program._ir import Experts, ExpertWeights
from bigkernels.program._lower_experts import experts_record
from bigkernels.program._reference import experts
from bigkernels.program._weights import Reads

pytestmark = pytest.mark.skipif(cpu_library().reason is not None, reason=str(cpu_library().reason))
ROWS = [(1, 1), (2, 1), (1, 3), (1, 7), (3, 11), (2, 90)]


class Stacked(nn.Module):
    """Weights of experts: (E, 2 I, K) and (E, K, I), or the other way round."""

    def __init__(self, count: int, width: int, inner: int, dtype: torch.dtype, transposed: bool, biases: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(count + inner)

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=g).to(dtype) / shape[-1] ** 0.5, requires_grad=False)

        both, down = ((width, 2 * inner), (inner, width)) if transposed else ((2 * inner, width), (width, inner))
        self.both, self.down = made(count, *both), made(count, *down)
        self.both_bias = made(count, 2 * inner) if biases else None
        self.down_bias = made(count, width) if biases else None

    def quantize(self, config: str, transposed: bool) -> None:
        for name in ("both", "down"):
            weight = getattr(self, name)
            delattr(self, name)
            setattr(self, name, QuantizedExperts.from_parameter(weight, config, transposed))

    def place(self, **how: bool) -> ExpertWeights:
        biases = ("both_bias", "down_bias") if self.both_bias is not None else (None, None)
        return ExpertWeights(self, "both", "down", *biases, **how)


class Step:
    """A program whose rows are tokens and then what a router says of them: logits, or weights and numbers."""

    def __init__(
        self, width: int, op: dict[str, Any], place: ExpertWeights, given: bool, integers: bool = False
    ) -> None:
        count, top = op["experts"], op["top"]
        self.width, parts = width, [width, *((top, top) if given else (count,))]
        m = self.maker = Maker(sum(parts))
        values, column = [], 0
        for part in parts:
            values.append(m.activate(m.hidden, "identity", part, x_column=column))
            column += part
        names = ("x", "weights", "chosen") if given else ("x", "logits")
        self.op = Experts(out=m.value(width), stacked=place, **dict(zip(names, values, strict=True)), **op)
        self.reads = Reads()
        m.add(r.EXPERTS, experts=experts_record(self.op, self.reads, m.value, integers))
        self.program, self.parts, self.names = m.program(self.op.out), parts, names

    def run(self, hidden: Tensor) -> Tensor:
        return run(self.program, hidden, self.width, keep=hidden.shape[1])

    def exact(self, hidden: Tensor) -> Tensor:
        parts = hidden.double().split(self.parts, -1)
        return experts(self.op, {getattr(self.op, name): part for name, part in zip(self.names, parts, strict=True)})

    def tokens(self, batch: int, length: int, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, length, sum(self.parts), generator=g)
        if len(self.parts) == 3:
            top = self.parts[1]
            order = torch.rand(batch, length, self.op.experts, generator=g).argsort(-1)
            x[..., -top:] = order[..., :top].float()
        return x


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _check(step: Step, tolerance: float = 2e-5) -> None:
    for i, rows in enumerate(ROWS):
        hidden = step.tokens(*rows, seed=i)
        exact = step.exact(hidden)
        error = (step.run(hidden).double() - exact).abs().max() / exact.abs().max()
        assert error < tolerance, f"{rows}: {error:.2e}"


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("count", "top"), [(1, 1), (5, 2), (8, 8), (33, 4)])
def test_routers(count: int, top: int, sigmoid: bool, renormalize: bool):
    stacked = Stacked(count, 48, 24, torch.float32, False, False)
    op = dict(experts=count, top=top, act="silu", sigmoid=sigmoid, renormalize=renormalize, scale=1.5)
    _check(Step(48, op, stacked.place(), given=False))


@pytest.mark.parametrize("layout", list(itertools.product([False, True], ["halves", "up first", "in turn"])), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts(layout: tuple[bool, str], dtype: torch.dtype):
    transposed, order = layout
    stacked = Stacked(5, 53, 37, dtype, transposed, biases=True)
    place = stacked.place(transposed=transposed, interleaved=order == "in turn", up_first=order == "up first")
    op = dict(experts=5, top=3, act="quick_gelu", alpha=1.3, limit=0.8, up_offset=1.0, scale=1.0)
    # With weights of bfloat16 tokens are rounded to bfloat16, too.
    _check(Step(53, op, place, given=True), 2e-2 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("config", ["int8", "int4", "nf4", "fp8", "fp4"])
def test_codes(config: str, transposed: bool):
    stacked = Stacked(4, 160, 96, torch.float32, transposed, biases=False)
    stacked.quantize(config, transposed)
    op = dict(experts=4, top=2, act="silu")
    place = stacked.place(transposed=transposed)
    _check(Step(160, op, place, given=False))
    _check(Step(160, op, place, given=False, integers=True), 3e-2)


def test_threads_and_rows_change_no_bit(threads: int):
    """A row's result is the same with others around it, as far as the products' is, in any number of threads."""
    stacked = Stacked(6, 96, 200, torch.float32, False, False)
    step = Step(96, dict(experts=6, top=2, act="gelu_tanh", renormalize=True), stacked.place(), given=False)
    for rows in ROWS:
        hidden = step.tokens(*rows)
        here = step.run(hidden)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = step.run(hidden)
        torch.set_num_threads(before)
        assert torch.equal(here, alone)


def test_threads_that_lose_their_cores():
    """What one makes again while others read it are the bits that are there."""
    stacked = Stacked(6, 96, 64, torch.float32, False, False)
    op = dict(experts=6, top=3, act="silu", sigmoid=True, renormalize=True, scale=3.0)
    step = Step(96, op, stacked.place(), given=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        inputs = [step.tokens(1, n, seed=n) for n in (1, 1, 3, 20)]
        expected = [step.run(x) for x in inputs]
        torch.set_num_threads(4)
        raw.delays(15)
        for i in range(200):
            got = run(step.program, inputs[i % 4], 96, keep=inputs[i % 4].shape[1], settle=False)
            assert torch.equal(got, expected[i % 4])
    finally:
        raw.delays(0)
        raw.settle()
        torch.set_num_threads(before)


def test_numbers_that_are_no_experts():
    """They count for nothing, as models that mask experts have it; and a row may be sent to one twice."""
    stacked = Stacked(4, 32, 16, torch.float32, False, False)
    step = Step(32, dict(experts=4, top=3, act="silu"), stacked.place(), given=True)
    hidden = step.tokens(1, 6)
    hidden[0, :, -3:] = torch.tensor([[0, 0, 0], [4, 1, 2], [-1, 3, 2], [1, 1, 3], [9e9, 2, 2], [float("nan"), 0, 1]])
    known = hidden.clone()
    missing = ~((hidden[..., -3:] >= 0) & (hidden[..., -3:] < 4))
    known[..., -3:][missing] = 0
    known[..., -6:-3][missing] = 0
    exact = step.exact(known)
    torch.testing.assert_close(step.run(hidden).double(), exact, rtol=1e-4, atol=1e-5)
    for row in range(6):
        torch.testing.assert_close(
            step.run(hidden[:, row : row + 1]).double(), exact[:, row : row + 1], rtol=1e-4, atol=1e-5
        )


def test_logits_that_are_not_numbers():
    """Their row is no number, and no other row sees it."""
    stacked = Stacked(4, 32, 16, torch.float32, False, False)
    step = Step(32, dict(experts=4, top=2, act="silu"), stacked.place(), given=False)
    hidden = step.tokens(1, 3)
    expected = step.run(hidden)
    hidden[0, 1, 33] = float("nan")
    got = step.run(hidden)
    assert got[0, 1].isnan().all() and torch.equal(got[0, ::2], expected[0, ::2])


def test_what_does_not_fit_is_refused():
    stacked = Stacked(4, 32, 16, torch.float32, False, False)
    op = dict(experts=4, top=2, act="silu")
    for field, value, what in (
        ("top", 5, "no such experts"),
        ("inner", 17, "does not fit"),
        ("experts", 3, "router"),
        ("down", None, "no such experts"),
        ("hidden", 0, "value of its own"),
    ):
        step = Step(32, op, stacked.place(), given=False)
        setattr(step.maker.records[-1].experts, field, value)
        step.program = step.maker.program(step.op.out)
        with pytest.raises(RuntimeError, match=what):
            step.run(step.tokens(1, 1))
