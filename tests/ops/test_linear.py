"""Linear layers: the kernels against the reference in float64, by sizes drawn at random; packed weights."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from products import check_product
from torch import Tensor, nn
from torch.nn import functional as F

import bigkernels
from bigkernels import functional
from bigkernels import nn as bnn
from bigkernels.nn import linear as module_of
from bigkernels.ops.linear import pack_weight
from bigkernels.quantization import quantize_weight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

fwd, bwd = torch.ops.bigkernels.linear_fwd, torch.ops.bigkernels.linear_bwd

pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.parametrize("n", [16, 48, 80])
@pytest.mark.parametrize("quantized", [False, True])
def test_large_results_of_half_a_block_of_columns(n: int, quantized: bool):
    """Results that are stored past the caches: rows of whole cache lines that are no whole blocks of 32 columns."""
    m = 2**18 // n + 33
    x, weight, bias = torch.randn(m, 20), torch.randn(n, 20), torch.randn(n)
    if quantized:
        weight = quantize_weight(weight, "int8-dynamic")
        found = functional.quantized_linear(x, weight, bias)
        with bigkernels.use("reference"):
            expected = functional.quantized_linear(x, weight, bias)
    else:
        found = functional.linear(x, weight, bias)
        expected = F.linear(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


cases = st.fixed_dictionaries(
    {
        "m": st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 70, 600]),
        "n": st.sampled_from([1, 3, 7, 31, 64, 129, 200]),
        "k": st.sampled_from([1, 2, 15, 31, 33, 64, 95, 128, 200, 515, 1100]),
        "dtype": st.sampled_from(list(DTYPES)),
        "wide": st.booleans(),  # whether the weight is float32
        "turned": st.booleans(),  # whether it lies in memory as (K, N)
        "bias": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def drawn(case: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(case["seed"])
    dtype, n, k = DTYPES[case["dtype"]], case["n"], case["k"]
    x, weight = torch.randn(case["m"], k).to(dtype), torch.randn(n, k) / k**0.5
    weight = weight if case["wide"] else weight.to(dtype)
    weight = weight.T.contiguous().T if case["turned"] else weight
    return x, weight, torch.randn(n).to(dtype) if case["bias"] else None


@given(cases)
@MANY
def test_forward(case):
    x, weight, bias = drawn(case)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = F.linear(x, weight.to(x.dtype), bias)
    found = fwd(x, weight, bias, None)
    check_product(found, plain, exact, x.double().abs() @ weight.double().abs().T)
    packed = pack_weight(weight, x.dtype)
    assert torch.equal(fwd(x, weight, bias, packed), found)


@given(cases)
@MANY
def test_gradients(case):
    x, weight, _ = drawn(case)
    grad = torch.randn(case["m"], case["n"]).to(x.dtype)
    dx, dw = bwd(grad, x, weight, True)
    wide = grad.double(), weight.double(), x.double()
    check_product(dx, grad @ weight.to(grad.dtype), wide[0] @ wide[1], wide[0].abs() @ wide[1].abs())
    assert dw.dtype == weight.dtype
    check_product(dw, (grad.T @ x).to(weight.dtype), wide[0].T @ wide[2], wide[0].abs().T @ wide[2].abs())
    assert torch.equal(bwd(grad, None, weight, True)[0], dx) and bwd(grad, None, weight, True)[1].numel() == 0
    assert torch.equal(bwd(grad, x, weight, False)[1], dw)


@pytest.mark.parametrize("m", [1, 40])
def test_strides_and_leading_dimensions(m: int):
    whole, weight = torch.randn(m, 3, 200), torch.randn(24, 300)[:, 7:103]
    for x in (whole[..., 5:101], whole.transpose(0, 1)[..., :96], whole[..., ::2][..., :96], whole[:, 0, :96]):
        leaf = x.detach().requires_grad_()
        found = functional.linear(leaf, weight)
        assert found.shape == (*x.shape[:-1], 24) and found.is_contiguous()
        assert torch.equal(found, functional.linear(x.contiguous(), weight.contiguous()))
        torch.testing.assert_close(found, (x.double() @ weight.double().T).float(), rtol=1e-4, atol=1e-4)
        (grad,) = torch.autograd.grad(found.sum(), leaf)
        torch.testing.assert_close(grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape, n", [((0, 64), 8), ((3, 0), 8), ((3, 64), 0), ((2, 0, 5), 3)])
def test_no_elements(shape: tuple[int, ...], n: int):
    x, weight = torch.randn(*shape, requires_grad=True), torch.randn(n, shape[-1], requires_grad=True)
    bias = torch.randn(n, requires_grad=True)
    found, expected = functional.linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), (x, weight, bias)),
        torch.autograd.grad(expected.sum(), (x, weight, bias)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("m", [1, 8, 64])
def test_tokens_do_not_know_of_each_other(m: int):
    weight, x = torch.randn(70, 200).bfloat16(), torch.randn(1, 200).repeat(m, 1).bfloat16()
    found = functional.linear(x, weight)
    assert torch.equal(found, found[:1].expand(m, -1))
    if m > 1:
        x[m // 2, 3] = float("nan")
        again = functional.linear(x, weight)
        others = torch.arange(m) != m // 2
        assert again[m // 2].isnan().all() and torch.equal(again[others], found[others])


def test_autocast_reads_the_wide_weight():
    x, weight, bias = torch.randn(40, 64), torch.randn(32, 64, requires_grad=True), torch.randn(32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = functional.linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(found, theirs, rtol=2e-2, atol=2e-2)
    dw, db = torch.autograd.grad(found.float().sum(), (weight, bias))
    assert dw.dtype == db.dtype == torch.float32
    torch.testing.assert_close(dw, x.bfloat16().float().sum(0).expand(32, -1), rtol=1e-5, atol=1e-4)


def test_frozen_parts_are_not_kept():
    weight = torch.randn(32, 64)
    x = torch.randn(9, 64, requires_grad=True)
    saved = functional.linear(x, weight).grad_fn.saved_tensors
    assert saved[0] is None and saved[1] is weight
    trained = weight.clone().requires_grad_()
    (dw,) = torch.autograd.grad(functional.linear(x.detach(), trained).sum(), trained)
    torch.testing.assert_close(dw, x.detach().sum(0).expand(32, -1))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.randn(2, 3), torch.randn(4, 5)), ValueError, r"x has shape \(2, 3\), expected \(\.\.\., 5\)"),
        ((torch.randn(2, 3), torch.randn(3)), ValueError, "weight has shape"),
        ((torch.randn(2, 3), torch.randn(4, 3), torch.randn(3)), ValueError, r"bias has shape \(3,\), expected \(4,\)"),
        ((torch.randn(2, 3), torch.randn(4, 3).bfloat16()), TypeError, "weight is bfloat16 and x is float32"),
        ((torch.arange(3), torch.randn(4, 3)), TypeError, "x is int64"),
        ((torch.randn(2, 3), torch.randn(4, 3, device="meta")), ValueError, "weight is on meta"),
    ],
)
def test_errors(arguments: tuple, error: type, message: str):
    with pytest.raises(error, match=message):
        functional.linear(*arguments)


def test_packed_of_another_weight():
    with pytest.raises(RuntimeError, match="packed is of another weight"):
        fwd(torch.randn(40, 64), torch.randn(40, 64), None, pack_weight(torch.randn(40, 32), torch.float32))


# ---- the module and its packed weight -------------------------------------------------------------------------------


@pytest.fixture
def layer():
    module_of._packed.clear()
    made = bnn.Linear(64, 40)
    assert bigkernels.pack(made) == [""]
    yield made
    module_of._packed.clear()


def run(layer: nn.Module, tokens: int = 40) -> Tensor:
    with torch.no_grad():
        return layer(torch.linspace(-1, 1, tokens * 64).view(tokens, 64))


def held(layer: nn.Module) -> Tensor | None:
    copies = module_of._packed.get(layer.weight, {})
    return copies[layer.weight.dtype][1] if layer.weight.dtype in copies else None


def expected(layer: nn.Module, tokens: int = 40) -> Tensor:
    return F.linear(torch.linspace(-1, 1, tokens * 64).view(tokens, 64), layer.weight, layer.bias).detach()


def test_packed_once_where_it_is_of_use(layer):
    run(layer, 3)
    assert held(layer) is None
    run(layer)
    first = held(layer)
    assert first is not None
    torch.testing.assert_close(run(layer), expected(layer))
    assert held(layer) is first


def at_the_old_address(w):
    """Where an allocator may place new data once the old are freed."""
    memory = w.detach().numpy()
    memory *= 2
    w.data = torch.from_numpy(memory)


def step(optimizer, **options):
    """By a gradient that no backward made; fused optimizers count no write."""

    def write(w):
        w.grad = torch.ones_like(w)
        optimizer([w], lr=0.5, **options).step()

    return write


COUNTED = {
    "a fused step": step(torch.optim.AdamW, fused=True),
    "a step of ours": step(bigkernels.optim.SGD),
    "in place": lambda w: w.add_(1.0),
    "data replaced": lambda w: setattr(w, "data", torch.randn(40, 64)),
    "data at the old address": at_the_old_address,
    "a row": lambda w: w[3].zero_(),
    "loaded": lambda w: w.copy_(torch.ones(40, 64)),
}
UNCOUNTED = {
    "a row through data": lambda w: w.data[39].fill_(3.0),
    "all through data": lambda w: w.data.mul_(2.0),
    "a column through data": lambda w: w.data[:, 7].zero_(),
    "average": lambda w: w.data.lerp_(torch.ones(40, 64), 0.1),
    "numpy": lambda w: w.detach().numpy().__setitem__((5, 3), 9.0),
}


@pytest.mark.parametrize("write", COUNTED.values(), ids=COUNTED)
def test_a_written_weight_is_packed_again(layer, write):
    run(layer)
    with torch.no_grad():
        write(layer.weight)
    torch.testing.assert_close(run(layer), expected(layer))


@pytest.mark.parametrize("write", UNCOUNTED.values(), ids=UNCOUNTED)
def test_refresh_after_writes_that_are_not_counted(layer, write):
    run(layer)
    write(layer.weight)
    bigkernels.refresh(layer)
    assert held(layer) is None
    torch.testing.assert_close(run(layer), expected(layer))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", (COUNTED | UNCOUNTED).values(), ids=COUNTED | UNCOUNTED)
def test_no_copy_is_kept_of_what_may_be_written(write, mode, patched: bool):
    x = torch.randn(40, 64)
    model = nn.Sequential(nn.Linear(64, 40) if patched else bnn.Linear(64, 40))
    if patched:
        bigkernels.patch(model, linear=True)
    with mode():
        model(x)
    with torch.no_grad():
        write(model[0].weight)
    with mode():
        torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias))


def test_a_step_of_others_counts_no_write(layer):
    """One optimizer for two layers whose losses take turns: the graph of one is older than the step of the other."""
    run(layer)
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1, fused=True)
    waiting = other(other(torch.randn(2, 4))).sum()
    one(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    waiting.backward()
    assert other.weight.grad is not None


def test_training_drops_it(layer):
    run(layer)
    layer(torch.randn(40, 64)).sum().backward()
    assert held(layer) is None


def test_casts_and_dtypes(layer):
    run(layer)
    layer.bfloat16()
    with torch.no_grad():
        x = torch.randn(40, 64).bfloat16()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x.double()), F.linear(x.double(), layer.weight, layer.bias))


def test_it_is_neither_saved_nor_copied_and_dies_with_the_weight(layer):
    plain = sum(t.numel() for t in layer.state_dict().values())
    run(layer)
    assert sum(t.numel() for t in layer.state_dict().values()) == plain
    copied = copy.deepcopy(layer)
    bigkernels.pack(copied)
    assert held(copied) is None and len(pickled(layer)) == len(pickled(copied))
    torch.testing.assert_close(run(copied), expected(copied))
    assert len(module_of._packed) == 2
    del copied
    gc.collect()
    assert len(module_of._packed) == 1


def pickled(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer.getvalue()


def test_inference_tensors(layer):
    with torch.inference_mode():
        module = bnn.Linear(64, 40)
        assert bigkernels.pack(module) == []  # writes to it are not counted
        x = torch.randn(40, 64)
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))
        module.weight[3] = 2.0
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))


def test_module_is_torchs(layer):
    other = nn.Linear(64, 40)
    other.load_state_dict(layer.state_dict())
    assert isinstance(layer, nn.Linear) and str(layer) == str(other)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.ones(20, 64)), other(torch.ones(20, 64)))


# ---- patching -------------------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_patched_layers_and_look_alikes():
    model = nn.Sequential(nn.Linear(64, 40), Scaled(40, 30), nn.Linear(30, 20, bias=False))
    x = torch.randn(33, 64, requires_grad=True)
    before = model(x)
    grads = torch.autograd.grad(before.square().sum(), [x, *model.parameters()])
    report = bigkernels.patch(model, linear=True, strict=True)
    assert [(row.path, row.what) for row in report.patched] == [("0", "linear"), ("2", "linear")]
    after = model(x)
    torch.testing.assert_close(after, before)
    for ours, theirs in zip(torch.autograd.grad(after.square().sum(), [x, *model.parameters()]), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
        assert bigkernels.pack(model) == ["0", "2"]
        torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(model(x), before)  # packed
    assert model(torch.randn(2, 33, 64)).shape == (2, 33, 20)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 63))
    bigkernels.unpatch(model)
    assert torch.equal(model(x), before)
