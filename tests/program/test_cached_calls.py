"""Layers whose attention or recurrence is the model's own code, with a layer of the cache, inside a program."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from decoders import CACHE, Pair, generate, given, prompt, spread, uses_program
from program.models import small
from torch import Tensor

import bigkernels
from bigkernels.program._find import find
from bigkernels.program._ir import Attend, Call, Graph

# Latents of keys and values; a norm after the rotation; queries scaled by their position, in windows; two softmaxes;
# states beside attention; states alone.
KEYS = ("DeepseekV3ForCausalLM", "HunYuanDenseV1ForCausalLM", "Ministral3ForCausalLM", "DiffLlamaForCausalLM")
STATES = ("JambaForCausalLM", "MambaForCausalLM", "OlmoHybridForCausalLM")


@functools.cache
def _pair(name: str) -> Pair:
    theirs = spread(small(name))
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours)
    return Pair(theirs, ours)


@pytest.fixture(params=KEYS + STATES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return _pair(request.param)


def _ids(batch: int = 1, length: int = 9, seed: int = 1) -> Tensor:
    return 8 + prompt(batch, length, seed=seed) % 140


PADDED = _ids(3).masked_fill(torch.arange(9) < torch.tensor([[0], [3], [6]]), 0)
WAYS = {
    "greedy": dict(new=14),
    "one token of prompt": dict(ids=_ids(1, 1)),
    "a long prompt": dict(ids=_ids(1, 40), new=5),
    "a batch": dict(ids=_ids(3)),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "sampling": dict(do_sample=True, num_return_sequences=3),
    "a prompt in chunks": dict(ids=_ids(1, 11), prefill_chunk_size=4),
    "penalties": dict(repetition_penalty=1.3),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens(pair: Pair, way: str):
    if way == "a prompt in chunks" and "Mamba" in type(pair.ours).__name__:
        pytest.skip("transformers asks its cache for a length that it does not know")
    options = {"ids": _ids(), "new": 8} | WAYS[way]
    with uses_program(pair.ours):
        pair.same(lambda model: generate(model, **options))


@pytest.mark.parametrize("name", KEYS)
def test_padding_in_front(name: str):
    with uses_program(_pair(name).ours):
        _pair(name).same(lambda model: generate(model, PADDED))


@pytest.mark.parametrize("name", STATES)
def test_states_are_not_told_of_padding(name: str):
    steps = _pair(name).ours.__dict__["_bigkernels_program"]
    left = steps.left
    _pair(name).same(lambda model: generate(model, PADDED, new=4))
    assert steps.left > left and "padding" in steps.why


@pytest.mark.parametrize("name", KEYS[:2])
def test_a_cache_that_is_cropped_and_goes_on(name: str):
    def run(model):
        with torch.no_grad():
            cache = given(model(input_ids=_ids(1, 12), use_cache=True))
            cache.crop(-5)
            first = model(input_ids=_ids(1, 3, seed=4), **{CACHE: cache}).logits
            other = copy.deepcopy(cache)
            more = [model(input_ids=_ids(1, 2, seed=s), **{CACHE: c}).logits for s, c in ((5, cache), (6, other))]
            return torch.cat([first, *more], 1)

    with uses_program(_pair(name).ours, 4):
        theirs, ours = _pair(name).both(run)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("name", KEYS[:2])
@pytest.mark.parametrize("kind", ["static", "positions"])
def test_caches_of_a_fixed_size_and_positions(name: str, kind: str):
    def run(model):
        if kind == "static":
            return generate(model, _ids(2), cache_implementation="static")
        with torch.no_grad():
            return model(input_ids=_ids(2, 5), position_ids=torch.arange(3, 8).expand(2, -1)).logits.argmax(-1)

    _pair(name).same(run)


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "JambaForCausalLM"])
def test_programs_and_modules_in_turn(name: str):
    """A cache that one has filled goes on with the other."""
    models = _pair(name)

    def run(model):
        cache, made = None, []
        for i, asked in enumerate((False, True, False, True)):
            with torch.no_grad():
                out = model(input_ids=_ids(1, 3, seed=i), use_cache=True, output_hidden_states=asked, **{CACHE: cache})
            cache = given(out)
            made.append(out.logits)
        return torch.cat(made, 1)

    theirs, ours = models.both(run)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "MambaForCausalLM"])
def test_weights_that_change(name: str):
    models = Pair(*(copy.deepcopy(m) for m in (_pair(name).theirs, _pair(name).ours)))
    models.same(lambda model: generate(model, _ids()))
    for model in (models.theirs, models.ours):
        for path, p in model.named_parameters():
            if path.endswith(("o_proj.weight", "kv_b_proj.weight", "out_proj.weight")):
                p.data *= -1.5
    with uses_program(models.ours):
        models.same(lambda model: generate(model, _ids()))


def test_what_is_known_beside_states_is_no_call():
    graph = find(_pair("JambaForCausalLM").theirs)
    assert isinstance(graph, Graph)
    calls = [op for op in graph.operations if isinstance(op, Call)]
    assert {op.path.split(".")[-1] for op in calls} == {"mamba"} and all(op.cached for op in calls)
    assert sum(isinstance(op, Attend) for op in graph.operations) == 2 and len(graph.owned) == 2


def test_a_window_beyond_what_is_recorded():
    """A window of the masks that a call is given is looked for far into a text."""
    theirs = small("Ministral3ForCausalLM")
    theirs.config.sliding_window = 30
    for module in theirs.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = 30
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours)
    ids = _ids(1, 45)
    with torch.no_grad():
        plain, near = (m(input_ids=ids).logits for m in (theirs, ours))
    torch.testing.assert_close(near, plain, rtol=0, atol=1e-4 * plain.abs().max().item())
