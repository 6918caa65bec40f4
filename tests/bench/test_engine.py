from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bigkernels import functional
from bigkernels.bench import engine
from bigkernels.bench.case import BUILTIN, EAGER, OURS, Case, Missing
from bigkernels.ops import registry


def wrong(gate, up):
    """glu with an error that only a comparison finds; right where it is asked for the reference."""
    factor = 1.0 if registry._forced == "reference" else 1.01
    return functional.glu(gate, up) * factor


def raising(gate, up):
    if registry._forced == "reference":
        return functional.glu(gate, up)
    raise RuntimeError("no such kernel\nand more lines")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_candidate_is_checked_and_timed(make_case, limits, settings, backward):
    rows = engine.run(make_case(backward=backward, builtin=lambda gate, up: up * F.silu(gate)), limits, settings)
    by_name = {row.candidate: row for row in rows}
    assert list(by_name) == [EAGER, BUILTIN, OURS, "peer"]
    for name in (EAGER, BUILTIN, OURS):
        row = by_name[name]
        assert row.status == "ok"
        assert row.error_ratio <= 1
        assert row.seconds.rounds >= settings.rounds
        assert row.gbps == pytest.approx(row.bytes / row.seconds.median / 1e9)
        assert row.limit_percent == pytest.approx(100 * row.bytes / limits.copy / row.seconds.median)
        assert row.extra_bytes >= 4 * 32 * 4  # at least what it returns
        assert row.backward is backward
    assert by_name[EAGER].vs_eager == 1.0
    fastest = min(by_name[EAGER].seconds.median, by_name[BUILTIN].seconds.median)
    assert by_name[OURS].vs_best_other == pytest.approx(fastest / by_name[OURS].seconds.median)
    assert by_name[EAGER].vs_best_other is None
    assert engine.failed(rows) == []


def test_threads_of_a_case_are_those_of_its_steps(make_case, limits, settings):
    seen = set()

    def eager(gate, up):
        seen.add(torch.get_num_threads())
        return F.silu(gate) * up

    before = torch.get_num_threads()
    case = make_case(eager=eager)
    rows = [row for n in (2, 5) for row in engine.run(replace(case, threads=n), limits, settings)]
    assert seen == {2, 5} and torch.get_num_threads() == before
    engine.compare_threads(rows)
    two, five = (row for row in rows if row.candidate == EAGER)
    assert two.speedup == 1 and five.speedup == two.seconds.median / five.seconds.median


def test_a_missing_peer_is_named_with_the_reason(make_case, limits, settings):
    row = next(r for r in engine.run(make_case(), limits, settings) if r.candidate == "peer")
    assert (row.status, row.reason, row.seconds) == ("missing", "made for another device than cpu", None)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_ours_wrong_is_not_timed_and_fails_the_run(make_case, limits, settings, backward):
    rows = engine.run(make_case(backward=backward, ours=wrong), limits, settings)
    ours = next(row for row in rows if row.candidate == OURS)
    assert ours.status == "wrong"
    assert ours.seconds is None
    assert ours.error_ratio > 1
    assert "allowed" in ours.reason
    assert engine.failed(rows) == [ours]
    assert next(row for row in rows if row.candidate == EAGER).seconds is not None


def test_others_wrong_are_left_out_but_do_not_fail_the_run(make_case, limits, settings):
    rows = engine.run(make_case(builtin=lambda gate, up: gate * up), limits, settings)
    by_name = {row.candidate: row for row in rows}
    assert (by_name[BUILTIN].status, by_name[BUILTIN].seconds) == ("wrong", None)
    assert by_name[OURS].vs_best_other == by_name[OURS].vs_eager  # the wrong one is nobody's rival
    assert engine.failed(rows) == []


def test_wrong_eager_is_found_by_the_reference(make_case, limits, settings):
    rows = engine.run(make_case(eager=lambda gate, up: F.gelu(gate) * up), limits, settings)
    by_name = {row.candidate: row for row in rows}
    assert by_name[EAGER].status == "wrong"
    assert by_name[OURS].status == "ok"
    assert by_name[OURS].vs_eager is None


def test_a_wrong_gradient_alone_is_found(make_case, limits, settings):
    class HalfGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    def ours(gate, up):
        if registry._forced == "reference":
            return functional.glu(gate, up)
        return functional.glu(gate, HalfGradient.apply(up))

    assert next(r for r in engine.run(make_case(ours=ours), limits, settings) if r.ours).status == "ok"
    row = next(r for r in engine.run(make_case(ours=ours, backward=True), limits, settings) if r.ours)
    assert row.status == "wrong"
    assert row.reason.startswith("grad up")


def test_ours_raising_fails_the_run(make_case, limits, settings):
    rows = engine.run(make_case(ours=raising), limits, settings)
    assert [(r.candidate, r.status, r.reason) for r in engine.failed(rows)] == [
        (OURS, "failed", "RuntimeError: no such kernel")
    ]


def test_a_case_that_cannot_be_made_ready(limits, settings):
    def lacks():
        raise Missing("transformers is not installed")

    def breaks():
        raise ValueError("bad shapes")

    cases = [Case("tiny", "x", "cpu", "float32", False, (EAGER,), prepare) for prepare in (lacks, breaks)]
    missing, broken = ([(r.candidate, r.status, r.reason) for r in engine.run(c, limits, settings)] for c in cases)
    assert missing == [("all", "missing", "transformers is not installed")]
    assert broken == [("all", "failed", "ValueError: bad shapes")]
    assert engine.failed(engine.run(cases[1], limits, settings))


def test_a_peer_that_writes_to_its_inputs_spoils_no_other(make_case, limits, settings):
    def clobbering(gate, up):
        out = F.silu(gate) * up
        gate.zero_()
        return out

    rows = engine.run(make_case(peers={"peer": lambda device: clobbering}), limits, settings)
    assert {row.candidate: row.status for row in rows} == {EAGER: "ok", "peer": "ok", OURS: "ok"}


def test_compiled_candidates_compete(make_case, limits, settings):
    settings = type(settings)(rounds=1, seconds=0.0)
    rows = engine.run(make_case(settings=settings, ours_compiled=True), limits, settings)
    assert {r.candidate: r.status for r in rows} == {
        "eager": "ok",
        "compile": "ok",
        "bigkernels": "ok",
        "bigkernels + compile": "ok",
        "peer": "missing",
    }
