"""Products of tokens with their experts' weights, against each expert's product by PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigkernels.ops.codes import Operands
from bigkernels.ops.grouped_linear import grouped_linear
from bigkernels.quantization import quantize_weight

FORMATS = ("int8", "int8-dynamic", "int4", "nf4", "fp8", "q4_1", "q8_0")
ENDS = {
    "all have some": [5, 9, 20, 23],
    "some have none": [0, 11, 11, 23],
    "one has all": [0, 0, 23, 23],
    "some belong to none": [3, 7, 7, 12],
    "nobody has any": [0, 0, 0, 0],
}
TOKENS, N, K = 23, 40, 96


def each(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    parts = [x[b:e] @ w.T for w, b, e in zip(weight, [0, *ends], ends, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], weight.shape[1])])


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_plain(ends):
    x, weight = torch.randn(TOKENS, K, requires_grad=True), torch.randn(4, N, K, requires_grad=True)
    up = torch.randn(TOKENS, N)
    found, expected = grouped_linear(x, weight, torch.tensor(ends)), each(x, weight, ends)
    if ends[-1] == 0:
        assert not found.any()
        return
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        *(torch.autograd.grad(y, (x, weight), up, materialize_grads=True) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("format", FORMATS)
def test_quantized(format):
    x, weight = torch.randn(TOKENS, K, requires_grad=True), torch.randn(4, N, K)
    qweight = quantize_weight(weight.flatten(0, 1), format)
    dense, up = qweight.dequantize().view(4, N, K), torch.randn(TOKENS, N)
    found = grouped_linear(x, qweight, torch.tensor(ENDS["some have none"], dtype=torch.int32))
    expected = each(x, dense, ENDS["some have none"])
    tolerance = {"rtol": 0.05, "atol": 0.5} if format == "int8-dynamic" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found, expected, **tolerance)
    (a,), (b,) = (torch.autograd.grad(y, x, up) for y in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_fallbacks_of_the_raw_operators(format):
    """What runs where a graph with them meets a machine without a GPU."""
    ops, ends = torch.ops.bigkernels, torch.tensor(ENDS["some belong to none"])
    x, weight, up = torch.randn(TOKENS, K), torch.randn(4, N, K), torch.randn(TOKENS, N)
    operands, dynamic = Operands.plain(weight.flatten(0, 1).detach()), False
    if format is not None:
        qweight = quantize_weight(weight.flatten(0, 1), format)
        operands, dynamic, weight = qweight.operands(), qweight.format.dynamic, qweight.dequantize().view(4, N, K)
    leaf = x.clone().requires_grad_()
    expected = each(leaf, weight.requires_grad_(), ends.tolist())
    dx, dw = torch.autograd.grad(expected, (leaf, weight), up)
    tolerance = {"rtol": 0.05, "atol": 0.5} if dynamic else {"rtol": 1e-4, "atol": 1e-4}
    calls = [
        (ops.grouped_linear_fwd, (x, ends, *operands, dynamic), expected.detach(), tolerance),
        (ops.grouped_linear_bwd, (up, ends, *operands, K), dx, {"rtol": 1e-4, "atol": 1e-4}),
        (ops.grouped_linear_weight_bwd, (up, x, ends), dw, {"rtol": 1e-4, "atol": 1e-4}),
    ]
    for op, args, right, allowed in calls:
        torch.testing.assert_close(op(*args), right, **allowed)
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


def test_wrong_arguments_are_named():
    x, weight, ends = torch.randn(5, 8), torch.randn(2, 3, 8), torch.tensor([2, 5])
    for given, message in (
        ((x, weight, ends[:1]), "do not fit"),
        ((x[:, :4], weight, ends), "do not fit"),
        ((x[0], weight, ends), "do not fit"),
        ((x.half(), weight, ends), "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_linear(*given)
    for given in ((x.long(), weight, ends), (x, weight, ends.float())):
        with pytest.raises(TypeError, match="grouped_linear"):
            grouped_linear(*given)
