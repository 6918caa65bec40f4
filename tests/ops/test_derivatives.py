"""Derivatives of gradients: of every operator with a backward kernel, against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import bigkernels
from bigkernels import functional
from bigkernels._compare import compare_all
from bigkernels._samples import SAMPLES, Sample, widen
from bigkernels.ops import _derivatives

# What the reference does in another way, beside one plain call of each operator.
CHOSEN = ("residual", "offset and residual", "float32 weight", "bias alone", "interleaved, partial",
          "gelu_tanh, extreme", "class weight", "token weight, none", "softcap", "focal", "everything", "bias",
          "mask and causal", "sinks", "nothing seen", "dropout and bias", "lse", "empty sequences", "one dimension",
          "no tokens", "no queries", "int8-dynamic, one token", "int4, one token", "scale", "strided rows",
          "label smoothing")  # fmt: skip
TRAINED = {op: [s for s in samples if s.differentiable] for op, samples in SAMPLES.items()}
PLAIN = [samples[0] for samples in TRAINED.values() if samples]
ALL = PLAIN + [s for samples in TRAINED.values() for s in samples[1:] if s.name in CHOSEN]


def named(sample: Sample) -> str:
    return f"{sample.operator}: {sample.name}"


def small(sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = sample.inputs(dtype)
    if sample.name.endswith("extreme"):
        # Not at zero, where relu has no slope, nor where the third derivative of GELU is lost in float32.
        inputs = {k: torch.where(t == 0, 0.5, t).clamp(-8, 8) for k, t in inputs.items()}
    return inputs


def derivatives(
    sample: Sample, inputs: dict[str, Tensor], orders: int, backend: str | None = None, wanted: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Gradients of each order, by the inputs and by the gradients from above: each of a random sum of those before."""
    wanted = wanted or sample.differentiable
    torch.manual_seed(0)  # every backend draws the same mask of dropout
    leaves = {k: t.detach().clone().requires_grad_() if k in wanted else t for k, t in inputs.items()}
    with bigkernels.use(backend) if backend else torch.enable_grad():
        outputs = sample.call(leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)

        def draw(t):
            return torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype)

        upstream = [draw(o).requires_grad_() for o in outputs]
        by = [leaves[k] for k in wanted]
        # An output of -inf (the lse of a row that sees nothing) is a constant.
        found = {}
        total = sum((o.masked_fill(o.isinf(), 0) * u).sum() for o, u in zip(outputs, upstream, strict=True))
        for order in range(1, orders + 1):
            grads = torch.autograd.grad(total, by, create_graph=True, allow_unused=True, materialize_grads=True)
            if order == 1:
                by = by + upstream
            found |= {f"{order}: {i}": g.detach() for i, g in enumerate(grads)}
            total = sum((g * draw(g)).sum() for g in grads)
            if not total.requires_grad:
                break
    return found


@pytest.mark.parametrize("sample", ALL, ids=named)
def test_three_orders(sample: Sample, library):
    inputs = small(sample, torch.float32)
    exact = derivatives(sample, widen(inputs), 3, "reference")
    plain = derivatives(sample, inputs, 3, "reference")
    found = derivatives(sample, inputs, 3)
    assert found.keys() == exact.keys()
    wrong = {k: str(c) for k, c in compare_all(found, plain, exact, roundings=16).items() if not c.ok}
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_in_16_bits(sample: Sample, dtype: torch.dtype, library):
    inputs = sample.inputs(dtype)
    exact, plain = (derivatives(sample, i, 2, "reference") for i in (widen(inputs), inputs))
    found = derivatives(sample, inputs, 2)
    assert all(found[k].dtype == plain[k].dtype for k in plain)
    wrong = {k: str(c) for k, c in compare_all(found, plain, exact, roundings=4).items() if not c.ok}
    assert not wrong


@pytest.mark.parametrize("sample", [s for s in PLAIN if len(s.differentiable) > 1], ids=named)
def test_where_some_inputs_need_gradients(sample: Sample, library):
    inputs = sample.inputs(torch.float32)
    for name in sample.differentiable:
        exact = derivatives(sample, widen(inputs), 2, "reference", (name,))
        plain = derivatives(sample, inputs, 2, "reference", (name,))
        found = derivatives(sample, inputs, 2, None, (name,))
        wrong = {k: str(c) for k, c in compare_all(found, plain, exact, roundings=16).items() if not c.ok}
        assert not wrong, name


@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_by_gradgradcheck_of_the_observed_backward(sample: Sample):
    """In float64 there is no kernel: here the operator takes its autograd function all the same, over fallbacks."""
    if sample.operator == "quantized_linear":
        pytest.skip("plain PyTorch has no other backward than that of the operator")
    operator = bigkernels.ops.OPERATORS[sample.operator]
    inputs = widen(sample.inputs(torch.float32))
    names = sample.differentiable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(operator), "uses_kernel", lambda self, *t: self is operator)
        module = __import__(f"bigkernels.ops.{sample.operator}", fromlist=["_"])
        for name in ("_fwd", "_bwd", "_infer"):
            if hasattr(module, f"{name}_fallback"):
                patch.setattr(module, name, getattr(module, f"{name}_fallback"))

        def call(*values):
            return sample.call(inputs | dict(zip(names, values, strict=True)))

        leaves = [inputs[n].detach().clone().requires_grad_() for n in names]
        assert torch.autograd.gradgradcheck(call, leaves, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_one_tensor_given_twice_or_computed_from_another(library):
    x = torch.randn(5, 16, requires_grad=True)

    def shared(h):
        q = h[None, None]
        return functional.glu(h, h).sum() + functional.attention(q, q.sin(), q * 2).square().sum()

    def plain(h):
        weights = torch.softmax(h @ h.sin().T / 4, -1)
        return (F.silu(h) * h).sum() + (weights @ (2 * h)).square().sum()

    v = torch.randn(5, 16)
    _, found = torch.autograd.functional.hvp(shared, x, v)
    _, exact = torch.autograd.functional.hvp(plain, x.double(), v.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_an_ordinary_backward_runs_the_kernels(monkeypatch, library):
    monkeypatch.setattr(_derivatives, "_pull", None)
    for sample in PLAIN:
        sample.results(sample.inputs(torch.float32))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_batches_of_upstream_gradients(sample: Sample, create_graph: bool, library):
    inputs = sample.inputs(torch.float32)
    leaves = {k: t.detach().clone().requires_grad_(k in sample.differentiable) for k, t in inputs.items()}
    out = sample.call(leaves)
    out = out[0] if isinstance(out, tuple) else out
    wanted = [leaves[n] for n in sample.differentiable]
    upstream = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(
        out, wanted, upstream, is_grads_batched=True, retain_graph=True, create_graph=create_graph
    )
    for i, one in enumerate(upstream):
        single = torch.autograd.grad(out, wanted, one, retain_graph=True)
        for a, b in zip(batched, single, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-4 * max(b.abs().max().item(), 1e-3))


@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_forward_mode_over_a_backward(sample: Sample, library):
    """The tangent of a gradient whose upstream gradient has one: gradients are linear in it."""
    if sample.operator == "glu":
        sample = sample.with_options(activation="gelu")  # PyTorch's derivative of SiLU has no forward mode
    inputs = sample.inputs(torch.float32)
    leaves = {k: t.detach().clone().requires_grad_(k in sample.differentiable) for k, t in inputs.items()}
    out = sample.call(leaves)
    out = out[0] if isinstance(out, tuple) else out
    leaf = leaves[sample.differentiable[0]]
    (expected,) = torch.autograd.grad(out, leaf, torch.ones_like(out), retain_graph=True)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.zeros_like(out), torch.ones_like(out))
        (grad,) = torch.autograd.grad(out, leaf, upstream)
        tangent = forward_ad.unpack_dual(grad).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4 * max(expected.abs().max().item(), 1e-3))


HEADS = {
    "cross entropy, kernel": lambda h, w, t: functional.linear_cross_entropy(h, w, t),
    "cross entropy, chunks": lambda h, w, t: functional.linear_cross_entropy(h, w, t, softcap=3.0, label_smoothing=0.1),
    "cross entropy a token": lambda h, w, t: (
        functional.linear_cross_entropy(h, w, t, softcap=3.0, label_smoothing=0.1, reduction="none").square().sum()
    ),
    "log probabilities": lambda h, w, t: functional.linear_logprobs(h, w, t, temperature=0.7, return_entropy=True)[
        0
    ].sum(),
    "distillation": lambda h, w, t: functional.linear_distillation(
        h, w, t, teacher_logits=h.detach() @ w.detach().T + 1, temperature=2.0, alpha=0.5, divergence="jsd"
    ),
    "distillation a token": lambda h, w, t: (
        functional.linear_distillation(
            h, w, teacher_hidden=h.detach().cos(), teacher_weight=w.detach(), reduction="none"
        )
        .square()
        .sum()
    ),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", HEADS)
def test_losses_over_a_vocabulary(name: str, backend: str | None, library):
    h, w, t = torch.randn(7, 16), torch.randn(33, 16) / 4, torch.randint(33, (7,))
    t[2] = -100
    vector = torch.randn(7, 16), torch.randn(33, 16)

    def products(dtype, backend):
        with bigkernels.use(backend) if backend else torch.enable_grad():
            return torch.autograd.functional.hvp(
                lambda h, w: HEADS[name](h, w, t), (h.to(dtype), w.to(dtype)), tuple(v.to(dtype) for v in vector)
            )[1]

    exact = torch.func.jvp(  # transforms see plain PyTorch
        torch.func.grad(lambda h, w: HEADS[name](h, w, t), (0, 1)),
        (h.double(), w.double()),
        tuple(v.double() for v in vector),
    )[1]
    for found, expected in zip(products(torch.float32, backend), exact, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "label_smoothing": 0.1}], ids=str)
def test_constants_written_before_the_second_derivative(options, library):
    """Labels are those of forward; other constants must be the same."""
    h, w, t = torch.randn(7, 16), torch.randn(33, 16), torch.randint(33, (7,))

    def product(change):
        x, target, of_class = h.clone().requires_grad_(), t.clone(), torch.rand(33)
        loss = functional.linear_cross_entropy(x, w, target, class_weight=of_class.fill_(0.5), **options)
        change(target, of_class)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    expected = product(lambda target, of_class: None)
    assert torch.equal(product(lambda target, of_class: target.fill_(0)), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product(lambda target, of_class: of_class.fill_(1.0))


def test_the_forced_reference_makes_all_logits(library, monkeypatch):
    from bigkernels.ops import _chunks

    monkeypatch.setattr(_chunks.Call, "chunks", None)
    h, w, t = torch.randn(7, 16, requires_grad=True), torch.randn(33, 16), torch.randint(33, (7,))
    with bigkernels.use("reference"):
        for loss in HEADS.values():
            loss(h, w, t)


@pytest.mark.parametrize("mode", ["torch", "region"])
@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_inside_of_a_checkpointed_region(sample: Sample, mode: str, library):
    inputs = sample.inputs(torch.float32)
    expected = derivatives(sample, inputs, 2)

    def call(*values):
        return sample.call(dict(zip(inputs, values, strict=True)))

    class Region:
        differentiable = sample.differentiable

        def call(self, inputs):
            if mode == "torch":
                return torch.utils.checkpoint.checkpoint(call, *inputs.values(), use_reentrant=False)
            return bigkernels.checkpoint(call, *inputs.values())

    found = derivatives(Region(), inputs, 2)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_under_autocast(library):
    """What backward computes depends on what forward has done, and not on autocast around backward."""
    x, w = torch.randn(5, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    results = []
    for around in (False, True):
        y = functional.linear(x, w).sum() + functional.cross_entropy(x, torch.arange(5))
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            first = torch.autograd.grad(y, (x, w), create_graph=True)
        total = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(total, (x, w))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_compiler_refuses_a_second_derivative(library):
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(3))
    compiled = torch.compile(lambda q: functional.attention(q, k, v).sum(), backend="aot_eager", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(q), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.sum().backward()
