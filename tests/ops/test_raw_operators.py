"""The raw operators of the CPU library check what their kernels read, whoever calls them."""

from __future__ import annotations

import pytest
import torch

import bigkernels

OPS = torch.ops.bigkernels
pytestmark = pytest.mark.usefixtures("library")


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


NORM = ones(2, 8)
STATS = ones(2)


@pytest.mark.parametrize(
    "op, args",
    [
        (OPS.rms_norm_bwd, (NORM, NORM, ones(8), STATS, ones(2, 7), 0.0)),
        (OPS.rms_norm_bwd, (NORM, NORM, ones(8), STATS, ones(2, 8, dtype=torch.float16), 0.0)),
        (OPS.rms_norm_bwd, (ones(3, 8), NORM, ones(8), STATS, None, 0.0)),
        (OPS.rms_norm_bwd, (NORM, NORM, ones(7), STATS, None, 0.0)),
        (OPS.rms_norm_bwd, (NORM, NORM, ones(8), ones(1), None, 0.0)),
        (OPS.rms_norm_bwd, (NORM, NORM, ones(8), STATS.double(), None, 0.0)),
        (OPS.layer_norm_bwd, (NORM, NORM, ones(8), ones(8), STATS, STATS, ones(1, 8))),
        (OPS.layer_norm_bwd, (NORM, NORM, ones(8), ones(8), STATS, ones(1), None)),
        (OPS.layer_norm_bwd, (NORM, NORM, ones(8), ones(8), STATS.half(), STATS, None)),
        (OPS.layer_norm_bwd, (ones(2, 9), NORM, ones(8), ones(8), STATS, STATS, None)),
        (OPS.glu_fwd, (NORM, ones(2, 9), 0)),
        (OPS.glu_fwd, (NORM, ones(2, 8, dtype=torch.float16), 0)),
        (OPS.glu_bwd, (ones(3, 8), NORM, NORM, 0)),
        (OPS.compress, (ones(8)[::2], False, False, 0)),
        (OPS.compress, (NORM, False, False, 0)),
        (OPS.decompress, (ones(256, dtype=torch.uint8), ones(9), False, torch.float32)),
        (OPS.decompress, (ones(512, dtype=torch.uint8)[::2], ones(1), False, torch.float32)),
        (OPS.decompress, (ones(256, dtype=torch.int8), ones(1), False, torch.float32)),
        (OPS.decompress, (ones(256, dtype=torch.uint8), ones(1).double(), False, torch.float32)),
        (OPS.decompress, (ones(16384, dtype=torch.uint8), ones(200)[::2], False, torch.float32)),
    ],
    ids=str,
)
def test_operands_that_do_not_fit(op, args):
    with pytest.raises(RuntimeError, match="bigkernels::"):
        op(*args)


def test_the_stride_of_one_element_does_not_matter():
    codes, scale = OPS.compress(ones(4)[::4], False, False, 0)
    assert torch.equal(OPS.decompress(codes, scale, False, torch.float32), ones(1))


def test_sixteen_dimensions():
    x = torch.randn(*(2 if i in (3, 15) else 1 for i in range(16)))
    y, _ = OPS.rms_norm_fwd(x, None, None, 1e-6, 0.0)[:2]
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (2,), eps=1e-6))


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("target", [-1, 5, 2**40])
def test_targets_outside_the_vocabulary(row, target):
    targets = torch.tensor([0, 4, -100, 2])
    targets[row] = target
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        OPS.cross_entropy_fwd(ones(4, 5), targets, None, None, -100, 1, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("which, value", [(0, -0.1), (0, 1.1), (1, -1.0), (2, -1.0), (3, -1.0)])
def test_options_out_of_their_range(which, value):
    options = [value if i == which else 0.0 for i in range(4)]
    with pytest.raises(RuntimeError, match="out of its range"):
        OPS.cross_entropy_fwd(ones(2, 5), torch.tensor([0, 1]), None, None, -100, 1, *options)


def test_the_ends_of_their_range():
    logits, target = torch.randn(3, 5), torch.tensor([0, 4, 2])
    loss, _, _ = OPS.cross_entropy_fwd(logits, target, None, None, -100, 1, 1.0, 0.0, 0.0, 0.0)
    expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=1.0)
    torch.testing.assert_close(loss.mean(), expected)


HEADS = {"q": (1, 4, 3, 8), "k": (1, 2, 3, 8), "v": (1, 2, 3, 8)}


@pytest.mark.parametrize(
    "change",
    [{"k": (1, 2, 3, 9)}, {"v": (1, 1, 3, 8)}, {"k": (1, 3, 3, 8), "v": (1, 3, 3, 8)}, {"v": (1, 2, 4, 8)}],
    ids=str,
)
def test_heads_that_do_not_fit(change):
    q, k, v = (ones(*shape) for shape in (HEADS | change).values())
    with pytest.raises(RuntimeError, match="fit"):
        OPS.attention_fwd(q, k, v, None, None, None, None, None, None, -1, -1, 1.0, 0.0, 0.0)


def packed(**change: torch.Tensor) -> tuple:
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)
    x = ones(5, 2, 8)
    given = {"grad": x, "grad_lse": None, "q": x, "k": x, "v": x, "out": x, "lse": ones(2, 5)} | change
    return (*given.values(), starts, starts, None, None, None, None, 3, 3, -1, -1, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "change", [{"lse": ones(2, 4)}, {"lse": ones(5, 2)}, {"lse": ones(2, 5).half()}, {"out": ones(4, 2, 8)}], ids=str
)
def test_packed_results_that_do_not_fit(change):
    OPS.varlen_attention_bwd(*packed())
    with pytest.raises(RuntimeError, match="bigkernels::"):
        OPS.varlen_attention_bwd(*packed(**change))


@pytest.mark.parametrize("left", [-1, 0, 5])
def test_pages_that_do_not_exist(left):
    """Every page that a query sees is checked, and none that it does not."""
    q, cache, lengths = ones(1, 2, 3, 8), ones(4, 4, 2, 8), torch.tensor([16], dtype=torch.int32)
    oldest = 0 if left < 0 else (16 - 3 - left) // 4

    def call(table: list[int]):
        pages = torch.tensor([table], dtype=torch.int32)
        return OPS.decode_attention(q, cache, cache, lengths, pages, None, None, None, None, left, 1.0, 0.0)

    call([9] * oldest + list(range(oldest, 4)))
    for i in range(oldest, 4):
        for bad in (-1, 4):
            with pytest.raises(RuntimeError, match="is not one of 4 pages"):
                call([bad if j == i else j for j in range(4)])


def test_results_lie_in_memory_as_their_inputs():
    q, k = (torch.randn(2, 5, heads, 16).transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(2, 5, 16)
    with bigkernels.use("cpu"):
        rotated = bigkernels.functional.rope(q, k, angles.cos(), angles.sin())
    assert [t.stride() for t in rotated] == [q.stride(), k.stride()]
