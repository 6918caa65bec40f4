"""The benchmark family of optimizers: what its candidates share and own, and whether its checks find errors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from bigkernels import optim
from bigkernels.bench import eager_optimizers, engine, report
from bigkernels.bench.case import BUILTIN, EAGER, OURS, Settings
from bigkernels.bench.families import cases, optimizers
from bigkernels.bench.optimizers import Problem, Training, compare_norms, some_of

QUICK = Settings.quickly()
FEW = optimizers.uneven(30_000, 5, 0.7)


def checked(case):
    _, rows = engine.check(case)
    return {row.candidate: row for row in rows}


def test_sizes_are_uneven_and_add_up():
    shapes = optimizers.uneven(1000, 30, 1.5)
    assert sum(n for (n,) in shapes) == 1000
    assert min(shapes)[0] >= 1
    assert len(set(shapes)) > 15
    assert shapes == optimizers.uneven(1000, 30, 1.5)


def test_the_compared_tensors_are_of_all_sizes():
    shapes = optimizers.uneven(10**6, 200, 1.5)
    numbers = some_of(shapes)
    assert {0, 199, shapes.index(min(shapes)), shapes.index(max(shapes))} <= set(numbers)
    assert 8 <= len(numbers) <= 12
    assert some_of([(3,)]) == [0]


def test_gradients_come_back_exactly_and_nobody_else_sees_a_candidate():
    problem = Problem.drawn(FEW, torch.bfloat16, "cpu", [0, 2])
    start, grads = ([t.clone() for t in tensors] for tensors in (problem.start, problem.grads))
    for clips in (False, True):
        training = Training(partial(torch.optim.SGD, lr=1.0), problem, clips=clips)
        with torch.no_grad():
            found = training.results((1.0, -0.5, 2.0))
        torch.testing.assert_close(found["parameters"][: FEW[0][0]], start[0] - 2.5 * grads[0], rtol=0.02, atol=1e-3)
        for now, before in ((problem.start, start), (problem.grads, grads)):
            assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
        assert (training.params[0].grad is problem.grads[0]) is not clips


def test_a_part_is_the_compared_tensors():
    problem = Problem.drawn(FEW, torch.float32, "cpu", [1, 3])
    training = Training(partial(torch.optim.SGD, lr=1.0), problem, reduced=True)
    assert list(training.params) == [1, 3]
    assert training.part == pytest.approx((FEW[1][0] + FEW[3][0]) / 30_000)
    part = problem.part(torch.float64)
    assert [t.shape for t in part.start] == [FEW[1], FEW[3]]
    part.start[0].zero_(), part.grads[1].zero_()
    assert problem.start[1].any()
    assert problem.grads[3].any()


@pytest.mark.parametrize("case", cases("optimizers", QUICK), ids=str)
def test_bytes_are_those_of_parameters_gradients_and_states(case):
    contest = case.prepare()
    for candidate in contest.candidates:
        training = candidate.results.func.__self__
        training.step()
        params = training.params.values()
        own = sum(2 * p.nbytes + p.grad.nbytes for p in params)
        own += 2 * candidate.state_bytes() * sum(p.numel() for p in params)
        grads, count = sum(p.grad.nbytes for p in params), sum(p.numel() for p in params)
        if "clipping" in case.name:  # reads gradients for the norm; torch writes them too, and reads parameters again
            own += grads if candidate.name == OURS else 4 * grads
        if "LAMB" in case.name:  # reads parameters and moments again
            own += 12 * count
        if not case.flops:
            assert (candidate.bytes or case.bytes) == pytest.approx(own, rel=0.02)


def test_the_measured_bytes_and_operations_are_those_of_the_design():
    found = {case.name: case for case in cases("optimizers", Settings())}
    a_parameter = {
        "AdamW, 200 tensors": 28,
        "AdamW, 20000 tensors": 28,
        "AdamW, clipping, average of parameters, 200 tensors": 40,
        "AdamW, bfloat16 states, stochastic, 200 tensors": 14,
        "AdamW, bfloat16 states, kahan, 200 tensors": 18,
        "AdamW, int8 states, stochastic, 200 tensors": 10.06,
        "AdamW, int8 states, kahan, 200 tensors": 14.06,
        "AdamW, int8 states, nearest, 200 tensors": 10.06,
        "SGD with momentum, 200 tensors": 20,
        "RMSprop, 200 tensors": 20,
        "Adagrad, 200 tensors": 20,
        "Lion, 200 tensors": 20,
        "LAMB, 200 tensors": 40,
    }
    for name, count in a_parameter.items():
        assert found.pop(name).bytes / 1e8 == pytest.approx(count, rel=1e-3)
    (matrices,) = (case for case in found.values() if case.flops)
    squares, wide = 4 * 1024**3 + 2 * 1024**3, 4 * 1024**2 * 2816 + 2 * 1024**3
    assert matrices.flops == 12 * 5 * (squares + wide)


def test_states_of_8_bits_are_a_quarter():
    found = {}
    for dtype in (torch.bfloat16, "int8"):
        for rounding in ("stochastic", "kahan"):
            row = checked(optimizers.half(QUICK, optimizers.uneven(300_000, 12, 0.7), dtype, rounding))[OURS]
            found[dtype, rounding] = row.state_bytes
    assert 2.0 < found["int8", "stochastic"] <= 2.1
    assert 4.0 < found["int8", "kahan"] <= 4.1
    assert found[torch.bfloat16, "stochastic"] == pytest.approx(4.0, abs=0.01)
    assert found[torch.bfloat16, "kahan"] == pytest.approx(6.0, abs=0.01)


# An optimizer that forgets something, and the cases that have to find that.
FORGETFUL = {
    "decay": (("AdamW", {"weight_decay": 0.0}), lambda: optimizers.adamw(QUICK, FEW)),
    "second average": (("AdamW", {"betas": (0.9, 0.98)}), lambda: optimizers.adamw(QUICK, FEW)),
    "clipping": (("AdamW", {"max_grad_norm": None}), lambda: optimizers.clipped_and_averaged(QUICK, FEW)),
    "average": (("AdamW", {"ema_decay": 0.98}), lambda: optimizers.clipped_and_averaged(QUICK, FEW)),
    "16 bits": (("AdamW", {"betas": (0.8, 0.99)}), lambda: optimizers.half(QUICK, FEW, torch.bfloat16, "stochastic")),
    "8 bits": (("AdamW", {"betas": (0.8, 0.99)}), lambda: optimizers.half(QUICK, FEW, "int8", "kahan")),
    "momentum": (("SGD", {"momentum": 0.8}), lambda: optimizers.by_torch(QUICK, FEW, *optimizers._TORCH[0])),
    "Lion": (("Lion", {"betas": (0.9, 0.98)}), lambda: optimizers.by_loop(QUICK, FEW, *optimizers._OTHERS[0])),
    "Muon": (("Muon", {"ns_steps": 4}), lambda: optimizers.muon(QUICK, 2, ((32, 32), (32, 88)))),
    "Muon's lr": (("Muon", {"adjust_lr_fn": "match_rms_adamw"}), lambda: optimizers.muon(QUICK, 1, ((32, 32),))),
}


@pytest.mark.parametrize("what", FORGETFUL)
def test_a_step_that_is_wrong_is_found(what, monkeypatch):
    (name, changes), make = FORGETFUL[what]
    right = getattr(optim, name)
    monkeypatch.setattr(optim, name, lambda params, **options: right(params, **options | changes))
    rows = checked(make())
    assert rows[OURS].status == "wrong"
    assert {r.status for r in rows.values() if not r.ours and r.status != "missing"} == {"ok"}


def test_a_wrong_element_is_found(monkeypatch):
    class Wrong(optim.AdamW):
        @torch.no_grad()
        def step(self):
            super().step()
            largest = max(self.param_groups[0]["params"], key=len)
            largest[-1].mul_(1.001)

    monkeypatch.setattr(optim, "AdamW", Wrong)
    assert checked(optimizers.adamw(QUICK, FEW))[OURS].status == "wrong"


def test_norms_are_held_to_the_error_of_torch_and_roundings():
    exact = {"x": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    plain = {"x": exact["x"] + torch.tensor([0.0, 0.25])}
    allowed = 2 * 0.25 + 2 * 2**-7 * 5.0
    for error, ok in ((0.99 * allowed, True), (1.01 * allowed, False), (float("nan"), False)):
        found = compare_norms({"x": exact["x"] + torch.tensor([error, 0.0])}, plain, exact, roundings=2)["x"]
        assert found.ok is ok
        assert found.bound == pytest.approx(allowed)


def test_a_slow_candidate_is_timed_once_on_a_part_and_scaled(limits, monkeypatch, capsys):
    monkeypatch.setattr(optimizers, "_slow_in_bfloat16", lambda device: True)
    matrices = optimizers.muon(QUICK, 3, ((16, 16), (16, 40)))
    rows = engine.run(matrices, replace(limits, update=2e9), replace(QUICK, rounds=3, seconds=0.0))
    by_name = {row.candidate: row for row in rows}
    slow = by_name[BUILTIN]
    assert (slow.status, slow.slow, slow.seconds.rounds, slow.extra_bytes) == ("ok", True, 1, None)
    assert slow.part == pytest.approx(1 / 3)
    assert by_name[EAGER].part == by_name[OURS].part == 1.0
    assert by_name[OURS].seconds.rounds == 3
    assert by_name[OURS].extra_bytes is not None
    peak = limits.matrix.get(matrices.products)
    for row in rows if peak else ():
        assert row.limit_percent == pytest.approx(100 * matrices.flops / peak / row.seconds.median)
    report.print_rows("optimizers", rows)
    printed = capsys.readouterr().out
    assert f"builtin in {matrices.name} float32 step: timed once on 33.3 % of the work, and scaled" in printed
    assert printed.count("timed once") == 1


def test_rows_have_their_own_bytes_and_the_limit_of_updates_in_place(limits):
    rows = engine.run(optimizers.clipped_and_averaged(QUICK, FEW), replace(limits, update=2e9), QUICK)
    by_name = {row.candidate: row for row in rows}
    assert by_name[OURS].bytes == 40 * 30_000
    assert by_name[BUILTIN].bytes == 52 * 30_000
    for row in rows:
        assert row.gbps == pytest.approx(row.bytes / row.seconds.median / 1e9)
        assert row.limit_percent == pytest.approx(100 * row.bytes / 2e9 / row.seconds.median)
        assert row.state_bytes == pytest.approx(12, rel=0.01)
    assert by_name[OURS].vs_best_other == pytest.approx(by_name[BUILTIN].seconds.median / by_name[OURS].seconds.median)


def test_eager_lion_takes_steps_of_one_size():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    p.grad = torch.tensor([0.5, -0.001])
    lion = eager_optimizers.Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    lion.step()
    assert torch.allclose(p, torch.tensor([0.9, 2.1]))
    assert torch.allclose(lion.state[p]["exp_avg"], torch.tensor([0.005, -0.00001]))
