"""Kernels that read blocks of GGUF files: values bit for bit, products and gradients against float64."""

from __future__ import annotations

import pytest
import torch
from conftest import Isa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from products import check_product
from torch import Tensor

from bigkernels.functional import linear_cross_entropy, quantized_linear
from bigkernels.nn import QuantizedEmbedding
from bigkernels.ops.codes import KINDS, kernels_read
from bigkernels.quantization import GGUFBlocks, QuantizedWeight
from bigkernels.quantization.ggml import BLOCK_TYPES

READ = [name for name, row in BLOCK_TYPES.items() if row.kernels >= 0]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

fwd, bwd = torch.ops.bigkernels.quantized_linear_fwd, torch.ops.bigkernels.quantized_linear_bwd


def weight(kind: str, n: int, k: int, seed: int = 0) -> QuantizedWeight:
    """Random codes, and scales that are sensible; rows are rounded up to whole blocks."""
    row, made = BLOCK_TYPES[kind], torch.Generator().manual_seed(seed)
    count = -(-k // row.block)
    raw = torch.randint(0, 256, (n * count, row.nbytes), generator=made, dtype=torch.uint8)
    for at in row.scales:
        scale = (torch.randn(n * count, generator=made, dtype=torch.float32) * 0.01).half()
        raw[:, at : at + 2] = scale[:, None].view(torch.uint8)
    stored = {"blocks": raw.view(n, count * row.nbytes)}
    return QuantizedWeight(GGUFBlocks(kind), (n, count * row.block), torch.float32, stored)


@pytest.mark.parametrize("kind", READ)
def test_kernels_read_it(kind: str):
    row = BLOCK_TYPES[kind]
    assert KINDS[row.kernels] is row.kind and row.kind.has_kernels
    assert kernels_read(row.kernels, torch.empty(0)) and not kernels_read(row.kernels, torch.empty(0, device="meta"))


@pytest.mark.parametrize("kind", READ)
def test_values_bit_for_bit(kind: str):
    """Each is the only product of its result that is not zero."""
    q = weight(kind, 37, 600)
    k = q.shape[1]
    exact = q.dequantize()
    one = torch.eye(k)
    for rows in (one[:1], one[3:16], one):
        found = quantized_linear(rows, q)
        expected = rows @ exact.T
        if torch.ops.bigkernels.cpu_isa() == "amx" and len(rows) > 16:  # values as sums of three bfloat16
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        else:
            assert torch.equal(found, expected)
    grad = torch.eye(37)
    back = bwd(grad, *q.operands(), k)
    if torch.ops.bigkernels.cpu_isa() == "amx":
        torch.testing.assert_close(back, exact, rtol=1e-6, atol=0)
    else:
        assert torch.equal(back, exact)


cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(READ),
        "m": st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 33, 70, 600]),
        "n": st.sampled_from([1, 3, 7, 31, 64, 129]),
        "k": st.sampled_from([1, 95, 256, 300, 600, 1100]),
        "dtype": st.sampled_from(list(DTYPES)),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


@given(cases)
@MANY
def test_products(case):
    check(**case)


def check(kind: str, m: int, n: int, k: int, dtype: str, bias: bool, seed: int) -> None:
    q = weight(kind, n, k, seed)
    w, k = q.dequantize(torch.float64), q.shape[1]
    made = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float32).to(DTYPES[dtype])

    x, added, grad = random(m, k), random(n) if bias else None, random(m, n)
    exact = torch.nn.functional.linear(x.double(), w, None if added is None else added.double())
    plain = torch.nn.functional.linear(x, w.to(x.dtype), added)
    check_product(
        fwd(x, *q.operands()[:5], added, 0, q.operands().kind, k, False), plain, exact, x.double().abs() @ w.abs().T
    )
    check_product(bwd(grad, *q.operands(), k), grad @ w.to(x.dtype), grad.double() @ w, grad.double().abs() @ w.abs())


def test_at_every_level(isa: Isa):
    isa.script(__file__)


@pytest.mark.parametrize("m", [1, 8, 64])
@pytest.mark.parametrize("kind", READ)
def test_tokens_do_not_know_of_each_other(kind: str, m: int):
    q = weight(kind, 70, 300)
    x = torch.randn(1, q.shape[1]).repeat(m, 1).bfloat16()
    found = quantized_linear(x, q)
    assert torch.equal(found, found[:1].expand(m, -1))
    if m > 1:
        x[m // 2, 3] = float("nan")
        again = quantized_linear(x, q)
        others = torch.arange(m) != m // 2
        assert again[m // 2].isnan().all() and torch.equal(again[others], found[others])


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0"])
def test_around_the_operator(kind: str):
    """Strides, no elements, transforms, other devices' fallback, a head's loss, an embedding."""
    q = weight(kind, 24, 300)
    k, w = q.shape[1], q.dequantize()
    whole = torch.randn(20, 3, 2 * k)
    for x in (whole[..., 5 : 5 + k], whole[..., ::2], whole.transpose(0, 1)[..., :k], whole[:, 0, :k]):
        torch.testing.assert_close(quantized_linear(x, q), x @ w.T, rtol=1e-4, atol=1e-3)
        assert torch.equal(quantized_linear(x, q), quantized_linear(x.contiguous(), q))
    assert quantized_linear(torch.randn(0, k), q).shape == (0, 24)
    assert bwd(torch.randn(3, 0), *weight(kind, 0, 256).operands(), weight(kind, 0, 256).shape[1]).eq(0).all()
    torch.library.opcheck(fwd.default, (torch.randn(3, k), *q.operands()[:5], None, 0, q.operands().kind, k, False))
    x = torch.randn(5, k)
    compiled = torch.compile(lambda x: quantized_linear(x, q), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x @ w.T, rtol=1e-4, atol=1e-3)
    grads = torch.func.vmap(torch.func.grad(lambda row: quantized_linear(row, q).square().sum()))(x)
    torch.testing.assert_close(grads, 2 * (x @ w.T) @ w, rtol=1e-4, atol=1e-2)
    target = torch.arange(5) % 24
    loss = linear_cross_entropy(x.requires_grad_(), q, target)
    plain = torch.nn.functional.cross_entropy(x @ w.T, target)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(loss, x), torch.autograd.grad(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    table = QuantizedEmbedding(q)
    ids = torch.tensor([[3, 23], [0, 3]])
    assert torch.equal(table(ids), w[ids])


def test_operands_that_do_not_fit():
    q = weight("Q4_K", 4, 512)
    codes, *rest = q.operands()
    for x, given_codes, scale, k, message in (
        (torch.randn(2, 511), codes, None, 511, "rows of 511"),
        (torch.randn(2, 512), codes[:, :-1], None, 512, "rows of 512"),
        (torch.randn(2, 512), codes.view(torch.int8), None, 512, "uint8"),
        (torch.randn(2, 512), codes, torch.ones(4), 512, "scale"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fwd(x, given_codes, scale, None, None, None, None, 0, q.operands().kind, k, False)
    assert rest[0] is None


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_threads(threads: int):
    q = weight("Q6_K", 200, 512)
    x = torch.randn(40, 512)
    before = torch.get_num_threads()
    expected = quantized_linear(x, q), quantized_linear(x[:2], q)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(quantized_linear(x, q), expected[0]) and torch.equal(quantized_linear(x[:2], q), expected[1])
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    for i, name in enumerate(READ):
        for j, (tokens, dtype) in enumerate(((1, "float32"), (5, "bfloat16"), (33, "float16"), (70, "float32"))):
            check(name, tokens, 40 + j, (256, 300)[i % 2], dtype, bool(j % 2), 10 * i + j)
