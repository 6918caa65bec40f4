"""GroupNorm and BatchNorm beyond the recipe: running statistics, layouts, writes in place, what is kept, extremes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bigkernels.functional as B
from bigkernels.nn import BatchNorm, GroupNorm

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def image(*shape: int, dtype: torch.dtype = torch.float32, layout=torch.contiguous_format, seed: int = 0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.5
    return x.to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None, 1.0, 0.0])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_a_module_does_what_torchs_does_step_by_step(library, layout, momentum, options):
    ours, theirs = BatchNorm(6, momentum=momentum, **options), nn.BatchNorm2d(6, momentum=momentum, **options)
    if options.get("affine", True):
        nn.init.normal_(theirs.weight, 1.0)
        nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    for step in range(3):
        x = image(4, 6, 5, 3, layout=layout, seed=step)
        torch.testing.assert_close(ours(x), theirs(x))
        assert ours(x).is_contiguous(memory_format=layout)
        theirs(x)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert torch.equal(again(x), ours(x))


def test_running_statistics_of_each_dtype_without_gradients(library):
    for dtype in (torch.float32, torch.bfloat16):
        x = image(4, 6, 5, 3, dtype=dtype)
        mean, var = torch.zeros(6), torch.ones(6)
        with torch.no_grad():
            B.batch_norm(x, mean, var, training=True, momentum=0.25)
        exact = x.double()
        torch.testing.assert_close(mean.double(), 0.25 * exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.double(), 0.75 + 0.25 * exact.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_a_later_step_in_training_does_not_change_the_gradient_of_an_evaluation(library):
    module, x = BatchNorm(6), image(4, 6, 5, 3).requires_grad_()
    module(image(4, 6, 5, 3, seed=1))
    module.eval()
    y = module(x)
    rstd = (module.running_var + module.eps).rsqrt().detach().clone()
    module.train()
    module(image(4, 6, 5, 3, seed=2))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, rstd.view(1, 6, 1, 1).expand_as(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_results_may_be_written_to(library, norm, layout):
    """As residual blocks do, `h += x`."""
    x, other = image(2, 8, 5, 5, layout=layout).requires_grad_(), image(2, 8, 5, 5, layout=layout, seed=1)
    y = B.group_norm(x, 4) if norm == "group" else B.batch_norm(x, training=True)
    y += other
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    z = F.group_norm(x, 4) if norm == "group" else F.batch_norm(x, None, None, training=True)
    (expected,) = torch.autograd.grad((z + other).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_a_written_result_behind_a_residual_is_an_error(library):
    x, residual = (image(2, 8, 5, 5, seed=s).requires_grad_() for s in (0, 1))
    y = B.batch_norm(x, training=True, activation="relu", residual=residual)
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_gradient_may_lie_otherwise_than_the_input(library):
    x = image(2, 8, 5, 7, layout=torch.channels_last).requires_grad_()
    for grad in (image(2, 8, 5, 7, seed=3), torch.ones(()).expand(2, 8, 5, 7)):
        (found,) = torch.autograd.grad(B.group_norm(x, 2, activation="silu"), x, grad)
        (expected,) = torch.autograd.grad(F.silu(F.group_norm(x, 2)), x, grad)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_kept_is_the_input_and_nothing_of_its_size(library):
    kept = []

    def pack(t):
        kept.append(t)
        return t

    x = image(2, 8, 16, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        B.group_norm(x, 4, torch.ones(8), torch.zeros(8), activation="silu")
        B.batch_norm(x, weight=torch.ones(8), training=True, activation="relu")
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()] * 2


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_first_row_far_from_the_rest_costs_no_digits(library, layout):
    """The first guess of a mean comes from the first elements, which may be a border of zeros."""
    x = image(2, 4, 20, 20, layout=layout) * 0.01 + 1000
    x[0, :, :2] = 0
    x[0, :, 2:] -= 0.005
    found = B.batch_norm(x.clone(memory_format=torch.preserve_format), training=True)
    exact = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    constant = torch.full((2, 4, 20, 20), 1000.125).contiguous(memory_format=layout)
    assert B.batch_norm(constant, training=True).abs().max() == 0
    assert B.group_norm(constant, 2).abs().max() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_not_finite_stays_in_its_channel(library, layout, value):
    x = image(2, 4, 6, 6, layout=layout)
    x[1, 2, 3, 3] = value
    y = B.batch_norm(x, training=True, activation="relu")
    assert y[:, 2].isnan().all() and y[:, [0, 1, 3]].isfinite().all()
    z = B.group_norm(x, 2, activation="silu")
    assert z[1, 2:].isnan().all() and z[0].isfinite().all() and z[1, :2].isfinite().all()


def test_errors_say_what_is_wrong(library):
    x = image(2, 8, 3, 3)
    cases = [
        (lambda: B.group_norm(x, 3), ValueError, "8 channels do not make 3 groups of one size"),
        (lambda: B.group_norm(x, 4.0), TypeError, "groups must be an int, got float"),
        (lambda: B.group_norm(x, 4, torch.ones(7)), ValueError, r"weight has shape \(7,\), expected \(8,\)"),
        (lambda: B.group_norm(x, 4, activation="tanh"), ValueError, "activation is 'tanh'; accepted are None, silu"),
        (lambda: B.group_norm(x[0, 0, 0], 1), ValueError, r"expected \(N, C, ...\)"),
        (lambda: B.group_norm(x.long(), 4), TypeError, "x is int64"),
        (lambda: B.batch_norm(x), ValueError, "without training running_mean and running_var must be given"),
        (lambda: B.batch_norm(x[:1, :, :1, :1], training=True), ValueError, "expected more than one value a channel"),
        (lambda: B.batch_norm(x[:0], training=True), ValueError, "in training expected some values"),
        (lambda: B.batch_norm(x, training=True, residual=x[:1]), ValueError, "residual has shape"),
        (lambda: B.batch_norm(x, training=True, residual=x.half()), TypeError, "residual is float16"),
        (lambda: B.batch_norm(x, training=True, activation="silu", residual=x), ValueError, "are None and relu"),
        (lambda: B.batch_norm(x, torch.ones(3), torch.ones(8)), ValueError, r"running_mean has shape \(3,\)"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_modules_compute_what_functions_do(library):
    x = image(2, 8, 5, 5)
    module = GroupNorm(4, 8, activation="silu")
    nn.init.normal_(module.weight)
    torch.testing.assert_close(module(x), F.silu(F.group_norm(x, 4, module.weight, module.bias)))
    with pytest.raises(ValueError, match="do not make 3 groups"):
        GroupNorm(3, 8)
    norm = BatchNorm(8, activation="relu")
    torch.testing.assert_close(norm(x, x), F.relu(F.batch_norm(x, None, None, training=True) + x), rtol=1e-5, atol=1e-6)
