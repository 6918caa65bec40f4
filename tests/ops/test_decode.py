"""Decode attention and the append on CPU by arguments drawn at random: what the samples do not reach."""

from __future__ import annotations

import pytest
import torch
from decode_calls import append_twice, check_decoded, decode_arguments, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigkernels import functional
from bigkernels._load import cpu_library
from bigkernels.ops import decode_attention as op

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MANY = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.skipif(cpu_library().reason is not None, reason="the CPU library is not built")


@st.composite
def decode_cases(draw):
    queries = draw(st.integers(1, 16))
    lengths = draw(st.lists(st.one_of(st.just(0), st.integers(queries, 700)), min_size=1, max_size=5))
    groups = draw(st.integers(1, 4))
    int8 = draw(st.booleans())
    return {
        "lengths": lengths,
        "queries": queries,
        "heads": groups * draw(st.sampled_from([1, 2, 3, 7, 8])),
        "groups": groups,
        "size": draw(st.sampled_from([1, 8, 20, 33, 64, 80, 128, 192])),
        "value_size": draw(st.sampled_from([None, 1, 16, 40, 128])),
        "page": draw(st.sampled_from([0, 1, 5, 16, 64, 100])),
        "int8": int8,
        "left": draw(st.sampled_from([-1, -1, 0, 3, 150])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 20.0])),
        "alibi": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "dtype": DTYPES[draw(st.sampled_from(list(DTYPES)))],
        "capacity": max(lengths) + draw(st.integers(0, 40)) or 1,
    }


@given(decode_cases(), st.integers(0, 2**31), st.sampled_from([1, 2, 5]))
@MANY
def test_any_cache(case, seed, threads):
    torch.manual_seed(seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        args = decode_arguments(**case)
        check_decoded(torch.ops.bigkernels.decode_attention(*args), args)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value_size", [12, 24, 40, 72, 100])
def test_values_between_whole_vectors(value_size, dtype):
    args = decode_arguments([50, 7], 1, 4, 2, 24, value_size, dtype=dtype)
    check_decoded(torch.ops.bigkernels.decode_attention(*args), args)


@pytest.mark.parametrize("heads, queries", [(1, 300), (3, 131), (8, 40)])
def test_more_rows_than_one_pass_over_the_keys_takes(heads, queries):
    args = decode_arguments([queries + 9, queries], queries, heads, 1, 16)
    check_decoded(torch.ops.bigkernels.decode_attention(*args), args)


@st.composite
def append_cases(draw):
    new = draw(st.integers(1, 16))
    size = draw(st.sampled_from([2, 8, 24, 33, 64, 80, 128]))
    return {
        "lengths": draw(st.lists(st.one_of(st.just(0), st.integers(new, 60)), min_size=1, max_size=5)),
        "new": new,
        "page": draw(st.sampled_from([0, 1, 5, 16])),
        "int8": draw(st.booleans()),
        "rotary": 2 * draw(st.integers(0, size // 2)),
        "interleaved": draw(st.booleans()),
        "size": size,
        "value_size": draw(st.sampled_from([1, 20, 64, 129])),
        "dtype": DTYPES[draw(st.sampled_from(list(DTYPES)))],
    }


@given(append_cases(), st.integers(0, 2**31))
@MANY
def test_append_writes_what_the_reference_writes(case, seed):
    torch.manual_seed(seed)
    same(*append_twice(torch.ops.bigkernels.append_kv_, **case), rotated=case["rotary"] > 0)


def test_append_quantizes_zeros_and_infinities():
    def change(k, v):
        k[0, 0] = 0.0
        v[0, 1, 0, 3] = float("nan")
        v[1, 2, 1, 5] = -float("inf")
        k[1, 1, 0] = torch.arange(24.0) * 0.5 - 6.0  # quotients that are halves
        k[1, 1, 0, 0] = 63.5
        k[1, 2, 0] = torch.arange(24.0) * 1e-45  # the scale is one subnormal step
        v[1, 0, 0] = torch.arange(20.0) * 1.7e37

    same(*append_twice(torch.ops.bigkernels.append_kv_, [4, 6], 2, int8=True, change=change))


def test_append_to_caches_of_any_strides():
    for axis in range(4):
        k = torch.randn(2, 3, 3, 8)
        caches = [
            torch.zeros(2, 16, 3, 8).repeat_interleave(2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]
            for _ in range(2)
        ]
        assert not caches[0].is_contiguous()
        lengths = torch.tensor([3, 11], dtype=torch.int32)
        functional.append_kv_(k.transpose(1, 2), *caches, lengths, k.transpose(1, 2), k.transpose(1, 2))
        for cache in caches:
            assert torch.equal(cache[0, :3], k[0]) and torch.equal(cache[1, 8:11], k[1])
            assert cache.count_nonzero() == k.count_nonzero()


def test_append_leaves_a_lazy_copy_alone():
    cache = torch.zeros(1, 8, 1, 4)
    copy = torch._lazy_clone(cache)
    new = torch.ones(1, 1, 1, 4)
    functional.append_kv_(new, cache, torch.zeros_like(cache), torch.tensor([1], dtype=torch.int32), new, new)
    assert cache.sum() == 4 and copy.sum() == 0


def test_append_counts_as_a_write():
    cache, new = torch.zeros(1, 8, 1, 4), torch.ones(1, 1, 1, 4)
    before = cache._version
    functional.append_kv_(new, cache, torch.zeros_like(cache), torch.tensor([1], dtype=torch.int32), new, new)
    assert cache._version > before


def test_append_rotates_heads_beyond_the_kernel():
    size = 2 * 1024 + 2
    q = torch.randn(1, 1, 1, size)
    cos, sin = torch.randn(2, 1, 1, size)
    cache = torch.zeros(1, 2, 1, size)
    lengths = torch.tensor([1], dtype=torch.int32)
    rotated = functional.append_kv_(q, cache, torch.zeros_like(cache), lengths, q, q, cos=cos, sin=sin)
    assert torch.equal(rotated[0, 0, 0], cache[0, 0, 0])
    functional.decode_attention(q, cache, torch.zeros_like(cache), lengths, k=q, v=q, cos=cos, sin=sin)
    assert torch.equal(rotated[0, 0, 0], cache[0, 0, 0])


def test_append_does_not_pass_over_the_cache(monkeypatch):
    monkeypatch.setattr(op, "_written", None)  # what the reference does
    cache, new = torch.zeros(1, 1000, 8, 64), torch.randn(1, 8, 1, 64)
    functional.append_kv_(new, cache, torch.zeros_like(cache), torch.tensor([900]), new, new)
    assert torch.equal(cache[0, 899], new[0, :, 0]) and cache.count_nonzero() == new.count_nonzero()
