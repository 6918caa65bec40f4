"""Decode attention on a GPU: lengths, pages, tiles and types that the samples do not have, graphs, and large caches."""

from __future__ import annotations

import pytest
import torch
from decode_calls import check_decoded, decode_arguments
from torch import Tensor

from bigkernels._compare import compare
from bigkernels.ops import attention as shared
from bigkernels.ops.registry import KERNEL_DTYPES

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def decode(*args: object) -> tuple[Tensor, Tensor]:
    return torch.ops.bigkernels.decode_attention(*args)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LENGTHS = [4000, 1, 0, 129, 2048, 777]
# (queries, heads, key heads, size, value size)
SHAPES = [
    (1, 32, 8, 128, 128),
    (1, 8, 8, 64, 64),
    (1, 7, 1, 80, 80),
    (3, 12, 4, 96, 72),
    (16, 8, 2, 128, 128),
    (4, 8, 1, 256, 256),
    (1, 16, 16, 192, 128),
    (1, 16, 1, 576, 512),
    (40, 4, 2, 64, 64),
    (2, 6, 3, 20, 12),
]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
@pytest.mark.parametrize("page", [0, 1, 16, 48, 256], ids=lambda n: f"pages of {n}" if n else "contiguous")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_pages(shape, page, dtype):
    args = decode_arguments(LENGTHS, *shape, page=page, dtype=dtype, device=DEVICE)
    check_decoded(decode(*args), args)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
@pytest.mark.parametrize("page", [0, 16, 48, 256], ids=lambda n: f"pages of {n}" if n else "contiguous")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(shape, page, dtype):
    args = decode_arguments(LENGTHS, *shape, page=page, int8=True, dtype=dtype, device=DEVICE)
    check_decoded(decode(*args), args)


@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("queries", [1, 5])
def test_all_options(queries, int8):
    args = decode_arguments(
        LENGTHS,
        queries,
        16,
        4,
        128,
        page=16,
        int8=int8,
        left=500,
        softcap=20.0,
        alibi=True,
        sinks=True,
        dtype=torch.bfloat16,
        device=DEVICE,
    )
    check_decoded(decode(*args), args)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
def test_every_int8_value_is_exact(dtype):
    cache = torch.arange(-128, 128, device=DEVICE).to(torch.int8).view(4, 1, 1, 64)
    q = torch.eye(64, dtype=dtype, device=DEVICE).view(1, 64, 1, 64).expand(4, -1, -1, -1)
    one, lengths = torch.ones(4, 1, 1, device=DEVICE), torch.ones(4, dtype=torch.int32, device=DEVICE)
    out, lse = decode(q, cache, cache, lengths, None, one, one, None, None, -1, 1.0, 0.0)
    assert torch.equal(out, cache.to(dtype).expand(4, 64, 1, 64))
    torch.testing.assert_close(lse.view(-1), cache.float().view(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch", [1, 40, 3000])
def test_numbers_of_sequences(batch):
    lengths = [(37 * b) % 300 for b in range(batch - 1)] + [5000]
    args = decode_arguments(lengths, 1, 4, 2, 64, page=16, dtype=torch.bfloat16, device=DEVICE)
    check_decoded(decode(*args), args)


def test_a_graph_serves_other_lengths():
    """What was captured is replayed for the lengths that the tensors have by then."""
    longest = decode_arguments([3000] * 6, 1, 16, 4, 128, dtype=torch.bfloat16, device=DEVICE)
    lengths = longest[3]
    decode(*longest)
    graph = torch.cuda.CUDAGraph()
    lengths.fill_(1)
    with torch.cuda.graph(graph):
        captured = decode(*longest)
    for new in ([3000] * 6, LENGTHS[:6], [0] * 6, [1, 2, 3, 64, 65, 2999]):
        lengths.copy_(torch.tensor([min(n, 3000) for n in new]))
        graph.replay()
        expected = decode(*longest)
        assert all(map(torch.equal, captured, expected))
        check_decoded(captured, longest)


def test_repeats_bit_for_bit():
    args = decode_arguments(LENGTHS, 2, 16, 4, 128, page=16, dtype=torch.bfloat16, device=DEVICE)
    first = decode(*args)
    for _ in range(20):
        assert all(map(torch.equal, first, decode(*args)))


@pytest.mark.parametrize("left, right, queries, keys", [(-1, -1, 1, 4000), (-1, 0, 5, 3000), (100, 30, 7, 900)])
def test_attention_of_few_queries(left, right, queries, keys):
    from bigkernels.triton.decode_attention import serve_attention

    q = torch.randn(2, 12, queries, 128, dtype=torch.bfloat16, device=DEVICE)
    k, v = (torch.randn(2, 4, keys, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    found = serve_attention(q, k, v, None, None, left, right, 0.1, 0.0)
    rest = (*[None] * 6, left, right, 0.1, 0.0, 0.0)
    plain, exact = shared.attend(q, k, v, None, *rest), shared.attend(q.double(), k.double(), v.double(), None, *rest)
    for ours, p, e in zip(found, plain, exact, strict=True):
        comparison = compare(ours, p.to(ours.dtype), e, scale="row")
        assert comparison.ok, str(comparison)


def test_a_cache_of_more_than_2_31_elements():
    pages = 2**31 // (16 * 8 * 128) + 100
    needed = 2 * 2 * pages * 16 * 8 * 128
    if torch.cuda.mem_get_info()[0] < needed * 1.1:
        pytest.skip(f"needs {needed * 1.1 / 2**30:.0f} GiB of GPU memory")
    q = torch.randn(2, 32, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    k_cache, v_cache = (torch.zeros(pages, 16, 8, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    k_cache[-60:].normal_()
    v_cache[-60:].normal_()
    table = (pages - 60 + torch.randperm(60, device=DEVICE)).view(2, 30).int()
    lengths = torch.tensor([480, 300], dtype=torch.int32, device=DEVICE)
    rest = (None, None, None, None, -1, 0.1, 0.0)
    found = decode(q, k_cache, v_cache, lengths, table, *rest)
    last = (q, k_cache[-60:], v_cache[-60:], lengths, table - (pages - 60), *rest)
    check_decoded(found, last)
