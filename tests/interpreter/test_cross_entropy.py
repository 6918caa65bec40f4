"""The gradient written over the logits, against the one that is not."""

from __future__ import annotations

import pytest
import torch

import bigkernels
from bigkernels.ops import linear_cross_entropy
from bigkernels.triton import cross_entropy as launchers
from bigkernels.triton._launch import recording

OPTIONS = [(0.0, 0.0, 0.0, 0.0), (0.1, 1e-4, 0.0, 0.0), (0.0, 0.0, 3.0, 1.5), (0.2, 1e-3, 5.0, 2.0)]


def arguments(tokens, vocabulary, options, dtype=torch.float32, weighted=True):
    logits = (3 * torch.randn(tokens, vocabulary)).to(dtype)
    target = torch.randint(vocabulary, (tokens,))
    target[1::3] = -100
    weights = (torch.rand(vocabulary), torch.rand(tokens)) if weighted else (None, None)
    lse = launchers.forward(logits, target, *weights, -100, 0, *options)[1]
    return torch.randn(tokens), logits, target, *weights, lse, torch.ones(()), -100, 0, *options


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (5, 37), (3, 1024), (2, 17000), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_over_the_logits(sizes, options, dtype):
    args = arguments(*sizes, options, dtype, weighted=sizes[0] % 2 == 1)
    expected = launchers.backward(*args)
    assert launchers.backward_over(*args) is None
    assert torch.equal(args[1], expected)


def test_a_view_of_a_wider_matrix():
    grad, logits, *rest = arguments(5, 37, OPTIONS[0])
    wide = torch.zeros(5, 40)
    wide[:, :37] = logits
    launchers.backward_over(grad, wide[:, :37], *rest)
    torch.testing.assert_close(wide[:, :37], launchers.backward(grad, logits, *rest))
    assert not wide[:, 37:].any()


def test_one_program_a_row():
    """A second one would read the logit of the target after it has been written over."""
    args = arguments(4, 20000, OPTIONS[0])
    with recording() as launches:
        launchers.backward_over(*args)
    (launch,) = launches
    assert launch.args["IN_PLACE"] and launch.args["D_LOGITS"].data_ptr() == launch.args["LOGITS"].data_ptr()
    assert launch.grid == (4, 1)


@pytest.mark.usefixtures("launchers_serve_cpu_tensors")
def test_focal_weights_of_confident_tokens():
    """1 - p of the target, from log p: by a series where it is small."""
    z = torch.linspace(-1.0, 1.5, 64)
    logits, target = torch.stack([z, torch.zeros(64)], 1), torch.zeros(64, dtype=torch.int64)
    options = {"focal_gamma": 2.0, "reduction": "none"}
    with bigkernels.use("triton"):
        found = bigkernels.functional.cross_entropy(logits, target, **options)
    exact = bigkernels.functional.cross_entropy(logits.double(), target, **options)
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (5, 37), (3, 1024), (2, 17000), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_predicted_classes(sizes, options, dtype):
    tokens, vocabulary = sizes
    logits = torch.randint(-9, 10, sizes).to(dtype)  # many are equal: the first of the largest is wanted
    target = torch.randint(vocabulary, (tokens,))
    target[1::3] = -100
    args = (logits, target, None, None, -100, 0, *options)
    *found, predicted = launchers.predict(*args)
    for a, b in zip(found, launchers.forward(*args), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(predicted, torch.where(target == -100, -1, logits.argmax(-1)))


def test_predicted_classes_of_what_is_not_a_number():
    nan, inf = torch.nan, torch.inf
    logits = torch.zeros(8, 5000)
    for row, places in enumerate(
        (
            {4321: nan},
            {0: nan},
            {70: nan, 3000: nan},
            {5: inf, 300: nan},
            {5: inf, 4999: inf},
            {4999: 1.0},
            {17: 1.0, 18: 1.0, 4000: 1.0},
        )
    ):
        logits[row, list(places)] = torch.tensor(list(places.values()))
    logits[7] = -inf
    predicted = launchers.predict(logits, torch.zeros(8, dtype=torch.int64), None, None, -100, 0, 0.0, 0.0, 0.0, 0.0)[3]
    assert torch.equal(predicted, logits.argmax(-1))


@pytest.mark.usefixtures("launchers_serve_cpu_tensors")
def test_the_loss_of_a_head_reports():
    """The chunks of a GPU: cross entropy's kernel with its predictions, in each chunk."""
    hidden, weight = torch.randint(-2, 3, (40, 6)).float(), torch.randint(-2, 3, (300, 6)).float()
    target = torch.randint(300, (40,))
    target[::5] = -100
    z = hidden @ weight.T
    loss = linear_cross_entropy.Losses(target, None, None, (-100, 0.0, 0.0, None, 0.0), True)
    with bigkernels.use("triton"):
        values = [loss.values(z[rows], rows) for rows in (slice(0, 32), slice(32, 40))]
    predicted, lse = (torch.cat(parts) for parts in list(zip(*values, strict=True))[2:])
    assert torch.equal(predicted, torch.where(target == -100, -1, z.argmax(-1)))
    torch.testing.assert_close(lse, torch.where(target == -100, 0, z.logsumexp(-1)))
