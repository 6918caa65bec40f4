"""The Triton kernels on a GPU, through the public functions: the samples, and what only a GPU can show."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._inductor.config
from raw_calls import raw_calls
from torch import Tensor

from bigkernels import functional, use
from bigkernels._compare import compare, compare_all
from bigkernels._samples import SAMPLES, Draw, Sample, widen
from bigkernels._samples.quantized_linear import weight_sample
from bigkernels.ops.registry import KERNEL_DTYPES
from bigkernels.triton import OPERATORS as KERNELS

pytestmark = pytest.mark.gpu

# The sizes of real models, and rows that the kernels read in several pieces.
LARGE = [
    *(
        Sample(
            op,
            f"{rows} x {size}",
            lambda d, op=op, rows=rows, size=size: {
                "x": d.normal(rows, size),
                "weight": d.normal(size, mean=1.0, scale=0.3),
                "residual": d.normal(rows, size),
            },
            {},
            ("x", "weight", "residual"),
        )
        for op in ("rms_norm", "layer_norm")
        for rows, size in ((3000, 128), (2000, 4096), (1000, 5120), (500, 8192), (300, 4099), (200, 16384), (60, 65536))
    ),
    Sample(
        "rope",
        "a layer of Llama",
        lambda d: {
            "q": d.normal(2, 777, 32, 128).transpose(1, 2),
            "k": d.normal(2, 777, 8, 128).transpose(1, 2),
            **dict(zip(("cos", "sin"), d.angles(1, 777, 128), strict=True)),
        },
        {},
        ("q", "k"),
    ),
    Sample(
        "glu",
        "a layer of Llama",
        lambda d: {"gate": d.normal(500, 11008), "up": d.normal(500, 11008)},
        {},
        ("gate", "up"),
    ),
    *(
        Sample(
            "cross_entropy",
            f"{tokens} x {vocabulary}",
            lambda d, tokens=tokens, vocabulary=vocabulary: {
                "logits": d.normal(tokens, vocabulary, scale=3.0),
                "target": d.integers(vocabulary, tokens),
            },
            {"label_smoothing": 0.1, "z_loss": 1e-4},
            ("logits",),
        )
        for tokens, vocabulary in ((1100, 32000), (1100, 50257), (20, 128256), (4000, 1000))
    ),
    *(
        weight_sample(f"{name}, {tokens} x 4096", name, (tokens, 4096), 1024)
        for name in ("int8", "int8-dynamic", "int4", "nf4", "fp8")
        for tokens in (1, 16, 48, 300)
    ),
]
ALL = [sample for name in KERNELS if name != "decode_attention" for sample in SAMPLES.get(name, ())] + LARGE
TYPICAL = [s for s in ALL if s.name in ("residual", "grouped heads", "interleaved, partial", "silu", "everything")]


def named(sample: Sample) -> str:
    return f"{sample.operator}: {sample.name}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
@pytest.mark.parametrize("sample", ALL, ids=named)
def test_matches_the_reference(sample: Sample, dtype: torch.dtype):
    inputs = sample.inputs(dtype, "cuda")
    ours = sample.results(inputs, backend="triton")
    plain = sample.results(inputs, backend="reference")
    exact = sample.results(widen(inputs), backend="reference")
    wrong = {name: str(c) for name, c in sample.judge(ours, plain, exact, gradient_roundings=1).items() if not c.ok}
    assert not wrong
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in plain.items()}


@pytest.mark.parametrize("sample", ALL, ids=named)
def test_repeats_bit_for_bit(sample: Sample):
    inputs = sample.inputs(torch.bfloat16, "cuda")
    first, second = (sample.results(inputs, backend="triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name].nan_to_num(7.0), second[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("sample", ALL, ids=named)
def test_opcheck(sample: Sample):
    for op, args in raw_calls(sample, sample.inputs(torch.bfloat16, "cuda"), "triton"):
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", [None, "triton"], ids=["reference to the compiler", "kernel in the graph"])
@pytest.mark.parametrize("sample", TYPICAL, ids=named)
def test_compile_full_graph(sample: Sample, backend: str | None):
    inputs = sample.inputs(torch.bfloat16, "cuda")
    exact = sample.results(widen(inputs), backend="reference")
    plain = sample.results(inputs, backend="reference")
    torch._dynamo.reset()
    compiled = copy.copy(sample)
    object.__setattr__(compiled, "call", torch.compile(sample.call, fullgraph=True))
    with torch._inductor.config.patch(fallback_random=True):  # dropout's seed is drawn as eager draws it
        found = compiled.results(inputs, backend=backend)
    # The compiler rounds between operations less often than PyTorch, or elsewhere.
    compared = compare_all(found, plain, exact, roundings=2, scale="tensor")
    wrong = {name: str(c) for name, c in compared.items() if not c.ok}
    assert not wrong


def _step(sample: Sample, leaves: dict[str, Tensor], upstream: list[Tensor]) -> list[Tensor]:
    outputs = sample.call(leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = ()
    if sample.differentiable:
        grads = torch.autograd.grad(outputs, [leaves[n] for n in sample.differentiable], upstream)
    return [out.detach() for out in outputs] + list(grads)


def _prepared(sample: Sample) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Inputs that require gradients, upstream gradients, and the results of a first run, which compiles the kernels."""
    leaves = sample.inputs(torch.bfloat16, "cuda")
    leaves |= {n: leaves[n].detach().requires_grad_() for n in sample.differentiable}
    outputs = sample.call(leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [Draw(out.dtype, "cuda").normal(*out.shape) for out in outputs]
    return leaves, upstream, _step(sample, leaves, upstream)


@pytest.mark.parametrize("sample", TYPICAL + LARGE, ids=named)
def test_never_waits_for_the_device(sample: Sample):
    with use("triton"):
        leaves, upstream, _ = _prepared(sample)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _step(sample, leaves, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Replayed, dropout draws another seed than the eager step that is compared with.
WITHOUT_DROPOUT = [s.with_options(dropout_p=0.0) if s.options.get("dropout_p") else s for s in TYPICAL + LARGE]


@pytest.mark.parametrize("sample", WITHOUT_DROPOUT, ids=named)
def test_cuda_graph(sample: Sample):
    """A captured forward and backward pass, replayed on other values, gives what eager gives for them."""
    with use("triton"):
        leaves, upstream, _ = _prepared(sample)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _step(sample, leaves, upstream)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _step(sample, leaves, upstream)
        with torch.no_grad():
            for name, values in sample.inputs(torch.bfloat16, "cuda", seed=5).items():
                leaves[name].copy_(values)
        graph.replay()
        for found, expected in zip(captured, _step(sample, leaves, upstream), strict=True):
            assert torch.equal(found, expected)


def test_other_streams():
    """Kernels run on the current stream: what it has queued before is finished when they start."""
    x, weight = torch.zeros(4096, 4096, device="cuda"), torch.ones(4096, device="cuda")
    values = torch.randn(4096, 4096, device="cuda")
    with use("triton"):
        expected = functional.rms_norm(values, weight)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            x.copy_(values)
            found = functional.rms_norm(x, weight)
        side.synchronize()
    assert torch.equal(found, expected)


def test_targets_outside_the_vocabulary_give_nan_for_their_token_alone():
    logits = torch.randn(4, 65, device="cuda", requires_grad=True)
    target = torch.tensor([1, 65, 64, -7], device="cuda")
    with use("triton"):
        loss = functional.cross_entropy(logits, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    outside = torch.tensor([False, True, False, True], device="cuda")
    assert torch.equal(loss.isnan(), outside) and torch.equal(grad.isnan().all(1), outside)
    assert grad[~outside].isfinite().all()


# Every operator where element 2^31 lies in the last rows: a 32-bit index would wrap around before them.
_WIDE = 4096
_ROWS = 2**31 // _WIDE + 64


def _enough(tensors: int) -> None:
    needed = tensors * 2 * _ROWS * _WIDE
    free = torch.cuda.mem_get_info()[0]
    if free < needed * 1.1:
        pytest.skip(f"needs {needed * 1.1 / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")


def _bounded_by(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    comparison = compare(ours, plain, exact)
    assert comparison.ok, str(comparison)


def _check_large(call, inputs: dict[str, Tensor], rows: tuple[str, ...]) -> None:
    """`call` on all rows and on the last 64 alone: outputs and gradients of those rows agree with the reference."""
    last = {n: t[-64:] if n in rows else t for n, t in inputs.items()}

    def run(backend: str, given: dict[str, Tensor]) -> list[Tensor]:
        leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in given.items()}
        with use(backend):
            out = call(**leaves)
        out.backward(torch.ones((), device="cuda", dtype=out.dtype).expand(out.shape))
        return [out.detach()[-64:]] + [leaves[n].grad[-64:] for n in rows if leaves[n].is_floating_point()]

    ours = run("triton", inputs)
    plain, exact = run("reference", last), run("reference", widen(last))
    for results in zip(ours, plain, exact, strict=True):
        _bounded_by(*results)


@pytest.mark.parametrize("operator", ["rms_norm", "layer_norm"])
def test_more_than_2_31_elements_norms(operator: str):
    _enough(5)
    x = torch.randn(_ROWS, _WIDE, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(_WIDE, device="cuda", dtype=torch.bfloat16)
    _check_large(getattr(functional, operator), {"x": x, "weight": weight}, ("x",))


def test_more_than_2_31_elements_glu():
    _enough(7)
    gate, up = (torch.randn(_ROWS, _WIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    _check_large(functional.glu, {"gate": gate, "up": up}, ("gate", "up"))


def test_more_than_2_31_elements_cross_entropy():
    _enough(3)
    vocabulary = 131072
    logits = torch.randn(2**31 // vocabulary + 64, vocabulary, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(vocabulary, logits.shape[:1], device="cuda")
    _check_large(
        lambda logits, target: functional.cross_entropy(logits, target, reduction="none"),
        {"logits": logits, "target": target},
        ("logits", "target"),
    )


def test_more_than_2_31_elements_rope():
    _enough(3)
    length = 2**31 // (32 * 128) + 64
    q = torch.randn(1, length, 32, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k = torch.randn(1, length, 1, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    angle = torch.randn(1, length, 128, device="cuda", dtype=torch.bfloat16)
    cos, sin = angle.cos(), angle.sin()
    with use("triton"):
        ours = functional.rope(q, k, cos, sin)[0][:, :, -64:]
    last = [q[:, :, -64:], k[:, :, -64:], cos[:, -64:], sin[:, -64:]]
    with use("reference"):
        _bounded_by(ours, functional.rope(*last)[0], functional.rope(*(t.double() for t in last))[0])
