"""Attention on CPU beyond its samples: features in pairs, odd sizes, dropout, packing, and what is combined with it."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigkernels
import bigkernels.functional as B
from bigkernels._compare import compare
from bigkernels.ops._dropout import keep_mask

EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.usefixtures("library")


def tensors(batch=1, heads=2, groups=1, queries=7, keys=None, size=16, value_size=None, dtype=torch.float32):
    keys = queries if keys is None else keys
    return {
        "q": torch.randn(batch, queries, heads, size).to(dtype).transpose(1, 2),
        "k": torch.randn(batch, keys, groups, size).to(dtype).transpose(1, 2),
        "v": torch.randn(batch, keys, groups, value_size or size).to(dtype).transpose(1, 2),
    }


def agree(
    call, given: dict[str, Tensor], grads: tuple[str, ...] = ("q", "k", "v"), roundings: float = 8.0, scale: float = 0.0
) -> None:
    """Outputs and gradients of the kernel against float64, by the package's criterion.

    `scale`: of the terms that cancel in a gradient; their rounding in float32 is allowed whatever the gradient is.
    """

    def run(values, backend):
        leaves = {n: t.detach().requires_grad_(n in grads) for n, t in values.items()}
        torch.manual_seed(5)
        with bigkernels.use(backend):
            outputs = call(**leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.manual_seed(1)
            upstream = [torch.randint(-8, 9, o.shape).to(o.dtype) / 8 for o in outputs]
            found = torch.autograd.grad(outputs, [leaves[n] for n in grads], upstream)
        return [*(o.detach() for o in outputs), *found]

    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    names = [*(f"out{i}" for i in range(2)), *grads]
    results = zip(run(given, "cpu"), run(given, "reference"), run(wide, "reference"), strict=True)
    for name, (ours, plain, exact) in zip(names[-len(grads) - 1 :], results, strict=False):
        result = compare(ours, plain, exact, roundings=roundings, scale="tensor")
        assert result.problem is None and result.error <= result.bound + 8 * EPS * scale, f"{name}: {result}"


def _mask(queries: int, keys: int) -> Tensor:
    mask = torch.rand(queries, keys) > 0.3
    mask[queries // 2] = False
    return mask


def tensors_of(options: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Takes the tensors out of the options; those with gradients in the dtype of q, which sets what they may lose."""
    taken = {n: options.pop(n) for n in list(options) if isinstance(options[n], Tensor)}
    return {n: t.to(dtype) if n in ("bias", "sinks") else t for n, t in taken.items()}


# What a feature adds to the arguments of a call with 2 batches and 4 heads.
FEATURES = {
    "causal": lambda q, k: {"causal": True},
    "window": lambda q, k: {"window": (max(k // 3, 1), k // 4)},
    "softcap": lambda q, k: {"softcap": 1.5},
    "bias": lambda q, k: {"bias": torch.randn(1, 4, q, k)},
    "mask": lambda q, k: {"mask": _mask(q, k)},
    "alibi": lambda q, k: {"alibi_slopes": torch.rand(4)},
    "sinks": lambda q, k: {"sinks": torch.randn(4)},
    "prefix": lambda q, k: {"prefix_lengths": torch.tensor([k // 2, 0])},
    "dropout": lambda q, k: {"dropout_p": 0.25},
    "lse": lambda q, k: {"return_lse": True},
    "scale": lambda q, k: {"scale": 0.07},
    "negative scale": lambda q, k: {"scale": -0.2},
}


@pytest.mark.parametrize("first, second", list(itertools.combinations(FEATURES, 2)), ids=str)
def test_features_in_pairs(first: str, second: str):
    options = {}
    for name in (first, second):
        options |= FEATURES[name](39, 70)
    given = tensors(2, 4, 2, 39, 70, 24, dtype=torch.bfloat16)
    moved = tensors_of(options, given["q"].dtype)
    grads = ("q", "k", "v", *(n for n in ("bias", "sinks") if n in moved))
    agree(lambda **t: B.attention(**t, **options), given | moved, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries, keys", itertools.product((1, 7, 113, 1023), repeat=2))
def test_odd_lengths(queries: int, keys: int, dtype: torch.dtype):
    agree(
        lambda **t: B.attention(**t, causal=True),
        tensors(1, 2, 1, queries, keys, 40, dtype=dtype),
        scale=2.0 * (keys == 1),
    )


@pytest.mark.parametrize("feature", FEATURES)
def test_features_with_odd_lengths(feature: str):
    options = FEATURES[feature](113, 1023)
    given = tensors(2, 4, 2, 113, 1023, 72, 40, torch.bfloat16)
    moved = tensors_of(options, given["q"].dtype)
    grads = ("q", "k", "v", *(n for n in ("bias", "sinks") if n in moved))
    agree(lambda **t: B.attention(**t, **options), given | moved, grads)


@pytest.mark.parametrize("size", range(8, 257, 8))
def test_every_head_size(size: int):
    agree(lambda **t: B.attention(**t, causal=True), tensors(1, 2, 1, 37, 37, size, dtype=torch.bfloat16))


def test_heads_of_latent_attention():
    given = tensors(1, 4, 1, 30, 45, 576, 512, torch.bfloat16)
    agree(lambda **t: B.attention(**t, causal=True), given)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 90),
    st.integers(0, 90),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sets(st.sampled_from(list(FEATURES)), max_size=4),
    st.sampled_from(["contiguous", "heads inside", "strided"]),
    st.integers(0, 1 << 16),
)
def test_fuzz(batch, groups, group_size, queries, keys, size, dtype, features, layout, seed):
    torch.manual_seed(seed)
    heads = groups * group_size
    given = tensors(batch, heads, groups, queries, keys, size, dtype=dtype)
    if layout == "contiguous":
        given = {n: t.contiguous() for n, t in given.items()}
    elif layout == "strided":
        given = {n: torch.stack((t, torch.full_like(t, float("nan"))), -1)[..., 0] for n, t in given.items()}
    options = {}
    for name in sorted(features):
        options |= FEATURES[name](queries, keys) if queries and keys else {}
    for name, shape in (("bias", (1, heads, queries, keys)), ("alibi_slopes", (heads,)), ("sinks", (heads,))):
        if name in options:
            options[name] = torch.randn(shape)
    if "prefix_lengths" in options:
        options["prefix_lengths"] = torch.randint(0, keys + 3, (batch,))
    moved = tensors_of(options, given["q"].dtype)
    grads = ("q", "k", "v", *(n for n in ("bias", "sinks") if n in moved))
    scale = {"scale": 0.3} if "scale" not in options else {}
    agree(lambda **t: B.attention(**t, **options, **scale), given | moved, grads, roundings=16)


@pytest.mark.parametrize("left, right", [(0, 0), (5, -1), (-1, 5), (30, 40), (300, 0), (0, 300), (700, 700)])
@pytest.mark.parametrize("queries, keys", [(700, 700), (40, 700), (700, 40)])
def test_windows_of_every_width(queries: int, keys: int, left: int, right: int):
    agree(lambda **t: B.attention(**t, window=(left, right)), tensors(1, 2, 1, queries, keys, 16), scale=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_with_holes(dtype: torch.dtype):
    """Blocks of rows between two that see a block of keys, and do not see it themselves."""
    mask = torch.zeros(224, 224, dtype=torch.bool)
    for row, keys in enumerate(([0], [3, 4], [0, 4], [5], [1, 6], [2], [0, 6])):
        for key in keys:
            mask[32 * row : 32 * row + 32, 32 * key : 32 * key + 32] = True
    agree(lambda **t: B.attention(**t, mask=mask), tensors(1, 1, 1, 224, dtype=dtype), scale=2.0)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_is_decided_by_torchs_seed():
    given = tensors(2, 4, 2, 50)
    torch.manual_seed(3)
    first, second = (B.attention(**given, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(3)
    again = B.attention(**given, dropout_p=0.3)
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("left", [5, 100])
def test_dropout_within_a_window(left: int):
    """Rows whose first keys lie deep in a strip of keys: their random words do too."""
    call = functools.partial(B.attention, window=(left, 0), dropout_p=0.3)
    agree(call, tensors(1, 2, 1, 500), scale=2.0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p: float):
    """Of constant values each output is the sum of the kept weights over (1 - p): 1 on average."""
    given = tensors(1, 8, 8, 64, 512, 16)
    given["v"] = torch.ones_like(given["v"])
    out = B.attention(**given, dropout_p=p)
    deviation = (p / (1 - p)) ** 0.5 * 4 / (64 * 8 * 100) ** 0.5  # four sigma; about 100 keys share a row's weight
    assert abs(out[..., 0].mean().item() - 1) < deviation
    kept = keep_mask(torch.tensor([11]), torch.arange(1), 8, 64, 512, p).double().mean().item()
    assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / (8 * 64 * 512)) ** 0.5


def test_checkpointing_replays_the_dropout():
    given = {n: t.detach().requires_grad_() for n, t in tensors(2, 4, 2, 50).items()}

    def call(q, k, v):
        return B.attention(q, k, v, causal=True, dropout_p=0.4)

    torch.manual_seed(0)
    plain = torch.autograd.grad(call(**given).square().sum(), list(given.values()))
    torch.manual_seed(0)
    out = torch.utils.checkpoint.checkpoint(call, *given.values(), use_reentrant=False)
    for a, b in zip(plain, torch.autograd.grad(out.square().sum(), list(given.values())), strict=True):
        assert torch.equal(a, b)


# ---- packed sequences ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=7), st.booleans(), st.integers(0, 1 << 16))
def test_packed_equals_a_call_a_sequence(lengths, causal, seed):
    torch.manual_seed(seed)
    starts = [torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).int() for i in (0, 1)]
    q = torch.randn(int(starts[0][-1]), 4, 24, requires_grad=True)
    k, v = (torch.randn(int(starts[1][-1]), 2, 24, requires_grad=True) for _ in range(2))
    longest = [max((pair[i] for pair in lengths), default=0) for i in (0, 1)]
    out = B.varlen_attention(q, k, v, *starts, *longest, causal=causal)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    for n in range(len(lengths)):
        (a, b), (c, d) = (starts[i][n : n + 2].tolist() for i in (0, 1))
        one = [t[i:j].detach().transpose(0, 1)[None].requires_grad_() for t, i, j in ((q, a, b), (k, c, d), (v, c, d))]
        alone = B.attention(*one, causal=causal)
        torch.testing.assert_close(out[a:b], alone[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(alone, one, upstream[a:b].transpose(0, 1)[None])
        for grad, (i, j), other in zip(grads, ((a, b), (c, d), (c, d)), found, strict=True):
            torch.testing.assert_close(grad[i:j], other[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


# ---- what holds for every call ---------------------------------------------------------------------------------------


def test_rows_that_see_nothing_give_zeros_and_get_no_gradient():
    given = {n: t.detach().requires_grad_() for n, t in tensors(1, 2, 2, 40, 50).items()}
    mask = torch.ones(40, 50, dtype=torch.bool)
    mask[7] = mask[33] = False
    out, lse = B.attention(**given, mask=mask, return_lse=True)
    assert not out[:, :, [7, 33]].any() and (lse[:, :, [7, 33]] == -float("inf")).all()
    grads = torch.autograd.grad(out.sum(), list(given.values()))
    assert not grads[0][:, :, [7, 33]].any() and all(g.isfinite().all() for g in grads)


def test_an_additive_bias_of_minus_infinity_hides_and_of_the_least_number_does_not():
    given = tensors(1, 2, 2, 40, 50)
    hidden = torch.zeros(40, 50).masked_fill(torch.rand(40, 50) < 0.4, float("-inf"))
    torch.testing.assert_close(B.attention(**given, bias=hidden), B.attention(**given, mask=hidden == 0))
    least = torch.full((40, 50), torch.finfo(torch.float32).min)  # as models fill masks: a row of them is uniform
    uniform = given["v"].mean(2, keepdim=True).expand(-1, -1, 40, -1)
    torch.testing.assert_close(B.attention(**given, bias=least), uniform)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_reaches_the_rows_that_see_it_alone(dtype: torch.dtype):
    given = tensors(1, 2, 2, 100, dtype=dtype)
    given["k"][0, 1, 60] = float("nan")
    out = B.attention(**given, causal=True)
    assert out[0, 1, 60:].isnan().all() and not out[0, 1, :60].isnan().any() and not out[0, 0].isnan().any()


def test_scores_far_apart_between_blocks():
    """The largest score of a row comes last, by far: what was summed before has to vanish, not to overflow."""
    given = tensors(1, 1, 1, 33, 900, 8)
    given["q"], given["k"] = torch.ones_like(given["q"]), torch.zeros_like(given["k"])
    given["k"][..., 700:, :] = 200.0
    agree(lambda **t: B.attention(**t, scale=1.0), given, scale=200.0)


def test_what_other_calls_left_in_the_workspaces_is_not_read():
    torch.manual_seed(0)
    given = {n: t.detach().requires_grad_() for n, t in tensors(2, 4, 2, 45, 77, 40).items()}
    options = {"softcap": 2.0, "dropout_p": 0.2, "causal": True, "bias": torch.randn(4, 45, 77, requires_grad=True)}

    def run():
        torch.manual_seed(1)
        out = B.attention(**given, **options)
        return [out, *torch.autograd.grad(out.sum(), [*given.values(), options["bias"]])]

    before = run()
    bad = [torch.full((2, 4, 600, 64), float("nan"), requires_grad=True) for _ in range(3)]
    torch.autograd.grad(B.attention(*bad, bias=torch.zeros(600, 600)).sum(), bad)
    assert all(map(torch.equal, before, run()))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_whatever_the_machine_does(threads: int):
    """Fewer units than threads: the keys are cut and the parts are added in one order."""
    given = {n: t.detach().requires_grad_() for n, t in tensors(1, 3, 1, 700, size=64, dtype=torch.bfloat16).items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(4):
            out = B.attention(**given, causal=True)
            runs.append([out, *torch.autograd.grad(out.float().square().sum(), list(given.values()))])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_inputs_are_not_written_and_views_are_respected():
    base = torch.randn(2, 60, 3, 4, 32)
    kept = base.clone()
    q, k, v = (t.transpose(1, 2) for t in base.unbind(2))
    out = B.attention(q, k, v, causal=True)
    assert torch.equal(base, kept) and out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()  # heads lie inside of tokens, as in q
    agree(lambda **t: B.attention(**t, causal=True), {"q": q, "k": k, "v": v})


def test_expanded_keys_and_upstream_gradients():
    q = torch.randn(3, 4, 20, 16, requires_grad=True)
    k, v = (torch.randn(1, 2, 20, 16).expand(3, 2, 20, 16) for _ in range(2))
    out = B.attention(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), q)  # the gradient of a sum is one value, expanded
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), q)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.2}], ids=str)
def test_equals_scaled_dot_product_attention(options):
    given = tensors(2, 8, 8, 130, 130, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        **dict(zip(("query", "key", "value"), given.values(), strict=True)),
        is_causal=options.get("causal", False),
        scale=options.get("scale"),
    )
    torch.testing.assert_close(B.attention(**given, **options), expected)


def test_autocast_lowers_the_products():
    given = {n: t.detach().requires_grad_() for n, t in tensors(1, 4, 2, 40).items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = B.attention(**given, causal=True)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), list(given.values()))
    assert all(g.dtype == torch.float32 for g in grads)
    exact = B.attention(**{n: t.detach().bfloat16() for n, t in given.items()}, causal=True)
    assert torch.equal(out, exact)


def test_selective_checkpointing_keeps_the_output():
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    calls = []

    def policy(ctx, op, *args, **kwargs):
        if op is torch.ops.bigkernels.attention_fwd.default:
            calls.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    given = [t.detach().requires_grad_() for t in tensors(1, 4, 2, 40).values()]
    out = checkpoint(
        lambda *t: B.attention(*t, causal=True),
        *given,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    found = torch.autograd.grad(out.sum(), given)
    assert calls[0] is False
    expected = torch.autograd.grad(B.attention(*given, causal=True).sum(), given)
    assert all(map(torch.equal, found, expected))


def test_memory_does_not_grow_with_the_square_of_the_length():
    """Scores of 8192 x 8192 would take 128 MB a head in bfloat16."""
    from bigkernels.bench.memory import extra_peak

    q, k, v = (torch.randn(1, 2, 8192, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    size = q.numel() * 2
    used = extra_peak(lambda: torch.autograd.grad(B.attention(q, k, v, causal=True).sum(), (q, k, v)), "cpu")
    assert used < 16 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [33, 300])
def test_gradients_of_sinks_do_not_see_the_rounding_of_the_outputs(dtype, keys, library):
    """They sum one number a row; from rounded outputs they were several times as far off as PyTorch's."""
    q, k, v = (torch.randn(2, 4, keys, 24).to(dtype) for _ in range(3))
    sinks, up, up_lse = torch.randn(4), torch.randn(2, 4, keys, 24).to(dtype), torch.randn(2, 4, keys)

    def gradient(*tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out, lse = B.attention(*leaves[:3], sinks=leaves[3], causal=True, return_lse=True)
        return torch.autograd.grad((out, lse), leaves[3], (up.to(out.dtype), up_lse.to(lse.dtype)))[0]

    exact = gradient(q.double(), k.double(), v.double(), sinks.double())
    torch.testing.assert_close(gradient(q, k, v, sinks).double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item())


def test_the_score_of_the_only_key_has_no_gradient(library):
    q, k, v = (torch.randn(2, 4, n, 16, requires_grad=True) for n in (5, 1, 1))
    bias = torch.randn(1, 4, 5, 1, requires_grad=True)
    for options in ({}, {"softcap": 3.0}, {"dropout_p": 0.5}):
        out = B.attention(q, k, v, bias=bias, **options)
        dq, dk, dv, dbias = torch.autograd.grad(out, (q, k, v, bias), torch.randn_like(out))
        assert not dq.any() and not dk.any() and not dbias.any() and dv.any()
    sinks = torch.zeros(4)
    dq, dk = torch.autograd.grad(B.attention(q, k, v, sinks=sinks), (q, k), torch.randn_like(out))
    assert dq.any() and dk.any()
