"""Tokens that are answered in one native call: which are, that they are right, and what else is seen in time."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from decoders import CACHE, build, pair, prompt, transformers
from program.test_edits import EDITS
from torch import Tensor, nn

import bigkernels
from bigkernels.program import _forward, _quick, _state

pytestmark = pytest.mark.skipif(not _quick._makes(), reason="no such function of this torch, or no kernels")

# Edits after which a cache that is there still fits.
KEPT = [
    e
    for e in EDITS
    if e.__name__
    not in ("_another_block", "_fewer_blocks", "_blocks_in_another_order", "_to_bfloat16", "_another_head")
]


@pytest.fixture
def slow(monkeypatch) -> list[int]:
    """How many calls were not quick."""
    count, real = [0], _forward._by_program

    def counted(*args):
        count[0] += 1
        return real(*args)

    monkeypatch.setattr(_forward, "_by_program", counted)
    return count


class Talk:
    """A model and a cache, fed token by token."""

    def __init__(self, model: nn.Module, batch: int = 1, length: int = 5, padding: Tensor | None = None, cache=None):
        self.model, self.length = model, length
        self.ids = prompt(batch, 120, seed=4)
        self.cache = transformers.DynamicCache(config=model.config) if cache is None else cache
        self.padding = padding
        self.at = 0
        self.next(length)

    def next(self, tokens: int = 1, **options) -> Tensor:
        begin, self.at = self.at, self.at + tokens
        given = {"input_ids": self.ids[:, begin : self.at], CACHE: self.cache, "use_cache": True, "return_dict": True}
        if self.model.config.model_type == "gpt2":  # which embeds them
            given["position_ids"] = torch.arange(begin, self.at)[None]
        if self.padding is not None:
            mask = (torch.arange(self.at)[None] >= self.padding[:, None]).long()
            given["attention_mask"] = mask
            given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, begin:]
        with torch.no_grad():
            return self.model(**given | options).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3", "mistral"])
def test_tokens(name: str, slow: list[int]):
    """Past the window, beyond the room of the first buffers, several at once, and rows of logits."""
    models = pair(name)
    theirs, ours = (Talk(m) for m in (models.theirs, models.ours))
    for i in range(24):
        close(ours.next(), theirs.next())
        if i == 3:
            slow[0] = 0
    assert slow[0] == 0
    for tokens, keep in ((4, 0), (4, 2), (3, 1), (1, 5)):
        close(ours.next(tokens, logits_to_keep=keep), theirs.next(tokens, logits_to_keep=keep))
    assert slow[0] == 0
    close(ours.next(60), theirs.next(60))
    close(ours.next(), theirs.next())
    assert ours.cache.get_seq_length() == theirs.cache.get_seq_length()
    for a, b in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        close(a.keys, b.keys)
        close(a.values, b.values)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tokens_of_a_cache_of_another_dtype(name: str, slow: list[int]):
    models = pair(name)
    caches = [bigkernels.Cache(models.theirs, dtype=torch.bfloat16) for _ in range(2)]
    theirs, ours = (Talk(m, 2, cache=c) for m, c in zip((models.theirs, models.ours), caches, strict=True))
    for i in range(16):
        a, b = ours.next(), theirs.next()
        assert a.dtype == torch.float32 and (a - b).abs().max() < 0.02 * b.abs().max()
        if i == 3:
            slow[0] = 0
    assert slow[0] == 0
    for a, b in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        assert a._k.dtype == torch.bfloat16 and (a.keys - b.keys).abs().max() < 0.02 * b.keys.abs().max()


def test_padding(slow: list[int]):
    models, padding = pair("llama"), torch.tensor([0, 2, 4])
    theirs, ours = (Talk(m, 3, padding=padding) for m in (models.theirs, models.ours))
    for _ in range(3):
        close(ours.next(), theirs.next())
    slow[0] = 0
    for tokens in (1, 2, 1):
        close(ours.next(tokens), theirs.next(tokens))
    assert slow[0] == 0
    holes = torch.ones(3, theirs.at + 1, dtype=torch.long)
    holes[1, 3] = 0
    close(ours.next(attention_mask=holes), theirs.next(attention_mask=holes))
    assert slow[0] == 1


@pytest.mark.parametrize("edit", KEPT, ids=lambda edit: edit.__name__.strip("_"))
def test_edits_are_seen(edit, slow: list[int]):
    models = pair("llama")
    theirs, ours = (Talk(m) for m in (models.theirs, models.ours))
    for _ in range(4):
        close(ours.next(), theirs.next())
    slow[0] = 0
    close(ours.next(), theirs.next())
    assert slow[0] == 0 and ours.model.__dict__[_state.KEY].quick is not None
    edit(models.theirs)
    edit(models.ours)
    for _ in range(4):
        close(ours.next(), theirs.next())


@contextmanager
def _global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


class _Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class _Operators(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a mode of functions": _Functions,
    "a mode of operators": _Operators,
    "forward gradients": torch.autograd.forward_ad.dual_level,
    "a hook on all modules": _global_hook,
}


@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_a_call_is_seen(around: str, slow: list[int]):
    talk = Talk(pair("llama").ours)
    for _ in range(4):
        talk.next()
    slow[0] = 0
    with AROUND[around]():
        talk.next()
    assert slow[0] == 1


def test_other_arguments_are_seen(slow: list[int]):
    models = pair("llama")
    theirs, ours = (Talk(m) for m in (models.theirs, models.ours))
    for talk in (theirs, ours):
        for _ in range(4):
            talk.next()
    for options in (
        {"output_hidden_states": True},
        {"return_dict": False},
        {"position_ids": torch.tensor([[30]])},
        {"attention_mask": torch.ones(1, 10)},
        {"logits_to_keep": True},
    ):
        before = slow[0]
        results = []
        for talk in (theirs, ours):
            at = talk.at
            with torch.no_grad():
                out = talk.model(talk.ids[:, at : at + 1], **{CACHE: talk.cache}, **options)
            talk.at += 1
            results.append(out[0])
        close(results[1], results[0])
        assert slow[0] > before
    slow[0] = 0
    ours.next(), theirs.next()
    ours.ids[0, ours.at] = 500  # behind the vocabulary
    with pytest.raises(IndexError):
        ours.next()
    with torch.enable_grad():
        assert ours.model(ours.ids[:, :1], **{CACHE: copy.deepcopy(ours.cache)}).logits.requires_grad


CACHE_EDITS = {
    "crop": lambda c: c.crop(-2),
    "reorder": lambda c: c.reorder_cache(torch.tensor([1, 0])),
    "another layer": lambda c: c.layers.__setitem__(1, copy.deepcopy(c.layers[1])),
    "another list": lambda c: setattr(c, "layers", [copy.copy(x) for x in c.layers]),
    "other keys": lambda c: [setattr(x, "keys", x.keys + 1) for x in c.layers],
    "values in place": lambda c: [x.values[..., -1, :].mul_(-1.5) for x in c.layers],
    "shared memory": lambda c: [x.keys.share_memory_() for x in c.layers],
    "repeated": lambda c: (c.batch_repeat_interleave(2), c.batch_select_indices(torch.tensor([1, 2]))),
}


@pytest.mark.parametrize("edit", CACHE_EDITS)
def test_edits_of_a_cache_are_seen(edit: str):
    models = pair("llama")
    theirs, ours = (Talk(m, 2) for m in (models.theirs, models.ours))
    for _ in range(5):
        close(ours.next(), theirs.next())
    for talk in (theirs, ours):
        CACHE_EDITS[edit](talk.cache)
    for _ in range(4):
        close(ours.next(), theirs.next())
    for a, b in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        close(a.keys, b.keys)
        close(a.values, b.values)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_drafts_that_were_wrong(name: str, slow: list[int]):
    """Rows at once, and a cache that is cut back: quick as long as buffers stay where they are."""
    models = pair(name)
    theirs, ours = (Talk(m) for m in (models.theirs, models.ours))
    for talk in (theirs, ours):
        talk.cache.activate_past_recording()
    for i, (tokens, lost) in enumerate([(1, 0), (1, 0), (4, 3), (4, 0), (3, 2), (1, 0), (4, 1), (2, 1)] * 3):
        close(ours.next(tokens), theirs.next(tokens))
        for talk in (theirs, ours):
            talk.cache.crop(-lost)
            talk.at -= lost
            assert talk.cache.get_seq_length() == talk.at
        if i == 4:
            slow[0] = 0
    assert name != "llama" or slow[0] == 0
    for a, b in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        close(a.keys, b.keys)


def test_nothing_of_a_cache_is_kept_alive():
    talk = Talk(pair("llama").ours)
    for _ in range(4):
        talk.next()
    gone = weakref.ref(talk.cache.layers[0])
    steps = talk.model.__dict__[_state.KEY]
    assert steps.quick is not None
    talk.cache = None
    gc.collect()
    assert gone() is None and steps.quick is None


def test_caches_in_turn(monkeypatch):
    """Nothing is prepared for a cache unless it comes twice in succession."""
    made, real = [], _quick.Quick.of

    def counted(*args):
        made.append(1)
        return real(*args)

    monkeypatch.setattr(_quick.Quick, "of", counted)
    models = pair("llama")
    talks = [(Talk(models.theirs, length=n), Talk(models.ours, length=n)) for n in (4, 7)]
    for i in range(8):
        theirs, ours = talks[i % 2]
        close(ours.next(), theirs.next())
    assert not made
    for i in range(12):
        theirs, ours = talks[i // 3 % 2]
        close(ours.next(), theirs.next())
    assert len(made) == 4


@pytest.mark.parametrize("models", ["one model", "copies"])
def test_threads_with_caches_of_their_own(models: str, slow: list[int]):
    """Calls of one model wait for each other and prepare for another cache each; those of copies meet inside."""
    both = pair("llama")
    expected = []
    for i in range(3):
        talk = Talk(both.theirs, 1 + i % 2, length=4 + i)
        expected.append([talk.next() for _ in range(40)])
    talks = []
    for i in range(3):
        model = both.ours if models == "one model" else copy.deepcopy(both.ours)
        talks.append(Talk(model, 1 + i % 2, length=4 + i))
        if models == "copies":
            made = [talks[i].next() for _ in range(4)]
            for a, b in zip(made, expected[i], strict=False):
                close(a, b)
            del expected[i][:4]
    slow[0] = 0

    def run(i: int) -> list[Tensor]:
        torch.set_num_threads(2)
        return [talks[i].next() for _ in expected[i]]

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, range(3)))
    for made, right in zip(results, expected, strict=True):
        for a, b in zip(made, right, strict=True):
            close(a, b)
    assert models == "one model" or slow[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ["int4", "int8", "nf4", "fp8", "q4_1", "q8_0"])
def test_rows_of_codes(config: str, dtype: torch.dtype, monkeypatch):
    """The same hidden states as the embedding's own."""
    model = build("llama", dtype)
    bigkernels.quantize(model, config, skip=(), embeddings=True)
    bigkernels.patch(model)
    talk = Talk(model)
    for _ in range(4):
        talk.next()
    steps = model.__dict__[_state.KEY]
    quick = steps.quick
    other = Talk(copy.deepcopy(model))
    monkeypatch.setattr(_state.Steps, "quickly", lambda *_: None)
    for _ in range(4):
        other.next()
    expected = other.next()
    given = {"input_ids": talk.ids[:, talk.at : talk.at + 1], CACHE: talk.cache, "use_cache": True}
    with torch.no_grad():
        assert torch.equal(quick.call(given), expected)
