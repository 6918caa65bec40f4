from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from bigkernels import functional
from bigkernels.bench import engine, limits
from bigkernels.bench.case import BUILTIN, EAGER, OURS, Settings
from bigkernels.bench.families import FAMILIES, attention, cases, cross_entropy, model
from bigkernels.bench.families.attention import OURS_ALONE
from bigkernels.bench.operators import Call
from bigkernels.bench.peers import (
    BITSANDBYTES,
    CUDNN,
    FLASH,
    FLASH4,
    FLEX,
    INT_MM,
    LIGER,
    MARLIN,
    SCALED_MM,
    TORCHAO,
)
from bigkernels.ops import registry, use

QUICK = Settings.quickly()
ON_GPUS = {LIGER, FLASH, FLASH4, CUDNN, FLEX, TORCHAO, MARLIN, INT_MM, SCALED_MM, OURS_ALONE}
_APART = ("model", "generation", "encoders")  # these have tests of their own
OPERATOR_FAMILIES = [name for name in FAMILIES if name not in _APART]


@pytest.mark.parametrize("family", OPERATOR_FAMILIES)
def test_all_candidates_of_a_family_are_right(family):
    for case in cases(family, QUICK):
        steps, rows = engine.check(case)
        assert {EAGER, OURS} & set(case.candidates) <= set(steps)
        assert OURS in steps
        assert [(r.candidate, r.reason) for r in rows if r.status not in ("ok", "missing")] == []
        assert {r.candidate for r in rows} == set(case.candidates)
        missing = {*ON_GPUS, *({BITSANDBYTES} if find_spec("bitsandbytes") is None else ())}
        assert {r.candidate for r in rows if r.status == "missing"} == missing & set(case.candidates)


# Of attention, the operations count; the bytes of optimizers: test_optimizers.py.
@pytest.mark.parametrize("family", [f for f in OPERATOR_FAMILIES if f not in ("small", "attention", "optimizers")])
def test_forward_bytes_are_those_of_inputs_and_outputs(family):
    for case in (c for c in cases(family, QUICK) if not c.backward):
        contest = case.prepare()
        ours = next(c for c in contest.candidates if c.name == OURS)
        call = ours.results.__self__
        read = [t for name, t in call.inputs.items() if name != "dense"]  # which the other candidates read
        tensors = [*read, *ours.results().values()]
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
        "mlp": "2048 x 768 to 3072 gelu, bfloat16, forward + backward",
        "group_norm": "2x320x64x64 channels-last + silu, float32, forward + backward",
        "batch_norm": "8x256x28x28 + residual + relu, bfloat16, forward + backward",
        "cross_entropy": "2048x128256, bfloat16, forward + backward",
        "attention": "window 512, S 8192, D 128, bfloat16, forward + backward",
        "decode": "batch 8, cache 4096, int8, bfloat16, forward",
        "linear": "512 x 4096 to 4096, bfloat16, forward + backward",
        "quantized": "nf4, 512 x 4096 to 4096, bfloat16, forward + backward",
        "optimizers": "AdamW, int8 states, stochastic, 200 tensors, bfloat16, step",
        "linear_cross_entropy": "2048 tokens, 1024 to 128256, bfloat16, forward + backward",
        "checkpointing": "8 Llama blocks of 1024, B 1, S 1024, bfloat16, forward + backward",
        "small": "cross_entropy 49152, bfloat16, forward",
        "generation": "decode B 1, context 512, 1 thread, bfloat16, forward",
        "encoders": "MiniLM, 32 x mixed lengths, 1 thread, bfloat16, forward",
        "model": "training step, B 1, S 1024, bfloat16, forward + backward",
    }
    assert expected[family] in names


def test_model_family_trains_reads_and_generates(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(model, "CHECKED", 24)  # fewer tokens than there are, as at full size
    given = limits.Limits("cpu", 1e9, {"bfloat16": 1e12}, "given", "given")
    for case in cases("model", QUICK):
        rows = engine.run(case, given, replace(QUICK, rounds=1, seconds=0.0))
        expected = [(name, "ok", None) for name in (EAGER, model.NO_ATTENTION, OURS)]
        assert [(r.candidate, r.status, r.reason) for r in rows] == expected
        assert [r.ours for r in rows] == [False, True, True]
        assert all(r.tokens_per_second == pytest.approx(case.tokens / r.seconds.median) for r in rows)


@pytest.mark.parametrize(("length", "left"), [(700, -1), (1100, 90), (513, 0), (512, 5000), (3, -1)])
def test_attention_checked_a_few_queries_at_a_time_is_the_whole(length, left):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, length, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    call = Call(
        lambda q, k, v: functional.attention(q, k, v, causal=True, window=(left, 0)),
        {"q": q, "k": k, "v": v},
        ("q", "k", "v"),
    )
    call.upstream = [grad]
    with use("reference"):
        whole = call.results()
    for part, expected in zip(attention.one_sequence(q, k, v, grad, left), whole.values(), strict=True):
        assert torch.allclose(part, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("length", "left"), [(1, -1), (37, -1), (37, 0), (37, 5), (37, 36), (37, 100)])
def test_visible_pairs_are_counted(length, left):
    at = torch.arange(length)
    ago = at[:, None] - at
    seen = (ago >= 0) & (ago <= left if left >= 0 else True)
    assert attention.visible(length, left) == seen.sum().item()


@pytest.mark.parametrize("position", [0, -1], ids=["query of the first part", "last query"])
def test_attention_that_is_wrong_somewhere_in_the_checked_head_is_found(position, monkeypatch):
    def wrong(q, k, v, **options):
        out = right(q, k, v, **options)
        if registry._forced == "reference":
            return out
        out = out.clone()
        out[:, 0, position] += 0.1
        return out

    right = functional.attention
    monkeypatch.setattr(functional, "attention", wrong)
    for backward in (False, True):
        case = attention.windowed(QUICK, 640, 16, torch.bfloat16, window=100, backward=backward)
        _, rows = engine.check(case)
        assert {r.candidate: r.status for r in rows if r.status != "missing"} == {BUILTIN: "ok", OURS: "wrong"}


def test_exact_cross_entropy_in_parts_is_the_whole():
    generator = torch.Generator().manual_seed(0)
    made = {
        "logits": torch.randn(150, 37, generator=generator, dtype=torch.float64),
        "target": torch.randint(37, (150,), generator=generator),
    }
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
        assert 1e8 < native.read < 1e13
        assert 1e8 < native.update < 1e13
        for few in native.by_bytes.values():  # which caches hold
            assert few.read > 0.5 * native.read and few.copy > 0.5 * native.copy and few.update > 0.5 * native.update
    monkeypatch.setattr(limits, "_native", lambda: None)
    monkeypatch.setattr(limits, "_LARGE", 2**22)
    monkeypatch.setattr(limits, "_SMALLER", (2**18,))
    monkeypatch.setattr(limits, "_MATRIX", {"cpu": 256})  # float16 products take half a minute on some machines
    found = limits.measure("cpu", seconds=0.01)
    assert found.matrix_method == "torch.matmul, achieved and not a peak"
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.read < 1e13
    assert 1e8 < found.update < 1e13
    assert found.update_method == "torch.Tensor.add_"
    assert set(found.by_bytes) == {2**18}
    assert all(1e8 < b < 1e13 for b in vars(found.by_bytes[2**18]).values())
    assert set(found.matrix) == {"float32", "bfloat16", "float16"}
    assert all(math.isfinite(peak) and peak > 1e6 for peak in found.matrix.values())


def test_the_slower_of_two_limits_counts():
    given = limits.Limits("cpu", 1e9, {"float32": 1e12}, "given", "given")
    assert given.least_seconds(bytes=2 * 10**9, flops=10**12, dtype="float32") == 2.0
    small = replace(given, by_bytes={2**20: limits.Bandwidth(9e9, read=16e9)}, read=1e9)
    assert small.bandwidth(1) == small.bandwidth(2**20) == 9e9
    assert small.bandwidth(2**24) == pytest.approx(3e9)  # half of the way, both by logarithms
    assert small.bandwidth(2**24, only_read=True) == pytest.approx(4e9)
    assert small.bandwidth(2**24, in_place=True) == pytest.approx(3e9)  # not measured
    assert small.bandwidth(2**28) == small.bandwidth(2**40) == 1e9
    assert given.least_seconds(bytes=10**9, flops=3 * 10**12, dtype="float32") == 3.0
    assert given.least_seconds(bytes=0, flops=10**12, dtype="float16") == 0.0  # nobody measured float16
    # What only reads is held to the read bandwidth, where that was measured.
    assert given.least_seconds(bytes=10**9, flops=0, dtype="float32", only_read=True) == 1.0
    assert given.least_seconds(bytes=10**9, flops=0, dtype="float32", in_place=True) == 1.0
    given = replace(given, read=2e9, update=4e9)
    assert given.least_seconds(bytes=10**9, flops=0, dtype="float32", only_read=True) == 0.5
    assert given.least_seconds(bytes=10**9, flops=0, dtype="float32", in_place=True) == 0.25
    assert given.least_seconds(bytes=10**9, flops=0, dtype="float32") == 1.0
