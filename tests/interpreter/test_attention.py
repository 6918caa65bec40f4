"""What the samples do not show of the attention kernels: the backward that adds up by atomics, and its switch."""

import pytest
import torch

import bigkernels
from bigkernels._samples import SAMPLES, widen
from bigkernels.triton import _attention_backward as kernels
from bigkernels.triton._launch import recording

pytestmark = pytest.mark.usefixtures("launchers_serve_cpu_tensors")

CHOSEN = {
    "attention": ("causal", "head of 80", "window", "sinks and mask", "bias of all batches"),
    "varlen_attention": ("causal", "other lengths of keys"),
}
SOME = [s for operator, names in CHOSEN.items() for s in SAMPLES[operator] if s.name in names]


@pytest.fixture
def nondeterministic():
    bigkernels.allow_nondeterministic()
    yield
    bigkernels.allow_nondeterministic(False)


def _backward_kernels(dtype: torch.dtype) -> set:
    sample = next(s for s in SAMPLES["attention"] if s.name == "causal")
    with recording() as launches:
        sample.results(sample.inputs(dtype), backend="triton")
    return {launch.kernel for launch in launches}


@pytest.mark.parametrize(
    "sample",
    [s for op, names in CHOSEN.items() for s in SAMPLES[op] if s.name in names],
    ids=lambda s: f"{s.operator}: {s.name}",
)
def test_atomics_add_up_the_same_gradients(sample, nondeterministic):
    inputs = sample.inputs(torch.float16)
    ours = sample.results(inputs, backend="triton")
    plain = sample.results(inputs, backend="reference")
    exact = sample.results(widen(inputs), backend="reference")
    wrong = {name: str(c) for name, c in sample.judge(ours, plain, exact, gradient_roundings=1).items() if not c.ok}
    assert not wrong


def test_atomics_take_the_place_of_a_kernel(nondeterministic):
    assert kernels.backward_queries not in _backward_kernels(torch.float16)
    assert kernels.backward_queries in _backward_kernels(torch.float32)  # whose digits an order of additions would cost


def test_determinism_goes_first(nondeterministic):
    torch.use_deterministic_algorithms(True)
    try:
        assert kernels.backward_queries in _backward_kernels(torch.float16)
    finally:
        torch.use_deterministic_algorithms(False)


def test_determinism_is_the_default():
    assert kernels.backward_queries in _backward_kernels(torch.float16)


@pytest.mark.parametrize("window", [(0, 0), (0, -1)])
def test_windows_that_begin_at_the_query_itself(window):
    """Blocks of keys on the diagonal are the first that a query sees, as well as the last."""
    q, k, v = (torch.randn(1, 1, 150, 16) for _ in range(3))
    upstream = torch.randn(1, 1, 150, 16)

    def results(backend, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with bigkernels.use(backend):
            out = bigkernels.functional.attention(*leaves, window=window)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))

    exact = results("reference", q.double(), k.double(), v.double())
    for found, expected in zip(results("triton", q, k, v), exact, strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
