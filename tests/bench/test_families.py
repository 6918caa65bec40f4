from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bigkernels.bench import engine, limits
from bigkernels.bench.case import EAGER, OURS, Settings
from bigkernels.bench.families import FAMILIES, cases, cross_entropy
from bigkernels.bench.operators import Call
from bigkernels.ops import use

QUICK = Settings.quickly()
OPERATOR_FAMILIES = [name for name in FAMILIES if name != "model"]


@pytest.mark.parametrize("family", OPERATOR_FAMILIES)
def test_all_candidates_of_a_family_are_right(family):
    for case in cases(family, QUICK):
        steps, rows = engine.check(case)
        assert {EAGER, OURS} <= set(steps)
        assert [(r.candidate, r.reason) for r in rows if r.status not in ("ok", "missing")] == []
        assert {r.candidate for r in rows} == set(case.candidates)
        assert [r.candidate for r in rows if r.status == "missing"] == ["liger-kernel"]


@pytest.mark.parametrize("family", [f for f in OPERATOR_FAMILIES if f != "small"])
def test_forward_bytes_are_those_of_inputs_and_outputs(family):
    for case in (c for c in cases(family, QUICK) if not c.backward):
        contest = case.prepare()
        ours = next(c for c in contest.candidates if c.name == OURS)
        call = ours.results.__self__
        tensors = [*call.inputs.values(), *ours.results().values()]
        assert case.bytes == pytest.approx(sum(t.nbytes for t in tensors), rel=0.05)  # weights of a row are left out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_measured_cases_are_the_ones_of_the_design(family):
    found = cases(family, Settings())
    names = [str(case) for case in found]
    assert len(set(names)) == len(names)
    assert all(case.family == family for case in found)
    expected = {
        "rms_norm": "4096x4096 + residual, float32, forward + backward",
        "layer_norm": "4096x2048, bfloat16, forward",
        "rope": "S 2048, heads 9/3, D 64, bfloat16, forward + backward",
        "glu": "2048x8192 gelu_tanh, bfloat16, forward + backward",
        "cross_entropy": "2048x128256, bfloat16, forward + backward",
        "small": "cross_entropy 49152, bfloat16, forward",
        "model": "training step, B 1, S 512, bfloat16, forward + backward",
    }
    assert expected[family] in names


def test_model_family_trains_and_generates():
    pytest.importorskip("transformers")
    training, _, generation, _ = cases("model", QUICK)
    given = limits.Limits("cpu", 1e9, {"bfloat16": 1e12}, "given", "given")
    for case in (training, generation):
        rows = engine.run(case, given, replace(QUICK, rounds=1, seconds=0.0))
        assert [(r.candidate, r.status, r.reason) for r in rows] == [(EAGER, "ok", None), (OURS, "ok", None)]
        assert all(r.tokens_per_second == pytest.approx(case.tokens / r.seconds.median) for r in rows)


def test_exact_cross_entropy_in_parts_is_the_whole():
    generator = torch.Generator().manual_seed(0)
    made = {"logits": torch.randn(150, 37, generator=generator, dtype=torch.float64),
            "target": torch.randint(37, (150,), generator=generator)}  # fmt: skip
    with use("reference"):
        whole = Call(cross_entropy.functional.cross_entropy, made, ("logits",)).results()
    parts = cross_entropy.exact(made, backward=True)
    assert parts.keys() == whole.keys()
    for name in whole:
        assert torch.allclose(parts[name], whole[name], rtol=1e-12, atol=1e-15)


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="no benchmark family 'gemm'; there are rms_norm"):
        cases("gemm", QUICK)


def test_limits_by_torch_and_natively(monkeypatch):
    if limits._native() is not None:
        native = limits.measure("cpu", seconds=0.02)
        assert native.copy_method == "bigkernels._native"
        assert 1e8 < native.copy < 1e13
    monkeypatch.setattr(limits, "_native", lambda: None)
    monkeypatch.setattr(limits, "_COPY_BYTES", 2**22)
    found = limits.measure("cpu", seconds=0.01)
    assert found.matrix_method == "torch.matmul, achieved and not a peak"
    assert 1e8 < found.copy < 1e13
    assert set(found.matrix) == {"float32", "bfloat16", "float16"}
    assert all(math.isfinite(peak) and peak > 1e6 for peak in found.matrix.values())


def test_the_slower_of_two_limits_counts():
    given = limits.Limits("cpu", 1e9, {"float32": 1e12}, "given", "given")
    assert given.least_seconds(bytes=2 * 10**9, flops=10**12, dtype="float32") == 2.0
    assert given.least_seconds(bytes=10**9, flops=3 * 10**12, dtype="float32") == 3.0
    assert given.least_seconds(bytes=0, flops=10**12, dtype="float16") == 0.0  # nobody measured float16
