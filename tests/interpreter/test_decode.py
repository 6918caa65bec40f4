"""The launchers of decode attention and of the append, called directly: what the samples do not reach."""

from __future__ import annotations

import pytest
import torch
from decode_calls import append_twice, check_decoded, decode_arguments, same
from torch import Tensor

from bigkernels._compare import compare
from bigkernels.ops import attention as shared
from bigkernels.ops import decode_attention as op
from bigkernels.triton import decode_attention as launchers

INT32 = torch.int32


def decode(*args: object, **options: object) -> tuple[tuple, tuple]:
    """The launcher's results, checked against the reference, and its arguments."""
    args = decode_arguments(*args, **options)
    found = launchers.infer(*args)
    check_decoded(found, args)
    return found, args


@pytest.fixture(params=[1, 50], ids=lambda n: f"{n} processors")
def machine(request, monkeypatch):
    """Machines of several sizes split the keys in other places."""
    monkeypatch.setattr(launchers, "processors", lambda device: request.param)


@pytest.mark.parametrize("page", [0, 16, 128], ids=lambda n: f"pages of {n}" if n else "contiguous")
def test_any_split(machine, page):
    decode([300, 1, 0, 129, 128], page=page, sinks=True)


def test_a_sequence_over_many_parts(machine):
    decode([1500, 40], heads=2, groups=1, queries=2)


def test_windows_and_parts(machine):
    decode([700, 3, 350, 0], queries=3, left=150, page=16, alibi=True)


def test_more_sequences_than_one_scan():
    decode([(7 * b) % 40 for b in range(70)], heads=2, groups=2, size=16, value_size=16, page=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("page", [0, 16, 7, 256])
def test_int8(dtype, page, monkeypatch):
    monkeypatch.setattr(launchers, "processors", lambda device: 3)
    decode([260, 33], queries=2, heads=6, groups=2, size=80, value_size=48, page=page, int8=True, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_every_int8_value_is_exact(dtype):
    cache = torch.arange(-128, 128).to(torch.int8).view(4, 1, 1, 64)
    q = torch.eye(64, dtype=dtype).view(1, 64, 1, 64).expand(4, -1, -1, -1)
    one = torch.ones(4, 1, 1)
    lengths = torch.ones(4, dtype=INT32)
    out, lse = launchers.infer(q, cache, cache, lengths, None, one, one, None, None, -1, 1.0, 0.0)
    assert torch.equal(out, cache.to(dtype).expand(4, 64, 1, 64))
    torch.testing.assert_close(lse.view(-1), cache.float().view(-1), rtol=1e-6, atol=0)


def test_small_and_large_scales_in_float16():
    """Weights times scales lie far outside of float16's normal numbers."""
    for scale in (1e-5, 500.0):
        q = torch.randn(1, 2, 1, 32).half()
        k, v = (torch.randint(-127, 128, (1, 200, 1, 32), dtype=torch.int8) for _ in range(2))
        scales = torch.rand(1, 200, 1) / 100, torch.full((1, 200, 1), scale)
        args = (q, k, v, torch.tensor([200], dtype=INT32), None, *scales, None, None, -1, 0.2, 0.0)
        check_decoded(launchers.infer(*args), args)


@pytest.mark.parametrize("rows", [(1, 7), (3, 11), (9, 4), (16, 8), (1, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_numbers_of_rows(rows, dtype):
    queries, group = rows
    decode([90, queries], queries=queries, heads=group, groups=1, dtype=dtype, page=32)


def test_what_is_not_seen_is_not_read(machine):
    (out, lse), args = decode([200, 0, 77], queries=2, left=30, capacity=230)
    q, k, v, lengths, *rest = args
    for b, n in enumerate(lengths.tolist()):
        for cache in (k, v):
            cache[b, n:] = float("nan")
            cache[b, : max(0, n - 2 - 30)] = float("inf")
    again = launchers.infer(q, k, v, lengths, *rest)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def test_nan_is_passed_on():
    (_, _), args = decode([100, 100], heads=4, groups=2)
    k = args[1].clone()
    k[1, 40, 0, 3] = float("nan")
    out, lse = launchers.infer(args[0], k, *args[2:])
    assert out[1, :2].isnan().all() and lse[1, :2].isnan().all()
    assert out[0].isfinite().all() and out[1, 2:].isfinite().all()


def test_repeats_bit_for_bit(machine):
    (out, lse), args = decode([513, 20, 0], queries=2, page=16)
    again = launchers.infer(*args)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize(
    "left, right, queries, keys",
    [(-1, -1, 1, 200), (-1, 0, 5, 130), (9, 4, 7, 150), (0, 0, 3, 40), (-1, 2, 6, 3), (2, -1, 4, 90), (5, 60, 2, 90)],
)
def test_serves_attention(left, right, queries, keys, machine):
    q, k = torch.randn(2, 6, queries, 40), torch.randn(2, keys, 2, 40).transpose(1, 2)
    v = torch.randn(2, 2, keys, 24)
    slopes, sinks = torch.rand(6), torch.randn(6)
    found = launchers.serve_attention(q, k, v, slopes, sinks, left, right, 0.2, 5.0)
    rest = (slopes, sinks, None, None, left, right, 0.2, 5.0, 0.0)
    plain = shared.attend(q, k, v, None, None, *rest)
    doubles = [t.double() if isinstance(t, Tensor) else t for t in rest]
    exact = shared.attend(q.double(), k.double(), v.double(), None, None, *doubles)
    for ours, p, e in zip(found, plain, exact, strict=True):
        comparison = compare(ours, p, e, scale="row")
        assert comparison.ok, str(comparison)
    assert found[0].stride() == shared.like(q, 24).stride()


def test_does_not_serve_attention_of_many_queries():
    q, k = torch.randn(1, 8, 33, 32), torch.randn(1, 4, 33, 32)
    assert launchers.serve_attention(q, k, k, None, None, -1, 0, 0.2, 0.0) is None
    assert launchers.serve_attention(q[:, :, :1], k[..., ::2], k, None, None, -1, 0, 0.2, 0.0) is None


def append(*args: object, **options: object) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return append_twice(launchers.append, *args, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("page", [0, 1, 16, 5])
def test_append_writes_what_the_reference_writes(page, int8, dtype):
    same(*append([9, 0, 3, 17], 3, page=page, int8=int8, dtype=dtype))


@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("rotary, interleaved", [(24, False), (8, False), (24, True), (10, True)])
def test_append_rotates(rotary, interleaved, int8):
    same(*append([9, 2], 2, page=4, rotary=rotary, interleaved=interleaved, int8=int8))


def test_append_quantizes_zeros_and_infinities():
    def change(k: Tensor, v: Tensor) -> None:
        k[0, 0] = 0.0
        v[0, 1, 0, 3] = float("nan")
        v[1, 2, 1, 5] = -float("inf")
        k[1, 1, 0] = torch.arange(24.0) * 0.5 - 6.0  # quotients that are halves
        k[1, 1, 0, 0] = 63.5

    same(*append([4, 6], 2, int8=True, change=change))


def test_append_does_not_write_to_pages_that_do_not_exist():
    cache = torch.zeros(3, 4, 1, 8)
    new = torch.ones(2, 1, 1, 8)
    table = torch.tensor([[1], [-1]], dtype=INT32)
    lengths = torch.tensor([2, 2], dtype=INT32)
    # The check on CPU would refuse; a GPU is not asked.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_check_lengths", lambda *args: None)
        launchers.append(new, new, new, cache, cache.clone(), lengths, table, None, None, None, None, False)
    assert cache[1, 1].eq(1).all() and cache.sum() == 8


def test_programs_fill_whole_waves():
    assert launchers._programs(264, 8, 10**6) == 33
    assert launchers._programs(264, 8, 5) == 5  # no more than there are blocks
    for slots in (4, 84, 216, 264):
        for heads in range(1, 300):
            programs = launchers._programs(slots, heads, 10**6)
            waves = heads * programs / slots
            assert waves <= 4 or programs == 1
            assert waves / -(-waves // 1) >= (0.9 if 4 * heads <= slots else 0.5)


@pytest.mark.parametrize("wide", [False, True], ids=["16 bits", "32 bits"])
@pytest.mark.parametrize("pack", [1, 2])
def test_tiles_fit_and_keep_enough_bytes_in_flight(wide, pack):
    for size in (8, 40, 64, 72, 80, 96, 128, 192, 256):
        element = 2 if pack == 2 else 4 if wide else 2
        for rows in (1, 16, 17, 64, 500):
            tiles = launchers._tiles(size // pack, size // pack, element, pack, rows, wide)
            key = (tiles.d + tiles.rest + tiles.dv) * element
            held = (tiles.stages - 1) * tiles.keys * key
            assert tiles.d + tiles.rest >= size // pack and tiles.dv >= size // pack
            assert held <= 81920  # with the queries and exchanges below the 99 KB that sm_86 has
            if size >= 64 and not wide:
                assert tiles.resident * (held - tiles.keys * key) >= 25000
