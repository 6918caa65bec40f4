"""The kernels for experts, which find on the device whose tokens they have."""

import pytest
import torch

from bigkernels import use
from bigkernels.ops import grouped_linear as op
from bigkernels.ops.codes import Operands
from bigkernels.quantization import quantize_weight
from bigkernels.triton import grouped_linear as launchers
from bigkernels.triton._launch import recording

N, K = 40, 96
# Where tokens end, of experts that have some, none, more than a tile, and with tokens that belong to nobody.
ENDS = ([3, 3, 20, 21], [0, 0, 0, 150], [70, 71, 71, 140], [5], [2, 1, 9, 400], [0, 0, 0, 0])


def _operands(format: str | None, experts: int, dtype: torch.dtype) -> tuple:
    weight = torch.randn(experts * N, K)
    if format is None:
        return Operands.plain(weight.to(dtype)), False
    qweight = quantize_weight(weight, format)
    return qweight.operands(), qweight.format.dynamic


def _close(found, plain, exact):
    found, plain, exact = (t.double() for t in (found, plain, exact))
    scale = exact.abs().max().clamp_min(1e-30)
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 4e-6 * scale


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("format", [None, "int4"])
def test_every_distribution(format, ends):
    tokens = min(150, max(*ends, 1) + 7)
    x, up = torch.randn(tokens, K), torch.randn(tokens, N)
    where = torch.tensor(ends, dtype=torch.int32)
    if ends == [2, 1, 9, 400]:  # no ends at all: nothing may be read or written outside, and the last expert is right
        operands, _ = _operands(format, 4, torch.float32)
        found = launchers.forward(x, where, *operands, False)
        last = op._forward(x, torch.tensor([0, 0, 9, tokens]), *operands, False)[9:]
        torch.testing.assert_close(found[9:], last, rtol=1e-4, atol=1e-4)
        return
    operands, _ = _operands(format, len(ends), torch.float32)
    torch.testing.assert_close(
        launchers.forward(x, where, *operands, False), op._forward(x, where, *operands, False), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        launchers.backward(up, where, *operands, K), op._backward(up, where, *operands, K), rtol=1e-4, atol=1e-4
    )
    if format is None:
        torch.testing.assert_close(
            launchers.weight_backward(up, x, where), op._weight_backward(up, x, where), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("format", ["int8", "int8-dynamic", "nf4", "fp8", "q4_1", "q8_0"])
def test_every_format(format, dtype):
    ends = torch.tensor([6, 6, 30])
    operands, dynamic = _operands(format, 3, dtype)
    x, up = torch.randn(33, K, dtype=dtype), torch.randn(33, N, dtype=dtype)
    found = launchers.forward(x, ends, *operands, dynamic)
    _close(found, op._forward(x, ends, *operands, dynamic), op._forward(x.double(), ends, *operands, dynamic))
    found = launchers.backward(up, ends, *operands, K)
    _close(found, op._backward(up, ends, *operands, K), op._backward(up.double(), ends, *operands, K))


@pytest.mark.usefixtures("launchers_serve_cpu_tensors")
def test_one_launch_for_all_experts():
    qweight = quantize_weight(torch.randn(8 * N, K), "int8")
    x, ends = torch.randn(16, K, requires_grad=True), torch.arange(2, 18, 2, dtype=torch.int32)
    with use("triton"), recording() as launches:
        op.grouped_linear(x, qweight, ends).sum().backward()
    assert [launch.kernel.__name__ for launch in launches] == ["multiply_groups", "multiply_groups_back"]
    with use("triton"):
        found = op.grouped_linear(x, qweight, ends)
    dense = qweight.dequantize().view(8, N, K)
    expected = torch.einsum("etk,enk->etn", x.detach().view(8, 2, K), dense).flatten(0, 1)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)
