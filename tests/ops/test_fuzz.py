"""Random shapes, strides and options against the float64 references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigkernels
import bigkernels.functional as B
from bigkernels._compare import compare
from bigkernels.ops.activations import ACTIVATIONS
from bigkernels.ops.registry import KERNEL_DTYPES

pytestmark = pytest.mark.usefixtures("library")
FEW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

EPS = torch.finfo(torch.float32).eps

dtypes = st.sampled_from(KERNEL_DTYPES)
sizes = st.integers(0, 70) | st.sampled_from([1, 15, 16, 17, 31, 33, 64, 127, 576, 1025])
leading = st.lists(st.integers(1, 5), max_size=3)
seeds = st.integers(0, 1 << 16)


def view(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Normal values of a shape, in one of the layouts that models make."""
    wide = torch.randn(*shape, dtype=torch.float32).to(dtype)
    if layout == "transposed" and len(shape) > 1:
        return wide.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return torch.cat((wide, torch.full_like(wide[..., :2], float("nan"))), -1)[..., : shape[-1]]
    if layout == "expanded" and len(shape) > 1:
        return wide[:1].expand(shape)
    return wide


layouts = st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])


def agree(call, tensors: dict[str, Tensor], grads: tuple[str, ...], scale: float = 0.0) -> None:
    """Outputs and gradients of the kernels against the references, by the package's criterion.

    `scale`: of the terms that cancel in a result; their rounding in float32 is allowed whatever the result is.
    """

    def run(values, backend):
        leaves = {n: v.detach().requires_grad_(n in grads) for n, v in values.items()}
        with bigkernels.use(backend):
            outputs = call(**leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.manual_seed(1)
            upstream = [torch.randint(-8, 9, o.shape).to(o.dtype) / 8 for o in outputs]
            found = torch.autograd.grad(outputs, [leaves[n] for n in grads], upstream)
        return [*(o.detach() for o in outputs), *found]

    exact = run({n: v.double() if v.is_floating_point() else v for n, v in tensors.items()}, "reference")
    for ours, plain, wide in zip(run(tensors, "cpu"), run(tensors, "reference"), exact, strict=True):
        # Of a few values PyTorch may by chance get all nearly exact: eight roundings are what such sums may lose.
        result = compare(ours, plain, wide, roundings=8, scale="row")
        assert result.problem is None and result.error <= result.bound + 4 * EPS * scale, result


@FEW
@given(leading, sizes, dtypes, layouts, layouts, st.booleans(), st.booleans(), st.sampled_from([0.0, 1.0]), seeds)
def test_rms_norm(lead, d, dtype, layout, other, weighted, fused, offset, seed):
    torch.manual_seed(seed)
    shape = (*lead, max(d, 1))
    tensors = {"x": view(shape, dtype, layout)}
    if weighted:
        tensors["weight"] = torch.randn(shape[-1]).to(dtype)
    if fused:
        tensors["residual"] = view(shape, dtype, other)
    agree(lambda **t: B.rms_norm(**t, offset=offset), tensors, tuple(tensors))


@FEW
@given(leading, sizes, dtypes, layouts, layouts, st.booleans(), st.booleans(), st.booleans(), st.floats(-3, 3), seeds)
def test_layer_norm(lead, d, dtype, layout, other, weighted, biased, fused, mean, seed):
    torch.manual_seed(seed)
    shape = (*lead, max(d, 8))  # of two values, the gradient is nothing but rounding
    tensors = {"x": view(shape, dtype, layout) + mean}
    if weighted:
        tensors["weight"] = torch.randn(shape[-1]).to(dtype)
    if biased:
        tensors["bias"] = torch.randn(shape[-1]).to(dtype)
    if fused:
        tensors["residual"] = view(shape, dtype, other)
    agree(lambda **t: B.layer_norm(**t), tensors, tuple(tensors))


@FEW
@given(leading, sizes, dtypes, layouts, layouts, st.sampled_from(list(ACTIVATIONS)), seeds)
def test_glu(lead, n, dtype, layout, other, activation, seed):
    torch.manual_seed(seed)
    shape = (*lead, n)
    tensors = {"gate": view(shape, dtype, layout), "up": view(shape, dtype, other)}
    agree(lambda **t: B.glu(**t, activation=activation), tensors, ("gate", "up"))


@FEW
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 40),
    dtypes,
    layouts,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_rope(batch, q_heads, k_heads, length, half, rest, dtype, layout, heads_last, interleaved, per_batch, seed):
    torch.manual_seed(seed)
    d, rotary = 2 * half + rest, 2 * half

    def heads(count):
        if heads_last:
            return view((batch, length, count, d), dtype, layout).transpose(1, 2)
        return view((batch, count, length, d), dtype, layout)

    angle = torch.rand(batch if per_batch else 1, length, rotary) * 6
    tensors = {"q": heads(q_heads), "k": heads(k_heads), "cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
    agree(lambda **t: B.rope(**t, interleaved=interleaved), tensors, ("q", "k"))


@FEW
@given(
    st.integers(1, 9),
    st.integers(2, 300) | st.sampled_from([2047, 2048, 2049, 4100]),
    dtypes,
    layouts,
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.0, 0.01]),
    st.sampled_from([None, 4.0]),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_cross_entropy(
    tokens, vocabulary, dtype, layout, reduction, smoothing, z_loss, softcap, gamma, classes, weights, seed
):
    torch.manual_seed(seed)
    tensors = {"logits": 3 * view((tokens, vocabulary), dtype, layout), "target": torch.randint(vocabulary, (tokens,))}
    tensors["target"][1::3] = -100
    if classes:
        tensors["class_weight"] = torch.rand(vocabulary).to(dtype) + 0.5
    if weights:
        tensors["token_weight"] = torch.rand(tokens).to(dtype) + 0.5
    options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
    agree(lambda **t: B.cross_entropy(**t, **options, focal_gamma=gamma), tensors, ("logits",), scale=1.0)
