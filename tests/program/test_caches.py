"""Caches that programs and modules write in turn, and that their users cut, copy, reorder and keep."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from decoders import (
    CACHE,
    MODELS,
    WINDOW,
    Pair,
    build,
    generate,
    given,
    prompt,
    runs,
    shared_pair,
    transformers,
    uses_modules,
    uses_program,
)
from torch import Tensor, nn

import bigkernels

TOKENS = prompt(2, 24, seed=8)


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return shared_pair(request.param)


def _steps(model: nn.Module, cache, sizes, tokens: Tensor = TOKENS, **options) -> tuple[Tensor, object]:
    """Logits of `tokens` fed in parts of these sizes."""
    made, begin = [], cache.get_seq_length() if cache is not None else 0
    with torch.no_grad():
        for size in sizes:
            ids = tokens[:, begin : begin + size]
            out = model(input_ids=ids, use_cache=True, **{CACHE: cache}, **options)
            begin, cache = begin + size, given(out)
            made.append(out.logits)
    return torch.cat(made, dim=1), cache


def _close(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * max(1.0, b.abs().max().item()))


def _cache(kind: str, model: nn.Module):
    if kind == "none":
        return None
    if kind == "dynamic":
        return transformers.DynamicCache()
    if kind == "of the configuration":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=30)


@pytest.mark.parametrize("kind", ["none", "dynamic", "of the configuration", "static"])
@pytest.mark.parametrize(
    "sizes", [(24,), (7, 1, 1, 5, 10), (1,) * 24, (3, 12, 9)], ids=lambda s: "-".join(map(str, s))[:9]
)
def test_any_cache_in_any_parts(pair: Pair, kind: str, sizes: tuple[int, ...]):
    (theirs, _), (ours, cache) = pair.both(lambda model: _steps(model, _cache(kind, model), sizes))
    _close(ours, theirs)
    assert int(cache.get_seq_length()) == 24


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize(("batch", "length", "padding"), [(3, 300, 170), (70, 9, 3)])
def test_more_rows_than_a_run_has(name: str, batch: int, length: int, padding: int):
    """Long prompts, padded on the left, and many sequences: several runs a call."""
    theirs = build(name, max_position_embeddings=512)
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours)
    ids = prompt(batch, length + 2)
    mask = torch.ones_like(ids)
    mask[-1, :padding] = mask[0, : padding // 2] = 0
    made = []
    for model in (theirs, ours):
        with torch.no_grad():
            first = model(input_ids=ids[:, :length], attention_mask=mask[:, :length], use_cache=True)
            second = model(input_ids=ids[:, length:], attention_mask=mask, **{CACHE: given(first)})
        made.append(torch.cat([first.logits, second.logits], dim=1)[mask.bool()])
    assert runs(ours) == (2, "")
    _close(made[1], made[0])


def test_a_cache_is_the_users(pair: Pair):
    """The object that was given comes back, filled: keys and values of each layer as transformers keeps them."""

    def run(model):
        given = transformers.DynamicCache(config=model.config)
        _, returned = _steps(model, given, (5, 1, 1))
        assert returned is given and len(given.layers) == model.config.num_hidden_layers
        return [(layer.keys, layer.values) for layer in given.layers]

    theirs, ours = pair.both(run)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert a.shape == b.shape
            _close(a, b)


def test_programs_and_modules_in_turn(pair: Pair):
    """A hook, attentions that are asked for, and a step of training come between two tokens."""

    def run(model):
        made, cache = _steps(model, transformers.DynamicCache(config=model.config), (5, 1))
        logits = [made]
        model.set_attn_implementation("eager")
        with uses_modules(model):
            made, cache = _steps(model, cache, (1, 1), output_attentions=True)
        model.set_attn_implementation("sdpa")
        logits.append(made)
        seen = []
        block = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
        handle = block.register_forward_hook(lambda _, args, out: seen.append(1))
        logits.append(_steps(model, cache, (1, 2))[0])
        handle.remove()
        assert len(seen) == 2
        logits.append(_steps(model, cache, (1, 1))[0])
        model.train()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        model.zero_grad(set_to_none=True)
        model.eval()
        logits.append(_steps(model, cache, (3, 1))[0])
        return torch.cat(logits, dim=1)

    theirs, ours = pair.both(run)
    _close(ours, theirs)


def test_gradients_through_a_cache(pair: Pair):
    """Outside of no_grad a call is the modules', gradients and all, even on a cache that the program has filled."""

    def run(model):
        _, cache = _steps(model, transformers.DynamicCache(config=model.config), (5, 1))
        out = model(input_ids=TOKENS[:, 6:9], **{CACHE: cache})
        (gradient,) = torch.autograd.grad(out.logits.square().mean(), model.get_output_embeddings().weight)
        return out.logits.detach(), gradient

    for a, b in zip(*pair.both(run), strict=True):
        _close(b, a)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_of_a_cache_go_their_own_ways(pair: Pair, copied: str):
    def run(model):
        _, cache = _steps(model, transformers.DynamicCache(config=model.config), (7, 1))
        other = copy.deepcopy(cache) if copied == "deepcopy" else pickle.loads(pickle.dumps(cache))
        first, _ = _steps(model, cache, (1, 1, 1))
        changed = TOKENS.flip(1)
        second, _ = _steps(model, other, (1, 1, 1), changed)
        again, _ = _steps(model, cache, (2,))
        return torch.cat([first, second, again], dim=1)

    theirs, ours = pair.both(run)
    _close(ours, theirs)


def test_crop_reorder_and_select(pair: Pair):
    def run(model):
        _, cache = _steps(model, transformers.DynamicCache(config=model.config), (5, 1))
        kept = cache.layers[-1].keys.clone()
        cache.crop(-2)
        made = [_steps(model, cache, (1, 2), TOKENS.flip(1))[0]]
        cache.reorder_cache(torch.tensor([1, 0]))
        made.append(_steps(model, cache, (1,))[0])
        cache.batch_repeat_interleave(2)
        made.append(_steps(model, cache, (1, 1), TOKENS.repeat_interleave(2, 0))[0][::2])
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        made.append(_steps(model, cache, (2,), TOKENS[[0, 1, 0]])[0][:2])
        cache.reset()
        made.append(_steps(model, cache, (3, 1))[0])
        return torch.cat(made, dim=1), kept

    for a, b in zip(*pair.both(run), strict=True):
        _close(b, a)


def test_two_continuations_of_one_prefix(pair: Pair):
    """A cached prompt is copied for each question, as users do; the prompt's own cache stays what it was."""

    def run(model):
        _, prefix = _steps(model, transformers.DynamicCache(config=model.config), (10,))
        before = [layer.keys.clone() for layer in prefix.layers]
        made = []
        for seed in (1, 2):
            ids = torch.cat([TOKENS[:, :10], prompt(2, 4, seed)], dim=1)
            made.append(generate(model, ids, **{CACHE: copy.deepcopy(prefix)}))
        assert all(torch.equal(a, layer.keys) for a, layer in zip(before, prefix.layers, strict=True))
        return torch.cat(made)

    pair.same(run)


def test_turns_of_a_conversation(pair: Pair):
    def run(model):
        cache, ids, texts = transformers.DynamicCache(config=model.config), prompt(), []
        for turn in range(3):
            out = generate(model, ids, return_dict_in_generate=True, new=6, **{CACHE: cache})
            assert given(out) is cache
            ids = torch.cat([out.sequences, prompt(1, 5, seed=turn)], dim=1)
            texts.append(ids)
        return torch.cat(texts, dim=1)

    with uses_program(pair.ours):
        pair.same(run)


def test_a_returned_cache_that_nobody_keeps(pair: Pair):
    """What was returned stays what it is, whatever is generated afterwards."""
    out = generate(pair.ours, return_dict_in_generate=True, output_logits=True)
    kept = [layer.keys.clone() for layer in given(out).layers], [logits.clone() for logits in out.logits]
    generate(pair.ours, prompt(3, 9))
    assert all(torch.equal(a, layer.keys) for a, layer in zip(kept[0], given(out).layers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept[1], out.logits, strict=True))


def test_a_cache_in_another_dtype(pair: Pair):
    """bfloat16 keys in a float32 model: `cat` makes them float32, a static cache does not take them. As without."""

    def run(model):
        _, cache = _steps(model, transformers.DynamicCache(config=model.config), (4,))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
        try:
            return _steps(model, cache, (1, 1))[0]
        except Exception as error:  # noqa: BLE001
            return type(error)

    theirs, ours = pair.both(run)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03 * theirs.abs().max().item())
    else:
        assert ours is theirs


def test_keys_written_by_the_user(pair: Pair):
    """The program reads what the cache's tensors hold, not what it has put there."""

    def run(model):
        _, cache = _steps(model, transformers.DynamicCache(config=model.config), (5, 1))
        for layer in cache.layers:
            layer.values[:, :, 2] *= -1.5
            layer.keys = layer.keys * 0.75
        return _steps(model, cache, (1, 2))[0]

    theirs, ours = pair.both(run)
    _close(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_masks(pair: Pair, side: str):
    """Padding on the left by the program; elsewhere as the modules have it. Positions are transformers' own."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, {"left": slice(0, 4), "right": slice(6, 9), "middle": slice(3, 5)}[side]] = 0

    def run(model):
        with torch.no_grad():
            first = model(input_ids=TOKENS[:, :9], attention_mask=mask, use_cache=True)
            longer = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            second = model(input_ids=TOKENS[:, 9:10], attention_mask=longer, **{CACHE: given(first)})
        kept = mask.bool()
        return torch.cat([first.logits[kept], second.logits[:, 0]])

    theirs, ours = pair.both(run)
    _close(ours, theirs)


def test_positions_of_the_users(pair: Pair):
    positions = torch.tensor([[0, 1, 2, 5, 6, 30, 31], [3, 4, 5, 6, 7, 8, 9]])

    def run(model):
        with torch.no_grad():
            return model(input_ids=TOKENS[:, :7], position_ids=positions).logits

    theirs, ours = pair.both(run)
    _close(ours, theirs)


def test_masks_of_four_dimensions(pair: Pair):
    """A tree of drafts, say: who sees whom is the caller's."""
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    seen[5, 4] = seen[6, 3] = False
    bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, 7, 7)

    def run(model):
        with torch.no_grad():
            given = {"full_attention": bias, "sliding_attention": bias} if "gemma" in model.config.model_type else bias
            return model(input_ids=TOKENS[:, :7], attention_mask=given).logits

    theirs, ours = pair.both(run)
    _close(ours, theirs)


def test_empty_and_wrong_inputs(pair: Pair):
    """What the unpatched model raises, the patched one raises too."""
    calls = [
        dict(),
        dict(input_ids=TOKENS[:, :3], inputs_embeds=torch.zeros(2, 3, 64)),
        dict(input_ids=torch.full((1, 3), 100_000)),
        dict(input_ids=torch.full((1, 3), -200)),
        dict(input_ids=TOKENS[:0, :4]),
        dict(input_ids=TOKENS[:, :0]),
        dict(input_ids=TOKENS[:, :4], attention_mask=torch.ones(2, 3, dtype=torch.long)),
        dict(input_ids=TOKENS[:, :4], attention_mask=torch.ones(3, 4, dtype=torch.long)),
        dict(input_ids=TOKENS[:, :4].int()),
        dict(input_ids=TOKENS[:, :4].float()),
        dict(input_ids=TOKENS[:, :4], position_ids=torch.tensor([[0, 1, 2, 300_000]])),
        {"input_ids": TOKENS[:, :4], CACHE: "cache"},
    ]

    def run(model, call):
        try:
            with torch.no_grad():
                return model(**call).logits
        except Exception as error:  # noqa: BLE001
            return type(error)

    for call in calls:
        theirs, ours = pair.both(lambda model, call=call: run(model, call))
        if isinstance(theirs, Tensor):
            assert isinstance(ours, Tensor) and ours.shape == theirs.shape, call
            if theirs.numel():
                _close(ours, theirs)
        else:
            assert ours is theirs, call


def _in_place(cache) -> None:
    at = int(cache.get_seq_length())
    for layer in cache.layers:
        layer.values[:, :, :at] *= 0.5
        layer.keys[:, :, at - 1].neg_()


def _moved(cache) -> None:
    for layer in cache.layers:
        layer.keys.share_memory_()
        layer.values.data = layer.values.clone()
        layer.cumulative_length.data = layer.cumulative_length.clone()


def _shuffled(cache) -> None:
    cache.reorder_cache(torch.tensor([1, 1]))


STATIC_EDITS = {
    "cropped": lambda c: c.crop(-2),
    "reset": lambda c: c.reset(),
    "in place": _in_place,
    "moved": _moved,
    "reordered": _shuffled,
    "deepcopy": copy.deepcopy,
    "shallow copy": copy.copy,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
}


@pytest.mark.parametrize("edit", STATIC_EDITS)
@pytest.mark.parametrize("then", ["program", "modules", "another model"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_static_cache_is_its_owners(name: str, edit: str, then: str):
    """Between a call of the program and one of anybody's."""
    pair = shared_pair(name)
    others = shared_pair(name, torch.float32) if then != "another model" else _other(name)

    def run(model):
        cache = transformers.StaticCache(config=model.config, max_cache_len=30)
        with uses_program(pair.ours, 0):
            made = [_steps(model, cache, (3, 1, 1))[0]]
        cache = STATIC_EDITS[edit](cache) or cache
        model = others.theirs if model is pair.theirs else others.ours
        options = {"use_cache": True, "output_hidden_states": True} if then == "modules" else {}
        begin = int(cache.get_seq_length())
        for size in (1, 2):  # other tokens than those that were there
            ids = TOKENS.flip(1)[:, begin : begin + size]
            with torch.no_grad():
                made.append(model(input_ids=ids, **{CACHE: cache}, **options).logits)
            begin += size
        assert int(cache.get_seq_length()) == begin
        held = [x[:, :, :begin] for layer in cache.layers for x in (layer.keys, layer.values)]
        return torch.cat(made, dim=1), held

    (theirs, held), (ours, kept) = pair.both(run)
    _close(ours, theirs)
    for a, b in zip(kept, held, strict=True):
        _close(a, b)


@functools.cache
def _other(name: str) -> Pair:
    """A model of the same sizes with other weights."""
    theirs = build(name, seed=5)
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours)
    return Pair(theirs, ours)


def test_a_static_cache_that_is_full(pair: Pair):
    def run(model):
        cache = transformers.StaticCache(config=model.config, max_cache_len=WINDOW + 2)
        try:
            return _steps(model, cache, (WINDOW, 1, 1, 1))[0]
        except Exception as error:  # noqa: BLE001
            return type(error)

    theirs, ours = pair.both(run)
    if isinstance(theirs, Tensor):
        _close(ours, theirs)
    else:
        assert ours is theirs
