"""The launchers and kernels of bigkernels.triton against the references, by the criterion of the package.

bfloat16 is left to real GPUs: the interpreter's arithmetic on it is wrong.
"""

import importlib

import pytest
import torch
from raw_calls import raw_calls
from triton.runtime.interpreter import InterpretedFunction

from bigkernels import functional, use
from bigkernels._compare import worst
from bigkernels._samples import SAMPLES, Sample, widen
from bigkernels._samples.rows import norm_inputs
from bigkernels.ops import cross_entropy
from bigkernels.triton import OPERATORS as KERNELS
from bigkernels.triton._launch import recording

pytestmark = pytest.mark.usefixtures("launchers_serve_cpu_tensors")


def _large_norms(operator: str, parameters: str) -> list[Sample]:
    """More rows than a wave of programs, and rows that do not fit the registers: backward, and then forward too."""
    return [
        Sample(operator, f"{rows} x {size}{extra}", norm_inputs(names, (rows, size)), {}, tuple(names.split()))
        for rows, size, extra in ((600, 48, ""), (11, 4099, ""), (3, 8208, ""), (3, 16999, " residual"), (2, 16999, ""))
        for names in (f"x {parameters}{extra}",)
    ]


# What has no samples has tests of its own.
SAMPLED = [name for name in KERNELS if name in SAMPLES]
SMALL = [sample for name in SAMPLED for sample in SAMPLES[name]]
LARGE = _large_norms("rms_norm", "weight") + _large_norms("layer_norm", "weight bias")
CASES = SMALL + LARGE
_FORMATS = tuple(f"{name}, many tokens" for name in ("int8", "int8-dynamic", "int4", "nf4", "fp8"))
TYPICAL = [
    s
    for s in CASES
    if s.name in ("residual", "grouped heads", "interleaved, partial", "silu", "everything", "causal", *_FORMATS)
]
ODD = [s for s in CASES if "strided" in s.name or s.name in ("empty", "no tokens")]


def named(value) -> str:
    return f"{value.operator}: {value.name}" if isinstance(value, Sample) else str(value).removeprefix("torch.")


# The interpreter is slow: every sample in float32, the typical ones in float16 too.
@pytest.mark.parametrize(
    "sample, dtype", [(s, torch.float32) for s in CASES] + [(s, torch.float16) for s in TYPICAL], ids=named
)
def test_matches_the_reference(sample, dtype):
    inputs = sample.inputs(dtype)
    ours = sample.results(inputs, backend="triton")
    plain = sample.results(inputs, backend="reference")
    exact = sample.results(widen(inputs), backend="reference")
    name, comparison = worst(sample.judge(ours, plain, exact, gradient_roundings=1))
    assert comparison.ok, f"{name}: {comparison}"
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in plain.items()}


def _defined_kernels() -> set:
    modules = [
        importlib.import_module(f"bigkernels.triton.{name}")
        for name in (*SAMPLED, "_norm", "_channel_norm", "_attention")
    ]
    found = [item for module in modules for item in vars(module).items() if isinstance(item[1], InterpretedFunction)]
    return {fn for name, fn in found if not name.startswith("_")}


def test_the_samples_reach_every_kernel():
    left = _defined_kernels()
    for sample in LARGE + TYPICAL + CASES:
        with recording() as launches:
            sample.results(sample.inputs(torch.float32), backend="triton")
        left -= {launch.kernel for launch in launches}
        if not left:
            return
    assert left == set()


@pytest.mark.parametrize("sample", TYPICAL + ODD, ids=named)
def test_opcheck(sample):
    """The launchers return what the fake kernels promise: shapes, dtypes and strides."""
    for op, args in raw_calls(sample, sample.inputs(torch.float16), "triton"):
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("sample", TYPICAL, ids=named)
def test_repeats_bit_for_bit(sample):
    inputs = sample.inputs(torch.float32)
    first, second = (sample.results(inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _loss(logits, target, **options):
    with use("triton"):
        loss = functional.cross_entropy(logits.requires_grad_(), target, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


def test_ignored_tokens_are_not_read():
    logits, target = torch.randn(5, 300), torch.tensor([3, -100, 299, -100, 0])
    logits[target == -100] = float("nan")
    loss, grad = _loss(logits, target, label_smoothing=0.1, focal_gamma=1.5, softcap=20.0)
    assert loss.isfinite() and grad.isfinite().all()
    assert not grad[target == -100].any() and grad[target != -100].any(1).all()


def test_a_target_outside_the_vocabulary_gives_nan_for_its_token_alone(monkeypatch):
    # On a GPU nobody looks at the targets: looking would wait for the device.
    monkeypatch.setattr(cross_entropy, "_check_targets", lambda *args: None)
    logits, target = torch.randn(4, 65), torch.tensor([1, 65, 64, -7])
    loss, grad = _loss(logits, target, reduction="none")
    outside = torch.tensor([False, True, False, True])
    assert torch.equal(loss.isnan(), outside) and torch.equal(grad.isnan().all(1), outside)
    assert grad[~outside].isfinite().all()


def test_inputs_are_not_written():
    base = torch.randn(3, 40)
    before = base.clone()
    with use("triton"):
        functional.glu(base[:, :10], base[:, 20:30])
        functional.rms_norm(base[:, :10], torch.ones(10), residual=base[:, 20:30])
    assert torch.equal(base, before)


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.rms_norm(torch.ones(2, 8), torch.ones(7)),
        lambda: functional.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(9)),
        lambda: functional.glu(torch.ones(2, 8), torch.ones(2, 9)),
        lambda: functional.rope(*torch.ones(2, 1, 2, 3, 8), *torch.ones(2, 1, 4, 8)),
        lambda: functional.cross_entropy(torch.ones(2, 8), torch.ones(3, dtype=torch.int64)),
        lambda: functional.cross_entropy(torch.ones(2, 8), torch.ones(2, dtype=torch.int64), softcap=0.0),
    ],
)
def test_wrong_arguments_are_named(call):
    with use("triton"), pytest.raises(ValueError, match="weight|bias|up|cos has|target|softcap is 0"):
        call()


OPS = torch.ops.bigkernels


@pytest.mark.parametrize(
    "op, args",
    [
        (OPS.rms_norm_fwd, ((2, 8), 7, None, 1e-6, 0.0)),
        (OPS.rms_norm_fwd, ((2, 8), 8, (2, 7), 1e-6, 0.0)),
        (OPS.rms_norm_bwd, ((2, 7), (2, 8), 8, 2, None, 0.0)),
        (OPS.rms_norm_bwd, ((2, 8), (2, 8), 7, 2, None, 0.0)),
        (OPS.rms_norm_bwd, ((2, 8), (2, 8), 8, 3, None, 0.0)),
        (OPS.rms_norm_bwd, ((2, 8), (2, 8), 8, 2, (2, 7), 0.0)),
        (OPS.layer_norm_fwd, ((2, 8), 8, 7, None, 1e-5)),
        (OPS.layer_norm_bwd, ((2, 7), (2, 8), 8, 8, 2, 2, None)),
        (OPS.layer_norm_bwd, ((2, 8), (2, 8), 7, 8, 2, 2, None)),
        (OPS.layer_norm_bwd, ((2, 8), (2, 8), 8, 8, 3, 2, None)),
        (OPS.layer_norm_bwd, ((2, 8), (2, 8), 8, 8, 2, 3, None)),
        (OPS.layer_norm_bwd, ((2, 8), (2, 8), 8, 8, 2, 2, (2, 7))),
    ],
    ids=str,
)
def test_raw_operators_check_what_a_kernel_would_read(op, args):
    """Integers and tuples stand for tensors of such shapes."""
    with pytest.raises((RuntimeError, ValueError), match="fit|weight|bias|residual|grad"):
        op(*(torch.ones(a) if isinstance(a, int | tuple) else a for a in args))


@pytest.mark.parametrize("heads", [1, 3])
def test_packed_heads_that_do_not_fit(heads):
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)
    q, k = torch.ones(5, 4, 16), torch.ones(5, heads, 16)
    v = k if heads == 3 else torch.ones(5, 2, 16)
    with pytest.raises((RuntimeError, ValueError), match="heads|groups|shape|fit"):
        OPS.varlen_attention_fwd(q, k, v, starts, starts, *(None,) * 4, 3, 3, -1, -1, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("groups, lengths", [(3, 1), (2, 2)])
def test_caches_that_do_not_fit(groups, lengths):
    q, k, v = torch.ones(1, 4, 1, 16), torch.ones(1, 8, groups, 16), torch.ones(1, 8, groups, 16)
    seen = torch.full((lengths,), 5, dtype=torch.int32)
    with pytest.raises((RuntimeError, ValueError), match="heads|cache|length|fit"):
        OPS.decode_attention(q, k, v, seen, *(None,) * 5, -1, 1.0, 0.0)


@pytest.mark.parametrize("size", [48, 16999])
def test_rows_far_from_zero_keep_their_variance(size):
    x = torch.randn(2, size) + 300.0
    with use("triton"):
        y = functional.layer_norm(x)
    torch.testing.assert_close(y, functional.layer_norm(x.double()).float(), rtol=1e-3, atol=1e-3)
