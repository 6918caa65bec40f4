"""The attention module and its cache against attention written out in plain PyTorch."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigkernels._compare import compare_all
from bigkernels.nn import Attention, KVCache, RMSNorm, RotaryEmbedding
from bigkernels.nn.attention import alibi_slopes

DIM = 48


def plain(m: Attention, x, *, positions=None, mask=None, bias=None):
    """What the module documents, for x (B, S, dim) in any dtype, one line a step and all scores held."""
    batch, length, _ = x.shape
    at = torch.arange(length)

    def heads(projection):
        return projection(x).view(batch, length, -1, m.head_dim).transpose(1, 2)

    def norm(t, weight):
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    def rotate(t):
        size, rate = m.rope.rotary_dim, m.rope.theta ** -(torch.arange(0, m.rope.rotary_dim, 2) / m.rope.rotary_dim)
        angle = ((at if positions is None else positions).float()[..., None] * rate).to(torch.float32)
        angle = angle.expand(batch, length, -1)[:, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        if m.rope.interleaved:
            a, b = t[..., 0:size:2], t[..., 1:size:2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = t[..., : size // 2], t[..., size // 2 : size]
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned, t[..., size:]), -1)

    q, k, v = heads(m.q_proj), heads(m.k_proj), heads(m.v_proj)
    if m.q_norm is not None:
        q, k = norm(q, m.q_norm.weight), norm(k, m.k_norm.weight)
    if m.rope is not None:
        q, k = rotate(q), rotate(k)
    k, v = (t.repeat_interleave(m.num_heads // m.num_kv_heads, 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (m.head_dim**-0.5 if m.scale is None else m.scale)
    if m.softcap:
        scores = m.softcap * torch.tanh(scores / m.softcap)
    if bias is not None:
        scores = scores + bias
    ahead = at - at[:, None]
    if m.alibi_slopes is not None:
        slopes = torch.tensor(alibi_slopes(m.num_heads), dtype=x.dtype)
        scores = scores - slopes[:, None, None] * ahead.abs()
    left, right = m.window or (-1, -1)
    hidden = torch.zeros(length, length, dtype=torch.bool)
    if m.causal:
        hidden |= ahead > 0
    if left >= 0:
        hidden |= ahead < -left
    if right >= 0:
        hidden |= ahead > right
    scores = scores.masked_fill(hidden if mask is None else hidden | ~mask, float("-inf"))
    if m.sinks is not None:
        scores = torch.cat((scores, m.sinks[:, None, None].expand(batch, -1, length, 1)), -1)
    weights = scores.softmax(-1)[..., :length]
    return m.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, -1))


def filled(module: nn.Module) -> nn.Module:
    """The module with values in all of its parameters that are ones or zeros at first."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.5)
    return module


def results(call, module, inputs):
    """The output and the gradients of the parameters and of what requires one among the inputs."""
    wanted = dict(module.named_parameters()) | {n: t for n, t in inputs.items() if t.is_floating_point()}
    for t in wanted.values():
        t.requires_grad_()
    out = call(**inputs)
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, list(wanted.values()), torch.randn(out.shape).to(out.dtype))
    return {"out": out.detach()} | {f"grad {name}": g for name, g in zip(wanted, grads, strict=True)}


def wide(inputs):
    return {n: t.detach().double() if t.is_floating_point() else t for n, t in inputs.items()}


def assert_matches(module: Attention, **inputs):
    """Ours in float32 against plain PyTorch in float64, by the package's criterion."""
    other = copy.deepcopy(module).double()
    exact = results(lambda **i: plain(other, **i), other, wide(inputs))
    reference = results(lambda **i: plain(module, **i), module, inputs)
    compared = compare_all(results(module, module, inputs), reference, exact, roundings=4, scale="tensor")
    assert {name: str(c) for name, c in compared.items() if not c.ok} == {}


# Odd sizes: 7 heads are no power of two, 37 tokens fill no block. Biases go with RoPE: without, that of the keys shifts
# all scores of a query alike, and its gradient is zero but for rounding.
OPTIONS = {
    "plain": {},
    "not causal": {"causal": False},
    "grouped": {"num_heads": 6, "num_kv_heads": 2},
    "one key head": {"num_heads": 6, "num_kv_heads": 1},
    "one head": {"num_heads": 1},
    "head size": {"num_heads": 3, "head_dim": 10},
    "prime heads": {"num_heads": 7, "num_kv_heads": 7, "head_dim": 8, "alibi": True},
    "biases": {"bias": True, "rope": 1e4},
    "output bias": {"out_bias": True},
    "no output bias": {"bias": True, "out_bias": False, "rope": 1e4},
    "rope": {"rope": 10_000.0},
    "rope, theta": {"rope": 500, "num_kv_heads": 2},
    "rope, part of a head": {"rope": RotaryEmbedding(6), "num_kv_heads": 2},
    "rope, interleaved": {"rope": RotaryEmbedding(8, interleaved=True)},
    "window": {"window": (5, -1)},
    "window both ways": {"window": (5, 3), "causal": False},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "qk_norm": {"qk_norm": True, "rope": 1e4},
    "alibi": {"alibi": True},
    "scale": {"scale": 0.7},
    "everything": {
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 12,
        "bias": True,
        "rope": 1e3,
        "window": (9, 0),
        "softcap": 2.0,
        "sinks": True,
        "qk_norm": True,
        "alibi": True,
        "scale": 0.5,
    },
}


def make(name: str, **more) -> Attention:
    return filled(Attention(DIM, **{"num_heads": 4} | OPTIONS[name] | more))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_against_plain_pytorch(name):
    assert_matches(make(name), x=torch.randn(2, 37, DIM))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 113), (2, 257)], ids=str)
def test_odd_sizes(shape):
    assert_matches(make("everything"), x=torch.randn(*shape, DIM))


def test_empty_inputs():
    for shape in ((0, 5), (2, 0)):
        x = torch.randn(*shape, DIM, requires_grad=True)
        out = make("everything")(x)
        assert out.shape == x.shape
        out.sum().backward()
        assert x.grad.shape == x.shape
    module = make("everything")
    cache = module.make_cache(2, 30)
    with torch.no_grad():
        for length in (0, 5, 0):
            assert module(torch.randn(2, length, DIM), cache=cache).shape == (2, length, DIM)
    assert cache.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("name", ["rope", "rope, interleaved", "everything"])
def test_positions(name):
    module, x = make(name), torch.randn(2, 9, DIM)
    assert_matches(module, x=x, positions=torch.randint(2000, (2, 9)))
    assert_matches(module, x=x, positions=torch.randint(2000, (9,)))
    positions = torch.arange(9) + 3
    assert torch.equal(module(x, positions=positions), module(x, angles=module.rope.angles(positions)))
    assert not torch.equal(module(x, positions=2 * positions), module(x))


def test_mask_and_bias():
    module, x = make("grouped"), torch.randn(2, 19, DIM)
    mask = torch.rand(2, 1, 19, 19) > 0.3
    mask[..., 0] = True  # with nothing to see, plain PyTorch gives NaN
    assert_matches(module, x=x, mask=mask)
    assert_matches(module, x=x, bias=torch.randn(2, 6, 19, 19))
    assert_matches(module, x=x, bias=torch.randn(1, 6, 1, 19))
    assert_matches(module, x=x, bias=torch.randn(6, 19, 19), mask=mask[0, 0])
    nothing = module(x, mask=torch.zeros(19, 19, dtype=torch.bool))
    torch.testing.assert_close(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("name", ["plain", "rope", "everything", "not causal"])
def test_packed_sequences_do_not_see_each_other(name):
    module, lengths = make(name), [5, 0, 17, 1, 30]
    x = torch.randn(sum(lengths), DIM)
    for dtype, most in ((torch.int32, None), (torch.int64, 30)):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
        ours = results(lambda x, cu=cu_seqlens, n=most: module(x, cu_seqlens=cu, max_seqlen=n), module, {"x": x})
        other = copy.deepcopy(module).double()

        def one_by_one(x, m):
            return torch.cat([plain(m, part[None])[0] for part in x.split(lengths) if len(part)])

        exact = results(lambda x, m=other: one_by_one(x, m), other, wide({"x": x}))
        reference = results(lambda x: one_by_one(x, module), module, {"x": x})
        compared = compare_all(ours, reference, exact, roundings=4, scale="tensor")
        assert {n: str(c) for n, c in compared.items() if not c.ok} == {}


def test_packed_positions_count_in_each_sequence():
    module, x = make("rope"), torch.randn(9, DIM)
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    expected = module(x, cu_seqlens=cu_seqlens, positions=positions)
    assert torch.equal(module(x, cu_seqlens=cu_seqlens), expected)
    # A shift of a whole sequence changes no distance.
    shifted = module(x, cu_seqlens=cu_seqlens, positions=positions + 7)
    torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training_alone():
    module, x = make("plain", dropout=0.5), torch.randn(2, 19, DIM)
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    assert not torch.equal(module(x), first)
    module.eval()
    torch.testing.assert_close(module(x), plain(module, x), rtol=1e-4, atol=1e-5)
    # On average a weight is what it was: the mean over many masks comes near.
    module.train()
    mean = torch.stack([module(x) for _ in range(200)]).mean(0)
    assert (mean - plain(module, x)).abs().max() < 0.5 * (first - plain(module, x)).abs().max()


# Module mechanics.


def test_names_and_shapes_are_those_of_checkpoints():
    module = Attention(DIM, 6, 2, head_dim=10, bias=True, qk_norm=True, sinks=True, rope=1e4, alibi=True)
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {
        "q_proj.weight": (60, DIM),
        "k_proj.weight": (20, DIM),
        "v_proj.weight": (20, DIM),
        "o_proj.weight": (DIM, 60),
        "q_proj.bias": (60,),
        "k_proj.bias": (20,),
        "v_proj.bias": (20,),
        "o_proj.bias": (DIM,),
        "q_norm.weight": (10,),
        "k_norm.weight": (10,),
        "sinks": (6,),
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_attention_of_hugging_face_models_loads_and_agrees(family):
    transformers = pytest.importorskip("transformers")
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    sizes = {
        "vocab_size": 11,
        "hidden_size": DIM,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = filled(getattr(transformers, f"{name}Model")(config)).eval()
    theirs = model.layers[0].self_attn
    ours = Attention(
        DIM, 4, 2, head_dim=12, bias=family == "qwen2", out_bias=False, qk_norm=family == "qwen3", rope=10_000.0
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 21, DIM)
    angles = model.rotary_emb(x, torch.arange(21)[None])
    expected = theirs(x, position_embeddings=angles, attention_mask=None)[0]
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x, angles=angles), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["everything", "biases"])
def test_state_dict_copies_and_pickles(name):
    module, x = make(name), torch.randn(2, 7, DIM)
    other = make(name)
    other.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    expected = module(x)
    for again in (other, copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert torch.equal(again(x), expected)


def test_device_and_dtype_arguments():
    options = OPTIONS["everything"] | {"bias": True}
    assert all(t.is_meta for t in Attention(DIM, **options, device="meta").state_dict().values())
    module = Attention(DIM, **options, dtype=torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in module.state_dict().values())
    assert module(torch.randn(1, 5, DIM).bfloat16()).dtype == torch.bfloat16


def test_casting_keeps_the_precision_of_angles_and_slopes():
    module = Attention(DIM, 6, rope=1e4, alibi=True)
    frequencies, slopes = module.rope.inverse_frequencies.clone(), module.alibi_slopes.clone()
    for cast in (module.bfloat16, module.double, module.half):
        cast()
        assert torch.equal(module.rope.inverse_frequencies, frequencies)
        assert torch.equal(module.alibi_slopes, slopes)
    assert module.to("meta").rope.inverse_frequencies.is_meta


def test_alibi_slopes_of_press_et_al():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert alibi_slopes(1) == [2.0**-8]


@pytest.mark.parametrize("name", ["grouped", "everything"])
def test_16_bits(name):
    module = make(name, dtype=torch.bfloat16)
    x = torch.randn(2, 33, DIM).bfloat16()
    other = copy.deepcopy(module).double()
    exact = results(lambda **i: plain(other, **i), other, wide({"x": x}))
    reference = results(lambda **i: plain(module, **i), module, {"x": x})
    compared = compare_all(results(module, module, {"x": x}), reference, exact, roundings=4, scale="tensor")
    assert {n: str(c) for n, c in compared.items() if not c.ok} == {}


def test_autocast():
    module, x = make("everything"), torch.randn(2, 21, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        packed = module(x.flatten(0, 1), cu_seqlens=torch.tensor([0, 21, 42]))
    assert out.dtype == packed.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(packed, out.flatten(0, 1), rtol=0.05, atol=0.05)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


def test_checkpointing():
    for name in ("everything", "plain"):
        module = make(name, dropout=0.3)
        x = torch.randn(2, 21, DIM)
        found = []
        for call in (module, lambda x, m=module: checkpoint(m, x, use_reentrant=False)):
            torch.manual_seed(5)
            found.append(results(call, module, {"x": x}))
        for key in found[0]:
            torch.testing.assert_close(found[1][key], found[0][key], rtol=0, atol=0)


def test_compiled_in_one_graph_for_any_length():
    torch._dynamo.reset()
    module = make("everything")
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for length in (19, 40):
        x = torch.randn(2, length, DIM)
        ours = results(compiled, module, {"x": x})
        for key, expected in results(module, module, {"x": x}).items():
            torch.testing.assert_close(ours[key], expected, rtol=1e-4, atol=1e-5)


def test_packed_compiled_in_one_graph():
    torch._dynamo.reset()
    module = make("everything")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 14], [30, 1]):
        x, cu_seqlens = torch.randn(sum(lengths), DIM), torch.tensor([0, *lengths]).cumsum(0)
        torch.testing.assert_close(
            compiled(x, cu_seqlens=cu_seqlens), module(x, cu_seqlens=cu_seqlens), rtol=1e-4, atol=1e-5
        )


def test_opaque_reprs_say_what_is_set():
    module = make("everything")
    assert "num_heads=6, num_kv_heads=3, head_dim=12" in repr(module)
    assert "window=(9, 0)" in repr(module)
    assert "dropout" not in repr(module)
    assert "3 heads of 12, page_size=16, int8" in repr(module.make_cache(2, 30, page_size=16, int8=True))


# Generation.

KINDS = {
    "contiguous": {},
    "pages": {"page_size": 16},
    "odd pages": {"page_size": 5},
    "int8": {"int8": True},
    "int8 pages": {"page_size": 7, "int8": True},
}
# Largest error of an 8-bit cache as a part of the largest value: half a step of 1 / 127 on keys and on values.
INT8 = 0.05


def near(found, expected, kind):
    if "int8" in KINDS[kind]:
        assert (found - expected).abs().max() < INT8 * expected.abs().max()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


CAUSAL = [name for name, options in OPTIONS.items() if options.get("causal", True)]
GENERATED = [(name, "contiguous") for name in CAUSAL]
GENERATED += [(name, kind) for name in ("rope", "grouped", "everything") for kind in KINDS if kind != "contiguous"]


@pytest.mark.parametrize(("name", "kind"), GENERATED)
@torch.no_grad()
def test_generation_with_a_cache_is_recomputation(name, kind):
    """Prompts of many tokens, later chunks of many and of few, single tokens: all as if computed at once."""
    module, x = make(name), torch.randn(3, 45, DIM)
    expected = module(x)
    for parts in ([45], [1] * 12 + [33], [20, 1, 1, 3, 20], [17, 16, 1, 11]):
        cache = module.make_cache(3, 47, **KINDS[kind])
        near(torch.cat([module(part, cache=cache) for part in x.split(parts, 1)], 1), expected, kind)
        assert cache.lengths.tolist() == [45] * 3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prompts_of_different_lengths(kind):
    module, lengths = make("everything"), [23, 5, 40]
    x = torch.randn(3, 60, DIM)
    cache = module.make_cache(3, 64, **KINDS[kind])
    prompts = 100 * torch.randn(3, 40, DIM)  # the padding must not matter
    for b, n in enumerate(lengths):
        prompts[b, :n] = x[b, :n]
    found = module(prompts, cache=cache)
    cache.truncate(lengths)
    expected = [module(x[b : b + 1]) for b in range(3)]
    for b, n in enumerate(lengths):
        near(found[b, :n], expected[b][0, :n], kind)
    for step, new in enumerate((1, 1, 18)):  # 18: many tokens at positions that differ
        done = sum((1, 1, 18)[:step])
        chunk = torch.stack([x[b, n + done : n + done + new] for b, n in enumerate(lengths)])
        found = module(chunk, cache=cache)
        for b, n in enumerate(lengths):
            near(found[b], expected[b][0, n + done : n + done + new], kind)
    assert cache.lengths.tolist() == [n + 20 for n in lengths]


@torch.no_grad()
def test_mask_and_bias_with_a_cache():
    module, x = make("rope"), torch.randn(2, 30, DIM)
    mask = torch.ones(2, 1, 30, 30, dtype=torch.bool)
    mask[1, ..., :4] = False  # padding before the second prompt
    bias = torch.randn(1, 4, 30, 30)
    expected = module(x, mask=mask, bias=bias)
    cache = module.make_cache(2, 32)
    for begin, end in ((0, 20), (20, 21), (21, 30)):
        seen, added = mask[..., begin:end, :end], bias[..., begin:end, :end]
        found = module(x[:, begin:end], cache=cache, mask=seen, bias=added)
        torch.testing.assert_close(found, expected[:, begin:end], rtol=1e-4, atol=1e-5)
    cache.truncate([3, 9])
    with pytest.raises(ValueError, match="mask and bias need sequences of one length"):
        module(x[:, :1], cache=cache, mask=mask[..., :1, :1])


@torch.no_grad()
def test_positions_may_differ_from_places_in_the_cache():
    module, x = make("rope"), torch.randn(1, 24, DIM)
    positions = torch.arange(24) * 3
    expected = module(x, positions=positions)
    cache = module.make_cache(1, 24)
    parts = [module(x[:, a:b], positions=positions[a:b], cache=cache) for a, b in ((0, 20), (20, 24))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_reset_and_truncate():
    module, x = make("rope"), torch.randn(2, 20, DIM)
    cache = module.make_cache(2, 20)
    expected = module(x)
    for _ in range(2):
        torch.testing.assert_close(module(x, cache=cache), expected, rtol=1e-4, atol=1e-5)
        cache.reset()
        assert cache.lengths.tolist() == [0, 0]
    module(x, cache=cache)
    cache.truncate(12)  # rejected tokens of a draft
    torch.testing.assert_close(module(x[:, 12:], cache=cache), expected[:, 12:], rtol=1e-4, atol=1e-5)
    cache.truncate(torch.tensor([4, 20], dtype=torch.int32))
    assert cache.lengths.tolist() == [4, 20]
    cache.truncate([0, 0])
    torch.testing.assert_close(module(x, cache=cache), expected, rtol=1e-4, atol=1e-5)
    for wrong in ([1], [21, 3], [-1, 3], 21):
        with pytest.raises(ValueError, match="cannot truncate sequences of"):
            cache.truncate(wrong)
    assert cache.lengths.tolist() == [20, 20]


@torch.no_grad()
def test_a_block_table_of_ones_own():
    """Pages in any order and shared between sequences: the same prompt is held once."""
    module, x = make("rope"), torch.randn(1, 16, DIM).repeat(2, 1, 1)
    tails = torch.randn(2, 3, DIM)
    expected = module(torch.cat((x, tails), 1))[:, 16:]
    table = torch.tensor([[6, 1, 2], [6, 1, 4]], dtype=torch.int32)
    cache = module.make_cache(2, 24, page_size=8, num_pages=7, block_table=table)
    module(x, cache=cache)
    torch.testing.assert_close(module(tails, cache=cache), expected, rtol=1e-4, atol=1e-5)
    assert cache.nbytes == 2 * 7 * 8 * 4 * 12 * 4 + 6 * 4 + 2 * 4


@torch.no_grad()
def test_memory_is_as_documented():
    tokens, heads, size, value_size = 2 * 30, 3, 16, 8
    for options, expected in (
        ({"dtype": torch.bfloat16}, tokens * heads * (size + value_size) * 2),
        ({"int8": True}, tokens * heads * (size + value_size + 2 * 4)),
    ):
        cache = KVCache(2, 30, heads, size, value_head_dim=value_size, **options)
        assert cache.nbytes == expected + 2 * 4
    k, v = torch.randn(2, heads, 5, size), torch.randn(2, heads, 5, value_size)
    assert cache.append(k, v) is None
    keys, values = cache.contents()
    for found, given in ((keys, k), (values, v)):
        assert found.shape == given.shape
        # Half a step of each head's largest value.
        assert ((found - given).abs() <= given.abs().amax(-1, keepdim=True) / 127 / 2 * 1.001).all()


@pytest.mark.parametrize(("kind", "backend"), [("contiguous", "inductor"), ("int8 pages", "aot_eager")])
@torch.no_grad()
def test_generation_compiled_in_one_graph(kind, backend):
    torch._dynamo.reset()
    module, x = make("everything"), torch.randn(2, 40, DIM)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    cache = module.make_cache(2, 40, **KINDS[kind])
    found = [compiled(part, cache=cache) for part in x.split([24, 1, 1, 1, 1, 1, 11], 1)]
    near(torch.cat(found, 1), module(x), kind)
    assert cache.lengths.tolist() == [40, 40]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    cache.truncate(29)
    for part in x[:, 29:].split(1, 1):
        compiled(part, cache=cache)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before  # steps share one graph


@torch.no_grad()
def test_cache_inside_autocast():
    module, x = make("everything"), torch.randn(2, 30, DIM)
    expected = module(x)
    for dtype in (torch.bfloat16, torch.float32):
        cache = module.make_cache(2, 30, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.cat([module(part, cache=cache) for part in x.split([20, 1, 9], 1)], 1)
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


# Errors.


def test_construction_names_what_does_not_fit():
    for options, message in (
        ({"num_heads": 5}, "hidden_size is 48, not a multiple of num_heads 5; give head_dim"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads is 4, not a multiple of num_kv_heads 3"),
        ({"num_heads": 0}, "heads is 0"),
        ({"num_heads": 4, "window": 5}, "nn.Attention: window is 5, expected"),
        ({"num_heads": 4, "softcap": -1.0}, "nn.Attention: softcap is -1.0"),
        ({"num_heads": 4, "dropout": 1.0}, "nn.Attention: dropout_p is 1.0"),
        ({"num_heads": 4, "rope": RotaryEmbedding(16)}, "rope rotates 16 elements of heads of 12"),
        ({"num_heads": 4, "head_dim": 9, "rope": 1e4}, "RotaryEmbedding: rotary_dim is 9, expected an even number"),
    ):
        with pytest.raises(ValueError, match=message):
            Attention(DIM, **options)


def test_calls_name_what_does_not_fit():
    module, x = make("rope", dropout=0.1), torch.randn(2, 5, DIM)
    flat, cu_seqlens = x.flatten(0, 1), torch.tensor([0, 5, 10])
    cache = module.make_cache(2, 8)
    for arguments, message in (
        (SimpleNamespace(x=flat), r"x has shape \(10, 48\), expected \(B, S, hidden_size\) with hidden_size 48"),
        (SimpleNamespace(x=x[..., :40]), r"x has shape \(2, 5, 40\)"),
        (SimpleNamespace(x=x, cu_seqlens=cu_seqlens), r"expected \(T, hidden_size\) with hidden_size 48"),
        (SimpleNamespace(x=flat, cu_seqlens=cu_seqlens, cache=cache), "take no mask, bias or cache"),
        (SimpleNamespace(x=flat, cu_seqlens=cu_seqlens, mask=x[..., :5] > 0), "take no mask, bias or cache"),
        (SimpleNamespace(x=x, max_seqlen=5), "max_seqlen is given without cu_seqlens"),
        (SimpleNamespace(x=x, cache=cache), "dropout does not go with a cache"),
        (SimpleNamespace(x=x, mask=torch.ones(5, 4, dtype=torch.bool)), "attention: mask has shape"),
        (SimpleNamespace(x=x, positions=torch.arange(4)), "rope: cos has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            module(**vars(arguments))
    with pytest.raises(ValueError, match="a cache needs causal=True"):
        make("not causal")(x, cache=cache)


def test_caches_name_what_does_not_fit():
    module, x = make("rope").eval(), torch.randn(2, 5, DIM)
    cache = module.make_cache(2, 8)
    with pytest.raises(RuntimeError, match="a cache records no gradients; call it under torch.no_grad"):
        module(x, cache=cache)
    assert cache.lengths.tolist() == [0, 0]
    with torch.no_grad():
        with pytest.raises(ValueError, match="k has a batch of 1 and the cache of 2"):
            module(x[:1], cache=cache)
        module(x, cache=cache)
        for length in (4, 20):
            with pytest.raises(ValueError, match=f"5 tokens and {length} more do not fit into 8"):
                module(torch.randn(2, length, DIM), cache=cache)
        assert cache.lengths.tolist() == [5, 5]
        with pytest.raises(ValueError, match="not a multiple|expected"):
            make("rope", num_kv_heads=2)(x[:, :2], cache=cache)
        with pytest.raises(TypeError, match="cache is float32"):
            make("rope", dtype=torch.bfloat16)(x[:, :2].bfloat16(), cache=cache)
        assert cache.lengths.tolist() == [5, 5]
    for options, message in (
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"page_size": 0}, "page_size is 0"),
        ({"num_pages": 3}, "num_pages and block_table need page_size"),
        ({"page_size": 4, "num_pages": 3}, "3 pages are fewer than 2 sequences of 2; give block_table"),
        ({"page_size": 4, "block_table": torch.zeros(2, 3, dtype=torch.int32)}, r"expected torch.int32 \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            KVCache(**{"batch": 2, "length": 8, "num_kv_heads": 2, "head_dim": 4} | options)


def test_layers_may_share_one_rope():
    rope = RotaryEmbedding(12)
    layers = nn.ModuleList(Attention(DIM, 4, rope=rope) for _ in range(3))
    assert len({id(layer.rope) for layer in layers}) == 1
    assert not any("rope" in name for name in layers.state_dict())
    assert isinstance(Attention(DIM, 4, qk_norm=True).q_norm, RMSNorm)


def test_scaled_dot_product_attention_agrees():
    module, x = make("grouped"), torch.randn(2, 17, DIM)
    q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(module(x), module.o_proj(out.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)
