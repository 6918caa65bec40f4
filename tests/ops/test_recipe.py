"""What every operator promises, run over its samples: adding an operator to SAMPLES adds it here."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._inductor.config
from every_level import CHECK, EVERY_PATH
from sizes import DEFAULTS, every_size
from torch import Tensor

import bigkernels
from bigkernels._compare import compare_all
from bigkernels._samples import SAMPLES, Sample, widen
from bigkernels.ops import OPERATORS
from bigkernels.ops.registry import KERNEL_DTYPES

ALL = [sample for samples in SAMPLES.values() for sample in samples]
# One plain call of each operator, for what does not depend on shapes and options.
PLAIN = [next((s for s in samples if s.differentiable), samples[0]) for samples in SAMPLES.values()]
# Of operators with a backward kernel.
TRAINED = [s for s in PLAIN if s.differentiable]
# The raw operators in an operator's module; each module has some of them.
RAW = ("_fwd", "_bwd", "_infer", "_append")
# And some that make other graphs, or have many options at once: for what is slow and depends on them a little.
FEW = PLAIN + [s for s in ALL if s.name in ("residual", "interleaved, partial", "everything", "nf4, many tokens")]


def named(sample: Sample) -> str:
    return f"{sample.operator}: {sample.name}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(sample: Sample, found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    wrong = {name: str(c) for name, c in sample.judge(found, plain, exact).items() if not c.ok}
    assert not wrong


def test_every_operator_has_samples():
    assert set(SAMPLES) == set(OPERATORS)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
@pytest.mark.parametrize("sample", ALL, ids=named)
def test_kernel(sample: Sample, dtype: torch.dtype, library):
    inputs = sample.inputs(dtype)
    given = {name: t.clone() for name, t in inputs.items()}
    exact = sample.results(widen(inputs), backend="reference")
    plain = sample.results(inputs, backend="reference")
    ours = sample.results(inputs, backend="cpu")
    check(sample, ours, plain, exact)
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype, name
    for name, value in sample.results(inputs, backend="cpu", backward=False).items():
        assert torch.equal(value.nan_to_num(7.0), ours[name].nan_to_num(7.0)), f"{name} differs without gradients"
    for name, t in inputs.items():
        assert torch.equal(t, given[name]), f"{name} was written to"


def every_path(sample: Sample, dtype: torch.dtype, threads: tuple[int, ...]) -> dict[tuple[int, str], str]:
    """What is wrong where every output is stored past the caches and split among some threads, by threads and name."""
    inputs = sample.inputs(dtype)
    exact = sample.results(widen(inputs), backend="reference")
    plain = sample.results(inputs, backend="reference")
    wrong = {}
    for count in threads:
        with every_size(count):
            judged = sample.judge(sample.results(inputs, backend="cpu"), plain, exact)
        wrong |= {(count, name): str(c) for name, c in judged.items() if not c.ok}
    return wrong


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
@pytest.mark.parametrize("sample", ALL, ids=named)
def test_kernel_of_any_size_in_any_number_of_threads(sample: Sample, dtype: torch.dtype, library):
    assert not every_path(sample, dtype, (1, 2, 3, 7))


def test_the_threads_of_a_test_are_its_own():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), every_size(3):
        assert torch.get_num_threads() == 3
        assert torch.ops.bigkernels.thresholds(1, 0) == (1, 0)
        raise KeyError
    assert torch.get_num_threads() == before
    assert torch.ops.bigkernels.thresholds(*DEFAULTS) == DEFAULTS


def test_thresholds_are_checked(library):
    for grain, stream in ((0, 0), (-1, 0), (1, -1)):
        with pytest.raises(RuntimeError, match="grain must be at least 1, stream at least 0"):
            torch.ops.bigkernels.thresholds(grain, stream)


@pytest.mark.slow
def test_kernel_at_every_level(isa):
    assert "passed" in isa.pytest("tests/ops/test_recipe.py", "-k", "test_kernel and not every_level")


def test_check_at_every_level(lower_isa):
    """The quick form of the test above: every sample in every dtype, in one process a level."""
    assert "WRONG" not in lower_isa.run(CHECK)


def test_any_size_and_number_of_threads_at_every_level(lower_isa):
    assert lower_isa.run(EVERY_PATH) == ""


@pytest.mark.parametrize("sample", FEW, ids=named)
def test_gradcheck_of_the_reference(sample: Sample):
    inputs = widen(sample.inputs(torch.float32))
    names = list(sample.differentiable)
    if not names or any(inputs[n].numel() == 0 for n in names):
        pytest.skip("nothing to differentiate")
    leaves = [inputs[n].detach().clone().requires_grad_() for n in names]

    def call(*values: Tensor):
        torch.manual_seed(0)  # the same mask of dropout each time
        with bigkernels.use("reference"):
            return sample.call(inputs | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(call, leaves, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("sample", ALL, ids=named)
def test_fallbacks_of_the_raw_operators(sample: Sample, monkeypatch):
    """A machine without the library runs the raw operators' Python fallbacks: same shapes, same values."""
    module = __import__(f"bigkernels.ops.{sample.operator}", fromlist=["_"])
    inputs = sample.inputs(torch.float32)
    exact = sample.results(widen(inputs), backend="reference")
    plain = sample.results(inputs, backend="reference")
    for name in RAW:
        if hasattr(module, f"{name}_fallback"):
            monkeypatch.setattr(module, name, getattr(module, f"{name}_fallback"))
    found = sample.results(inputs, backend="cpu")
    wrong = {name: str(c) for name, c in compare_all(found, plain, exact, roundings=8).items() if not c.ok}
    assert not wrong


def raw_calls(sample: Sample, dtype: torch.dtype) -> list[tuple]:
    """The raw operators' arguments in a forward and backward call."""
    module = __import__(f"bigkernels.ops.{sample.operator}", fromlist=["_"])
    calls, overloads = [], {}

    def record(name):
        op = overloads[name] = getattr(module, name)

        def call(*args):
            calls.append((op, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
            return op(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in RAW:
            if hasattr(module, name):
                patch.setattr(module, name, record(name))
        sample.results(sample.inputs(dtype), backend="cpu")
        sample.results(sample.inputs(dtype), backend="cpu", backward=False)
    return calls


@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_the_form_without_backward_has_a_fallback_too(sample: Sample):
    op = getattr(torch.ops.bigkernels, sample.operator, None)
    if op is None:
        pytest.skip("this operator's forward returns nothing but its output")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    args = next(args for called, args in raw_calls(sample, torch.float32) if called is op.default)
    found = op.default.redispatch(keys, *args)
    out = found[0] if isinstance(found, tuple) else found
    expected = sample.results(sample.inputs(torch.float32), backend="reference", backward=False)
    torch.testing.assert_close(out, expected["out0"])


@pytest.mark.parametrize("sample", FEW, ids=named)
def test_opcheck(sample: Sample, library):
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if sample.operator == "linear_cross_entropy":
        # Forward hands memory to backward of which it has written a part; this compares all of it.
        utils.remove("test_aot_dispatch_dynamic")
    for op, args in raw_calls(sample, torch.bfloat16):
        torch.library.opcheck(op, args, test_utils=utils)
        fake = torch.library.opcheck(op, args, test_utils="test_faketensor")
        assert fake["test_faketensor"] == "SUCCESS"


@pytest.mark.parametrize(
    "sample, backend",
    [(s, b) for s in FEW for b in (None, "cpu")] + [(s, "reference") for s in PLAIN if OPERATORS[s.operator].in_graphs],
    ids=lambda value: named(value) if isinstance(value, Sample) else str(value),
)
def test_compile_full_graph(sample: Sample, backend: str | None, library):
    inputs = sample.inputs(torch.float32)
    exact = sample.results(widen(inputs), backend="reference")
    plain = sample.results(inputs, backend="reference")
    torch._dynamo.reset()
    compiled = copy.copy(sample)
    object.__setattr__(compiled, "call", torch.compile(sample.call, fullgraph=True))
    if sample.operator == "varlen_attention" and backend == "reference":
        pytest.skip("the reference reads the lengths, which makes no full graph")
    with torch._inductor.config.patch(fallback_random=True):  # random numbers as without the compiler
        check(sample, compiled.results(inputs, backend=backend), plain, exact)


@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_compile_dynamic_shapes_make_one_graph(sample: Sample, library):
    if sample.operator == "cross_entropy":
        sizes = [{"logits": torch.randn(n, 33), "target": torch.randint(33, (n,))} for n in (5, 7, 11)]
    elif sample.operator == "linear_cross_entropy":
        sizes = [
            {"hidden": torch.randn(n, 16), "weight": torch.randn(33, 16), "target": torch.randint(33, (n,))}
            for n in (5, 7, 11)
        ]
    elif sample.operator == "rope":
        sizes = [
            {
                "q": torch.randn(2, 3, n, 16),
                "k": torch.randn(2, 1, n, 16),
                "cos": torch.randn(1, n, 16),
                "sin": torch.randn(1, n, 16),
            }
            for n in (5, 7, 11)
        ]
    elif sample.operator == "attention":
        sizes = [
            {"q": torch.randn(2, 4, n, 16), "k": torch.randn(2, 2, n + 1, 16), "v": torch.randn(2, 2, n + 1, 16)}
            for n in (5, 7, 11)
        ]
    elif sample.operator == "varlen_attention":
        sizes = []
        for n in (5, 7, 11):
            starts = torch.tensor([0, 3, n], dtype=torch.int32)
            sizes += [
                {
                    "q": torch.randn(n, 4, 16),
                    "k": torch.randn(n, 2, 16),
                    "v": torch.randn(n, 2, 16),
                    "cu_seqlens_q": starts,
                    "cu_seqlens_k": starts,
                }
            ]
    elif sample.operator == "decode_attention":
        lengths = torch.tensor([4, 5], dtype=torch.int32)
        sizes = [
            {
                "q": torch.randn(2, 4, 2, 16),
                "k_cache": torch.randn(2, n, 2, 16),
                "v_cache": torch.randn(2, n, 2, 16),
                "cache_seqlens": lengths,
            }
            for n in (5, 7, 11)
        ]
    elif sample.operator in ("linear", "quantized_linear", "mlp"):
        inputs = sample.inputs(torch.float32)
        sizes = [inputs | {"x": torch.randn(n, inputs["x"].shape[-1])} for n in (5, 7, 11)]
    else:
        inputs = sample.inputs(torch.float32)
        rows = {"x", "gate", "up"}
        sizes = [{k: torch.randn(n, 33) if k in rows else torch.randn(33) for k in inputs} for n in (5, 7, 11)]
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with bigkernels.use("cpu"):
        compiled = torch.compile(sample.call, fullgraph=True, dynamic=True, backend=backend)
        for inputs in sizes:
            torch.testing.assert_close(compiled(inputs), sample.call(inputs))
    assert len(graphs) == 1


@pytest.mark.parametrize("sample", FEW, ids=named)
def test_bitwise_reproducible(sample: Sample, library):
    inputs = sample.inputs(torch.bfloat16)
    with every_size(3):
        first, second = (sample.results(inputs, backend="cpu") for _ in range(2))
    for name in first:
        assert torch.equal(first[name].nan_to_num(7.0), second[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_without_kernels_the_reference_serves(sample: Sample):
    operator = OPERATORS[sample.operator]
    assert operator.choose(torch.empty(1, dtype=torch.float64)) == "reference"
    assert operator.choose(torch.empty(1, device="meta")) == "reference"
    inputs = widen(sample.inputs(torch.float32))
    assert all(t.dtype == torch.float64 for t in sample.results(inputs).values())


@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_a_backend_that_cannot_serve_raises(sample: Sample):
    inputs = widen(sample.inputs(torch.float32))
    with bigkernels.use("cpu"), pytest.raises(RuntimeError, match="forced but no kernel for float64"):
        sample.call(inputs)
    with bigkernels.use("triton"), pytest.raises(RuntimeError, match="forced but runs on cuda tensors, not cpu"):
        sample.call(sample.inputs(torch.float32))
    has_cuda = any(i.name == "cuda" for i in OPERATORS[sample.operator].implementations)
    message = "forced but runs on cuda tensors, not cpu" if has_cuda else "no 'cuda' implementation"
    with bigkernels.use("cuda"), pytest.raises(RuntimeError, match=message):
        sample.call(sample.inputs(torch.float32))


def test_use_rejects_unknown_backends_and_restores():
    with pytest.raises(ValueError, match="backend is 'gpu'; accepted are cpu, triton, gluon, cuda, torch, reference"):
        with bigkernels.use("gpu"):
            pass
    operator = OPERATORS["glu"]
    before = operator.choose(torch.empty(1))
    with pytest.raises(KeyError), bigkernels.use("reference"):
        assert operator.choose(torch.empty(1)) == "reference"
        raise KeyError
    assert operator.choose(torch.empty(1)) == before


@pytest.mark.parametrize("sample", TRAINED, ids=named)
def test_torch_func_sees_through(sample: Sample):
    inputs = sample.inputs(torch.float32)
    name = sample.differentiable[0]

    def loss(value):
        outputs = sample.call(inputs | {name: value})
        return (outputs[0] if isinstance(outputs, tuple) else outputs).square().sum()

    leaf = inputs[name].detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(inputs[name]), expected, rtol=1e-4, atol=1e-5)
    tangent = torch.randn_like(inputs[name])
    _, directional = torch.func.jvp(loss, (inputs[name],), (tangent,))
    assert torch.allclose(directional, (expected * tangent).sum(), rtol=1e-3, atol=1e-3)
    batched = torch.func.vmap(loss)(inputs[name].expand(2, *inputs[name].shape))
    assert torch.allclose(batched, loss(inputs[name]).expand(2), rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("sample", TRAINED, ids=named)
def test_activation_checkpointing(sample: Sample, reentrant: bool, library):
    inputs = sample.inputs(torch.float32)
    names = sample.differentiable
    leaves = [inputs[n].detach().requires_grad_() for n in names]

    def call(*values):
        outputs = sample.call(inputs | dict(zip(names, values, strict=True)))
        return outputs[0] if isinstance(outputs, tuple) else outputs

    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    for leaf in leaves:
        leaf.grad = None
    torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=reentrant).square().sum().backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("sample", TRAINED, ids=named)
def test_backward_twice_through_a_retained_graph(sample: Sample, library):
    inputs = sample.inputs(torch.float32)
    leaves = {k: t.detach().requires_grad_(k in sample.differentiable) for k, t in inputs.items()}
    outputs = sample.call(leaves)
    total = (outputs[0] if isinstance(outputs, tuple) else outputs).square().sum()
    wanted = [leaves[n] for n in sample.differentiable]
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    second = torch.autograd.grad(total, wanted)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_autocast_keeps_the_types_of_the_inputs(sample: Sample, library):
    """The operators compute in float32 whatever they are given, so autocast has nothing to cast."""
    lowered = ("attention", "varlen_attention", "linear", "linear_cross_entropy", "quantized_linear", "mlp")
    if sample.operator in lowered:
        pytest.skip("products are lowered, as in scaled_dot_product_attention and linear")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = sample.inputs(dtype)
        plain = sample.results(inputs, backend="cpu")
        with torch.autocast("cpu", torch.bfloat16):
            found = sample.results(inputs, backend="cpu")
        for name, value in found.items():
            assert value.dtype == plain[name].dtype and torch.equal(value, plain[name]), name


def test_autocast_promotes_mixed_inputs():
    wide, narrow = torch.randn(4, 8), torch.randn(4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert bigkernels.functional.glu(narrow, wide).dtype == torch.float32
        q, k = bigkernels.functional.rope(
            *(t[None, None] for t in (narrow, wide)), torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
        )
    assert q.dtype == k.dtype == torch.float32
    assert torch.equal(q[0, 0], narrow.float()) and torch.equal(k[0, 0], wide)


def test_log_names_the_choice_and_the_refusals(isa):
    out = isa.run(
        "import os; os.environ['BIGKERNELS_LOG'] = '1'\n"
        "import sys; sys.stderr = sys.stdout\n"
        "import torch, bigkernels.functional as F\n"
        "F.glu(torch.ones(2), torch.ones(2)); F.glu(torch.ones(2).double(), torch.ones(2).double())\n"
        "F.glu(torch.ones(2), torch.ones(2))"
    )
    assert out.count("->") == 2  # the first choice of each kind, once
    assert "glu torch.float32 on cpu -> cpu" in out
    assert "glu torch.float64 on cpu -> reference (cpu: no kernel for float64" in out
